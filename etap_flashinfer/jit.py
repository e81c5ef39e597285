"""Compile and load the ETAP MLA kernels through FlashInfer's JIT.

Every variant of the kernel (dtype, row tile, way of loading the cache, format of the cache) is one
module. The sources under ``csrc`` and a configuration rendered for the variant are copied to
FlashInfer's directory of generated sources and compiled for sm_90a by
:func:`flashinfer.jit.gen_jit_spec`; nothing is ever written into the package. The name of a module
carries a hash of the sources, so that an upgrade never loads a stale build. A library's own hash is
noted beside it when its build has ended, and nothing is loaded that does not agree with it: a build
that was cut off starts anew.

With ``ETAP_FLASHINFER_AOT_DIR`` set to a directory that ``python -m etap_flashinfer.aot`` wrote,
modules are loaded from there, which needs neither nvcc nor flashinfer.
"""

import functools
import hashlib
import json
import os
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import torch

from . import dispatch, stock
from .dispatch import HOPPER, KvCache, KvLoader

AOT_DIR_ENV = "ETAP_FLASHINFER_AOT_DIR"
AOT_MANIFEST = "manifest.json"

_SHORT_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_CPP_DTYPES = {torch.bfloat16: "cutlass::bfloat16_t", torch.float16: "cutlass::half_t"}
_CPP_KV_LOADERS = {"tma": "kTma", "gather": "kGather"}
_CPP_KV_CACHES = {"same": "kSame", "fp8": "kFp8", "flashmla_656": "kFp8FlashMla"}
_TEMPLATE_SUFFIX = ".jinja"
_DIGEST_SUFFIX = ".sha256"
_BUILD_LOG_LINES = 30
_BUILD_LOG_COLUMNS = 500


class EtapJitError(RuntimeError):
    """A kernel module can't be compiled or loaded; the message says what to do about it."""


@dataclass(frozen=True)
class EtapMlaVariant:
    """One compiled variant of the kernel.

    Parameters
    ----------
    dtype : torch.dtype
        Of queries and output: ``torch.bfloat16`` or ``torch.float16``.
    row_tile : int
        Packed rows (query x head) of one tile, WGMMA's N: 8, 16, 32 or, but for
        ``"flashmla_656"``, 64.
    kv_loader : str
        ``"tma"`` (page sizes with ``gcd(page_size, 64) >= 8``) or ``"gather"`` (every page size).
    kv_cache : str
        ``"same"`` (elements of ``dtype``), ``"fp8"`` (e4m3 codes with one scale for ckv and one
        for kpe) or ``"flashmla_656"`` (FlashMLA's 656 bytes a token).

    Raises
    ------
    ValueError
        If a parameter is none of these.
    """

    dtype: torch.dtype
    row_tile: int
    kv_loader: KvLoader
    kv_cache: KvCache = "same"

    def __post_init__(self) -> None:
        _check_choice("dtype", self.dtype, tuple(_SHORT_DTYPES))
        _check_choice("kv_loader", self.kv_loader, get_args(KvLoader))
        _check_choice("kv_cache", self.kv_cache, get_args(KvCache))
        _check_choice("row_tile", self.row_tile, dispatch.row_tiles(self.kv_cache))

    @property
    def short_name(self) -> str:
        """Name without the hash of the sources: ``bf16_n16_tma``, ``bf16_fp8_n16_tma``."""
        cache = "" if self.kv_cache == "same" else f"{self.kv_cache}_"
        return f"{_SHORT_DTYPES[self.dtype]}_{cache}n{self.row_tile}_{self.kv_loader}"

    @property
    def name(self) -> str:
        """Name of the module: ``etap_mla_<short name>_<12 hex digits of csrc_sha256>``."""
        return f"etap_mla_{self.short_name}_{csrc_sha256()[:12]}"

    @property
    def nvcc_flags(self) -> tuple[str, ...]:
        """Flags beyond those of every variant; a class that adds some needs names of its own."""
        return ()


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(str, allowed))}")


ALL_VARIANTS = tuple(
    EtapMlaVariant(dtype, row_tile, kv_loader, kv_cache)
    for kv_cache in get_args(KvCache)
    for dtype in _SHORT_DTYPES
    for row_tile in dispatch.row_tiles(kv_cache)
    for kv_loader in get_args(KvLoader)
)


