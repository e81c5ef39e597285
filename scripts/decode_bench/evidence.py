"""Evidence files: what they say about where their figures come from, and how they are written."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Callable
from typing import Any

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CASE_KEYS = (
    "batch",
    "context",
    "heads",
    "q_len",
    "page_size",
    "dtype",
    "kv_dtype",
    "us",
    "gbps",
    "rmse",
    "rmse_rounding",
    "peers",
)
TOP_KEYS = ("csrc_sha256", "device", "versions", "date", "read_ceiling_gbps", "cases")
DTYPE_NAMES = ("bf16", "fp16", "fp8_e4m3", "flashmla_656")
PEER_NAMES = (
    "flashinfer_fa2",
    "flashinfer_fa3",
    "flashmla",
    "fa3",
    "flashmla_fp8",
    "flashinfer_fp8",
)


def csrc_sha256(repository: pathlib.Path = REPOSITORY) -> str:
    """SHA-256 over the kernel sources: of each file under ``csrc/`` in sorted path order, its path
    relative to the repository, a zero byte, its bytes, a zero byte."""
    digest = hashlib.sha256()
    names = sorted(
        path.relative_to(repository).as_posix()
        for path in (repository / "csrc").rglob("*")
        if path.is_file()
    )
    for name in names:
        digest.update(name.encode() + b"\0" + (repository / name).read_bytes() + b"\0")
    return digest.hexdigest()


def check_sources_match() -> str:
    """The hash of the kernel sources, the installed package's and this repository's being the same.

    Raises
    ------
    RuntimeError
        If ``etap_flashinfer`` comes from an installation with other sources: figures measured
        with it would be evidence for code that is not in this repository.
    """
    from etap_flashinfer import jit

    installed, here = jit.csrc_sha256(), csrc_sha256()
    if installed != here:
        raise RuntimeError(
            f"etap_flashinfer was imported from {pathlib.Path(jit.__file__).parent}, whose kernel "
            f"sources hash to {installed[:12]}, but csrc/ here hashes to {here[:12]}; "
            "install this tree or put it first on PYTHONPATH"
        )
    return here


def versions() -> dict[str, str]:
    """Versions of what the figures depend on; a package that is absent is not listed."""
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    names = (
        "etap-flashinfer",
        "flashinfer-python",
        "apache-tvm-ffi",
        "sglang",
        "sglang-kernel",
        "triton",
    )
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def header(csrc_hash: str, read_ceiling_gbps: float | None) -> dict[str, Any]:
    """The fields that every evidence file starts with."""
    import torch

    return {
        "csrc_sha256": csrc_hash,
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "read_ceiling_gbps": read_ceiling_gbps,
    }


def default_directory() -> pathlib.Path:
    """``results/<gpu>``, for example ``results/h200`` on an NVIDIA H200."""
    import torch

    words = torch.cuda.get_device_name().replace("NVIDIA", "").split()
    return REPOSITORY / "results" / words[0].lower()


def schema_errors(evidence: dict[str, Any]) -> list[str]:
    """What is wrong with an evidence file, one line each; empty when it keeps to the schema."""
    errors = [f"{key} is missing" for key in TOP_KEYS if key not in evidence]
    for index, case in enumerate(evidence.get("cases", [])):
        where = f"case {index}"
        errors += [f"{where}: {key} is missing" for key in CASE_KEYS if key not in case]
        for key in ("dtype", "kv_dtype"):
            if case.get(key) not in DTYPE_NAMES:
                errors.append(f"{where}: {key} is {case.get(key)!r}, not one of {DTYPE_NAMES}")
        for name, peer in case.get("peers", {}).items():
            if name not in PEER_NAMES:
                errors.append(f"{where}: unknown peer {name!r}")
            errors += [f"{where}: {name} has no {key}" for key in ("us", "rmse") if key not in peer]
    return errors


def write(path: pathlib.Path, evidence: dict[str, Any]) -> None:
    """Write an evidence file whole or not at all, one case a line so that changes are readable."""
    errors = schema_errors(evidence)
    if errors:
        raise ValueError("not the evidence schema: " + "; ".join(errors[:5]))
    fields = {key: value for key, value in evidence.items() if key != "cases"}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in fields.items()]
    cases = ",\n".join(f"    {json.dumps(case)}" for case in evidence["cases"])
    text = "\n".join(["{", *lines, '  "cases": [', cases, "  ]", "}", ""])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


def progress(total: int, label: str) -> Callable[[str], None]:
    """A function to call after each of ``total`` steps with a note; a tqdm bar where tqdm is."""
    try:
        from tqdm import tqdm
    except ImportError:
        done = 0

        def step(note: str) -> None:
            nonlocal done
            done += 1
            filled = 30 * done // total
            print(
                f"[{'#' * filled}{'.' * (30 - filled)}] {label} {done}/{total} {note}", flush=True
            )

        return step
    bar = tqdm(total=total, desc=label, dynamic_ncols=True)

    def step_bar(note: str) -> None:
        bar.set_postfix_str(note, refresh=False)
        bar.update()
        if bar.n >= total:
            bar.close()

    return step_bar
