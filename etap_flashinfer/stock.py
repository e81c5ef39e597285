"""Stock FlashInfer, imported when it is first needed."""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

BACKENDS = ("fa2", "fa3", "cutlass")


def import_failure(error: Exception, use: str, instead: str) -> str:
    """Say why importing flashinfer failed and what to do.

    Parameters
    ----------
    error : Exception
        What the import raised.
    use : str
        What needs flashinfer.
    instead : str
        What works without it, as an imperative.
    """
    if isinstance(error, ModuleNotFoundError) and error.name == "flashinfer":
        return (
            f"{use} needs flashinfer, which is not installed: pip install "
            f"'etap-flashinfer[flashinfer]', or {instead}"
        )
    if isinstance(error, OSError):
        return (
            f"{use} needs flashinfer, which writes to its cache directory when it is imported, and "
            f"that failed: {error}. Set FLASHINFER_WORKSPACE_BASE to a directory that is writable "
            f"and has room, or {instead}"
        )
    return (
        f"{use} needs flashinfer, which is installed but does not import: "
        f"{type(error).__name__}: {error}. FlashInfer 0.6.14 beside nvidia-cutlass-dsl does not "
        "import on a machine without a GPU: use flashinfer-python 0.7.2.post1 or later there, or "
        f"{instead}"
    )


def import_flashinfer_mla() -> Any:
    """Import ``flashinfer.mla``.

    Raises
    ------
    ImportError
        If flashinfer is missing or does not import; the message says what to do.
    """
    try:
        return importlib.import_module("flashinfer.mla")
    except Exception as error:  # a broken dependency raises anything, not only ImportError
        instead = "use backend='etap' (Hopper) or 'reference'"
        raise ImportError(import_failure(error, "a stock backend", instead)) from error


def make_wrapper(
    workspace: torch.Tensor, use_cuda_graph: bool, buffers: tuple[Any, ...], backend: str
) -> Any:
    """Make ``flashinfer.mla.BatchMLAPagedAttentionWrapper`` with the caller's own arguments."""
    return import_flashinfer_mla().BatchMLAPagedAttentionWrapper(
        workspace, use_cuda_graph, *buffers, backend=backend
    )


@functools.cache
def _parameter_names(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def call(method: Any, arguments: dict[str, Any]) -> Any:
    """Call ``plan`` or ``run`` of the stock wrapper with the arguments the caller gave.

    Raises
    ------
    TypeError
        If the installed FlashInfer is older than one of the arguments.
    """
    known = _parameter_names(method.__func__)
    unknown = [name for name in arguments if name not in known]
    if unknown:
        version = importlib.import_module("flashinfer").__version__
        raise TypeError(
            f"{method.__name__}() of the installed flashinfer {version} does not take "
            f"{', '.join(unknown)}"
        )
    return method(**arguments)