def csrc_dir() -> Path:
    """Directory of the kernel sources: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def csrc_files() -> list[tuple[str, Path]]:
    """Kernel sources as (path relative to the repository, file), sorted by that path."""
    root = csrc_dir()
    files = [
        (f"csrc/{path.relative_to(root).as_posix()}", path)
        for path in root.rglob("*")
        if path.is_file()
    ]
    if not files:
        raise EtapJitError(
            f"no kernel sources in {root}: the installation is incomplete; install "
            "etap-flashinfer again"
        )
    return sorted(files)


def csrc_sha256() -> str:
    """SHA-256 over, for each kernel source in path order, its path, a zero byte, its bytes and a
    zero byte."""
    digest = hashlib.sha256()
    for name, path in csrc_files():
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _flashinfer_jit() -> SimpleNamespace:
    """Import what is used of FlashInfer's JIT (0.6.14 and later), or say why that fails."""
    try:
        import flashinfer  # alone first: a missing flashinfer.jit would be another defect
        import flashinfer.jit
        from flashinfer.compilation_context import CompilationContext
        from flashinfer.jit import core, cpp_ext, env, utils
    except Exception as error:  # a broken dependency raises anything, not only ImportError
        instead = f"set {AOT_DIR_ENV} to modules built ahead of time"
        message = stock.import_failure(error, "compiling the ETAP kernels", instead)
        raise EtapJitError(message) from error
    return SimpleNamespace(
        CompilationContext=CompilationContext,
        core=core,
        cpp_ext=cpp_ext,
        env=env,
        gen_jit_spec=flashinfer.jit.gen_jit_spec,
        sm90a_nvcc_flags=flashinfer.jit.sm90a_nvcc_flags,
        write_if_different=utils.write_if_different,
    )


_TARGET_LOCK = threading.RLock()


@contextmanager
def _hopper_target(jit: SimpleNamespace) -> Iterator[None]:
    """Let FlashInfer compile for sm_90a on a machine without a Hopper GPU.

    FlashInfer refuses to compile where it sees no GPU and its target list is unset. Inside this
    context the list is sm_90a; afterwards it is as before. Where a Hopper GPU is seen, or already
    listed, nothing is changed.
    """
    target = (HOPPER[0], f"{HOPPER[1]}a")
    variable = "FLASHINFER_CUDA_ARCH_LIST"
    with _TARGET_LOCK:
        # FlashInfer's list as of its import, and as of now: it reads both.
        targets = jit.core.current_compilation_context.TARGET_CUDA_ARCHS
        is_listed = target in targets and target in jit.CompilationContext().TARGET_CUDA_ARCHS
        if not is_listed:
            previous_variable, previous_targets = os.environ.get(variable), set(targets)
            os.environ[variable] = f"{target[0]}.{target[1]}"
            targets.add(target)
            try:
                yield
            finally:
                targets.clear()
                targets.update(previous_targets)
                if previous_variable is None:
                    del os.environ[variable]
                else:
                    os.environ[variable] = previous_variable
            return
    yield


def _render_config(template: str, variant: EtapMlaVariant) -> str:
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template).render(
        dtype=_CPP_DTYPES[variant.dtype],
        rows=variant.row_tile,
        kv_loader=_CPP_KV_LOADERS[variant.kv_loader],
        kv_cache=_CPP_KV_CACHES[variant.kv_cache],
    )


def _write_sources(jit: SimpleNamespace, variant: EtapMlaVariant) -> Path:
    """Copy the sources, and the configuration rendered, to the module's generated sources."""
    from filelock import FileLock

    directory: Path = jit.env.FLASHINFER_GEN_SRC_DIR / variant.name
    directory.mkdir(parents=True, exist_ok=True)
    # Under a lock, because another process may be compiling these very files: it must not find
    # one half written, and files that are already right are left alone.
    with FileLock(directory.with_suffix(".lock"), thread_local=False):
        for name, path in csrc_files():
            target = directory / Path(name).relative_to("csrc")
            text = path.read_text()
            if path.suffix == _TEMPLATE_SUFFIX:
                target, text = target.with_suffix(".inc"), _render_config(text, variant)
            jit.write_if_different(target, text)
        # FlashInfer links every module with -lcuda. The kernels take the driver's entry points
        # from the CUDA runtime, so where there is no driver an empty archive serves as well.
        jit.write_if_different(directory / "libcuda" / "libcuda.a", "!<arch>\n")
    return directory


def gen_etap_mla_module(variant: EtapMlaVariant) -> Any:
    """Write the sources of a variant and return the FlashInfer JIT spec that compiles them.

    On a machine without a Hopper GPU, compile with :func:`build_etap_mla_module` rather than with
    the spec's own methods, which need ``FLASHINFER_CUDA_ARCH_LIST=9.0a`` there.

    Parameters
    ----------
    variant : EtapMlaVariant

    Returns
    -------
    flashinfer.jit.JitSpec
        Its name is ``variant.name``.

    Raises
    ------
    EtapJitError
        If flashinfer is missing or does not import.
    """
    jit = _flashinfer_jit()
    directory = _write_sources(jit, variant)
    with _hopper_target(jit):
        return jit.gen_jit_spec(
            variant.name,
            [directory / "etap_mla_binding.cu"],
            extra_cuda_cflags=[*jit.sm90a_nvcc_flags, *variant.nvcc_flags],
            extra_ldflags=[f"-L{directory / 'libcuda'}"],
            extra_include_paths=[directory],
        )


