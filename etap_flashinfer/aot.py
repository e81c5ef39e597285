"""Build the ETAP MLA kernel modules ahead of time: ``python -m etap_flashinfer.aot --out DIR``.

With the environment variable ``ETAP_FLASHINFER_AOT_DIR`` set to ``DIR`` the package then loads its
kernels from there and needs neither nvcc nor flashinfer. No GPU is needed to build.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import datetime, timezone
from pathlib import Path

import torch

from . import jit
from .version import __version__


def select_variants(names: Sequence[str] | None) -> list[jit.EtapMlaVariant]:
    """Variants by their short names (``bf16_n16_tma``); all of them for None.

    Raises
    ------
    ValueError
        If a name is none of them.
    """
    by_name = {variant.short_name: variant for variant in jit.ALL_VARIANTS}
    if names is None:
        return list(jit.ALL_VARIANTS)
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ValueError(f"unknown variants {', '.join(unknown)}; allowed: {', '.join(by_name)}")
    return [by_name[name] for name in dict.fromkeys(names)]


def build_versions(nvcc: str) -> dict[str, str]:
    """Versions of everything that takes part in a build, for the manifest."""
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release [\d.]+, V([\d.]+)", output)
    return {
        "etap_flashinfer": __version__,
        "flashinfer": importlib.metadata.version("flashinfer-python"),
        "apache_tvm_ffi": importlib.metadata.version("apache-tvm-ffi"),
        "torch": torch.__version__,
        "nvcc": match.group(1) if match else output.strip(),
    }


def _install(library: Path, directory: Path) -> None:
    """Copy a library into the directory, so that no reader ever finds it half written."""
    partial = directory / f".{library.name}.{os.getpid()}.partial"
    try:
        shutil.copyfile(library, partial)
        partial.replace(directory / library.name)
    finally:
        partial.unlink(missing_ok=True)


def build_all(
    variants: Sequence[jit.EtapMlaVariant], directory: Path, jobs: int, verbose: bool
) -> None:
    """Build variants into a directory and write its manifest.

    Modules that the directory holds from the same sources stay listed; a manifest of other sources
    is replaced.

    Parameters
    ----------
    variants : sequence of EtapMlaVariant
    directory : Path
        Created if it does not exist.
    jobs : int
        Compilations at the same time.
    verbose : bool
        Whether the compiler's output is shown.

    Raises
    ------
    EtapJitError
        If a variant does not build; those built before stay in the directory, without a manifest
        that lists them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    versions = build_versions(jit.compile_command(variants[0])[0])
    start = time.monotonic()
    # Processes rather than threads: FlashInfer takes its target from the process's environment.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = {
            pool.submit(jit.build_etap_mla_module, variant, verbose): variant
            for variant in variants
        }
        try:
            for done, future in enumerate(as_completed(pending), start=1):
                _install(future.result(), directory)
                elapsed = time.monotonic() - start
                name = pending[future].short_name
                print(f"[{done}/{len(variants)}] {name} ({elapsed:.0f} s)", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    _write_manifest(directory, variants, versions)


def _write_manifest(
    directory: Path, variants: Sequence[jit.EtapMlaVariant], versions: dict[str, str]
) -> None:
    # Named by hash, so what lies there under the present name was built from these sources.
    listed = [
        variant
        for variant in dict.fromkeys([*jit.ALL_VARIANTS, *variants])
        if variant in variants or (directory / f"{variant.name}.so").is_file()
    ]
    manifest = {
        "csrc_sha256": jit.csrc_sha256(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "modules": {variant.short_name: f"{variant.name}.so" for variant in listed},
        "sha256": {
            f"{variant.name}.so": jit.file_sha256(directory / f"{variant.name}.so")
            for variant in listed
        },
    }
    partial = directory / f".{jit.AOT_MANIFEST}.{os.getpid()}.partial"
    partial.write_text(json.dumps(manifest, indent=2) + "\n")
    partial.replace(directory / jit.AOT_MANIFEST)


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m etap_flashinfer.aot",
        description="Build the ETAP MLA kernel modules ahead of time (sm_90a; no GPU needed).",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where they go")
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        help=f"which ones; all of them by default: "
        f"{', '.join(variant.short_name for variant in jit.ALL_VARIANTS)}",
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="compilations at a time (all cores)"
    )
    parser.add_argument("--verbose", action="store_true", help="show the compiler's output")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}; it must be 1 or more")
    try:
        options.variants = select_variants(options.variants)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parse_arguments(arguments)
    try:
        build_all(options.variants, options.out, options.jobs, options.verbose)
    except jit.EtapJitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: --out {options.out} can't be written: {error}", file=sys.stderr)
        return 1
    print(f"{len(options.variants)} modules in {options.out}; set {jit.AOT_DIR_ENV}={options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
