"""The scripts' own small CUDA modules, ``NAME.cu`` beside this file: compiled where they are used,
or into a directory beforehand."""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
from typing import Any

from .evidence import REPOSITORY

NAMES = ("read_ceiling", "wgmma_cost")
CSRC = REPOSITORY / "csrc"


def module_name(name: str) -> str:
    """``NAME_<hash>``: of its source and of the kernels' header that it may include."""
    digest = hashlib.sha256()
    for path in (pathlib.Path(__file__).with_name(f"{name}.cu"), CSRC / "etap_mla_wgmma.cuh"):
        digest.update(path.read_bytes())
    return f"etap_{name}_{digest.hexdigest()[:12]}"


def _spec(name: str) -> Any:
    from flashinfer.jit import env, gen_jit_spec, sm90a_nvcc_flags

    # Where there is no driver, the linker has no libcuda; nothing here calls into it.
    stub = pathlib.Path(env.FLASHINFER_GEN_SRC_DIR) / "etap_libcuda" / "libcuda.a"
    stub.parent.mkdir(parents=True, exist_ok=True)
    stub.write_text("!<arch>\n")
    return gen_jit_spec(
        module_name(name),
        [pathlib.Path(__file__).with_name(f"{name}.cu")],
        extra_cuda_cflags=list(sm90a_nvcc_flags),
        extra_ldflags=[f"-L{stub.parent}"],
        extra_include_paths=[CSRC],
    )


def build(name: str, directory: pathlib.Path) -> None:
    """Compile a module into ``directory``; needs nvcc, but no GPU.

    To be called before anything imports flashinfer, which looks for its target only then.
    """
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    spec = _spec(name)
    spec.build(verbose=False)
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(spec.jit_library_path, directory / f"{module_name(name)}.so")


def load(name: str, directory: pathlib.Path | None = None) -> Any:
    """The module, from ``directory`` or compiled now.

    Raises
    ------
    FileNotFoundError
        If ``directory`` is given and does not hold the module of these sources.
    """
    if directory is None:
        return _spec(name).build_and_load()
    import tvm_ffi

    library = directory / f"{module_name(name)}.so"
    if not library.is_file():
        raise FileNotFoundError(f"{library} is not there: build the directory from these sources")
    return tvm_ffi.load_module(str(library))