def _check_build_tools(jit: SimpleNamespace) -> str:
    """Check that nvcc and ninja are there; return the CUDA toolkit's directory."""
    try:
        cuda_home = str(jit.cpp_ext.get_cuda_path())
    except RuntimeError as error:
        raise EtapJitError(_no_nvcc(str(error))) from error
    nvcc = os.environ.get("FLASHINFER_NVCC", f"{cuda_home}/bin/nvcc")
    if shutil.which(nvcc) is None:
        raise EtapJitError(_no_nvcc(f"{nvcc} is not an executable file"))
    if shutil.which("ninja") is None:
        raise EtapJitError(
            "ninja is not on PATH, and compiling the ETAP kernels needs it: activate the virtual "
            "environment that flashinfer-python is installed in, or pip install ninja"
        )
    return cuda_home


def _no_nvcc(reason: str) -> str:
    return (
        f"no nvcc to compile the ETAP kernels with: {reason}. Install a CUDA toolkit and set "
        "CUDA_HOME to its directory, or build the modules on another machine with "
        f"`python -m etap_flashinfer.aot --out DIR` and set {AOT_DIR_ENV}=DIR"
    )


@contextmanager
def _explained_build(jit: SimpleNamespace, variant: EtapMlaVariant) -> Iterator[None]:
    """Check the tools, aim FlashInfer at Hopper, and say what to do when a build fails."""
    cuda_home = _check_build_tools(jit)
    try:
        with _hopper_target(jit):
            yield
    except EtapJitError:
        raise
    except OSError as error:
        raise EtapJitError(
            f"building {variant.name} in the JIT cache {jit.env.FLASHINFER_JIT_DIR} failed: "
            f"{error}. The cache must be writable and have room; FLASHINFER_WORKSPACE_BASE puts it "
            f"elsewhere, and modules built ahead of time ({AOT_DIR_ENV}) need none"
        ) from error
    except RuntimeError as error:
        lines = str(error).splitlines()[-_BUILD_LOG_LINES:]
        log = "\n".join(line[:_BUILD_LOG_COLUMNS] for line in lines)
        raise EtapJitError(
            f"building {variant.name} failed. The CUDA toolkit in use is {cuda_home}; set "
            "CUDA_HOME if that is not the directory that holds bin/nvcc, include and lib64. The "
            f"last lines of the build:\n{log}"
        ) from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_whole(library: Path) -> bool:
    """Whether a library is the one that a build left behind when it had ended."""
    digest = library.with_suffix(_DIGEST_SUFFIX)
    return library.is_file() and digest.is_file() and digest.read_text() == file_sha256(library)


def _note_digest(library: Path) -> None:
    partial = library.with_suffix(f"{_DIGEST_SUFFIX}.partial")
    partial.write_text(file_sha256(library))
    partial.replace(library.with_suffix(_DIGEST_SUFFIX))


@contextmanager
def _built_library(variant: EtapMlaVariant, verbose: bool) -> Iterator[Path]:
    """Compile a variant unless it is there and up to date.

    FlashInfer's lock on the module is held until the context ends, so that no process loads what
    another is still writing.
    """
    from filelock import FileLock

    jit = _flashinfer_jit()
    with _explained_build(jit, variant):
        spec = gen_etap_mla_module(variant)
        library = Path(spec.jit_library_path)
        with FileLock(spec.lock_path, thread_local=False):
            # Ninja trusts what its log says it has finished, but a crash, or a disk that was full,
            # may have left less than that of a library and of the object file it was linked from.
            if not _is_whole(library):
                shutil.rmtree(spec.build_dir, ignore_errors=True)
            spec.build(verbose=verbose, need_lock=False)
            _note_digest(library)
            yield library


def build_etap_mla_module(variant: EtapMlaVariant, verbose: bool = False) -> Path:
    """Compile a variant for sm_90a; needs nvcc and flashinfer, but no GPU.

    Parameters
    ----------
    variant : EtapMlaVariant
    verbose : bool
        Whether the compiler's output goes to stdout as it comes.

    Returns
    -------
    Path
        The shared library, in FlashInfer's cache.

    Raises
    ------
    EtapJitError
        If flashinfer, nvcc or ninja is missing, the cache can't be written or the build fails.
    """
    with _built_library(variant, verbose) as library:
        return library


def compile_command(variant: EtapMlaVariant) -> list[str]:
    """The nvcc command that compiles a variant's object file, for tools that look into it."""
    jit = _flashinfer_jit()
    with _explained_build(jit, variant):
        spec = gen_etap_mla_module(variant)
        return shlex.split(spec.get_compile_commands()[0]["command"])


def require_hopper() -> None:
    """Check that one of the visible devices is a Hopper GPU.

    Raises
    ------
    EtapJitError
        If none is; the message says what each of them is.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]
    refusals = [dispatch.etap_device_refusal(device) for device in devices]
    if None not in refusals:
        raise EtapJitError(
            f"the ETAP kernel can't be loaded here: {'; '.join(map(str, refusals))}. Use "
            "backend='auto' or 'reference'; `python -m etap_flashinfer.aot` compiles without a GPU"
        )


def aot_library_path(variant: EtapMlaVariant, directory: Path) -> Path:
    """Path of a variant's module in a directory of modules built ahead of time.

    Raises
    ------
    EtapJitError
        If the directory has no readable manifest, was built from other sources, or lacks the
        variant, or if the library is not the one that the manifest names.
    """
    rebuild = f"run `python -m etap_flashinfer.aot --out {directory}` with this version"
    try:
        manifest = json.loads((directory / AOT_MANIFEST).read_text())
        built_from, libraries = manifest["csrc_sha256"], manifest["modules"]
        digests = manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EtapJitError(
            f"{AOT_DIR_ENV}={directory} holds no readable {AOT_MANIFEST} "
            f"({type(error).__name__}: {error}): {rebuild}, or unset {AOT_DIR_ENV} to compile"
        ) from error
    if built_from != csrc_sha256():
        raise EtapJitError(
            f"the modules in {AOT_DIR_ENV}={directory} were built from other sources (csrc_sha256 "
            f"{built_from}) than this package's ({csrc_sha256()}): {rebuild}"
        )
    path = directory / f"{variant.name}.so"
    if variant.short_name not in libraries or not path.is_file():
        raise EtapJitError(
            f"{AOT_DIR_ENV}={directory} lacks {variant.short_name}; it lists "
            f"{', '.join(libraries) or 'no variant'}: {rebuild}"
        )
    if digests.get(path.name) != file_sha256(path):
        raise EtapJitError(
            f"{path} is not the library that {AOT_MANIFEST} names: cut off, or of another build: "
            f"{rebuild}"
        )
    return path


def _load_library(path: Path) -> Any:
    try:
        import tvm_ffi

        return tvm_ffi.load_module(str(path))
    except Exception as error:  # tvm_ffi raises its own types for what dlopen reports
        raise EtapJitError(
            f"{path} does not load: {type(error).__name__}: {error}. It needs apache-tvm-ffi and "
            "the CUDA runtime in the versions it was built with, or compatible ones"
        ) from error


@functools.cache
def _load_module(variant: EtapMlaVariant, aot_dir: str | None) -> Any:
    if aot_dir:
        return _load_library(aot_library_path(variant, Path(aot_dir)))
    verbose = os.environ.get("FLASHINFER_JIT_VERBOSE") == "1"
    with _built_library(variant, verbose) as library:
        return _load_library(library)


def argument_converter() -> Callable[[torch.Tensor], Any]:
    """The function that turns a tensor into what a kernel takes without converting it itself.

    It pays for tensors that are given to many calls: a kernel converts each ``torch.Tensor`` at
    every call, 70 to 90 ns. The ``tvm_ffi.Tensor`` keeps the storage, but where the tensor is given
    other memory (``resize_``, ``set_``) it does not follow. At least one argument must remain a
    ``torch.Tensor``: from it a kernel learns PyTorch's current stream.
    """
    import tvm_ffi

    converter: Callable[[torch.Tensor], Any] = tvm_ffi.from_dlpack
    return converter


def get_etap_mla_module(variant: EtapMlaVariant) -> Any:
    """Load a variant, compiling it first where that has not been done.

    Parameters
    ----------
    variant : EtapMlaVariant

    Returns
    -------
    tvm_ffi.Module
        With the functions ``run``, ``workspace_bytes``, ``kept_bytes`` and
        ``fixed_split_workspace_bytes``; the same object on every call.

    Raises
    ------
    EtapJitError
        If there is no Hopper GPU, or the module can't be compiled or loaded.
    """
    require_hopper()
    return _load_module(variant, os.environ.get(AOT_DIR_ENV))
