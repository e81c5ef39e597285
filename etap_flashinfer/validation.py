"""Checks of what callers pass to the wrapper: each error says what was given and what is allowed.

The checks of tensors run on every ``plan`` or ``run``, so they compare attributes in one pass and
put together a message only when one of them differs. None of them copies from a GPU.
"""

import math
import numbers
from dataclasses import dataclass
from typing import Any

import torch

from .dispatch import TOKEN_TILE, pages_of_smallest_part

# What the checks of a tensor of ``run``, or of several, look at; empty for what is no tensor.
Layout = tuple[Any, ...]
ALIGNMENT_BYTES = 16
STRIDE_ELEMENTS = 8
REFERENCE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LSE_MODES = ("none", "base2", "basee")
LAYOUTS = (None, "packed", "split")


@dataclass
class Problem:
    """The arguments of ``plan`` that are not tensors and that every backend needs."""

    num_heads: int
    head_dim_ckv: int
    head_dim_kpe: int
    page_size: int
    causal: bool
    sm_scale: float
    q_data_type: torch.dtype
    kv_data_type: torch.dtype
    kv_cache_format: str | None = None  # of an fp8 cache: see cache_format.KvCacheFormat
    fixed_split_size: int | None = None  # pages


def check_workspace(workspace: Any) -> None:
    """Check what holds for the workspace of every backend."""
    if not isinstance(workspace, torch.Tensor):
        raise TypeError(
            f"float_workspace_buffer is a {type(workspace).__name__}; it must be a torch.Tensor"
        )
    if not workspace.is_contiguous():
        raise ValueError(
            f"float_workspace_buffer has shape {list(workspace.shape)} and strides "
            f"{list(workspace.stride())}; it must be contiguous"
        )


def check_workspace_bytes(workspace: torch.Tensor, needed: int) -> None:
    """Check size and alignment of the workspace, viewed as bytes, for the ETAP kernel."""
    if workspace.numel() < needed:
        raise ValueError(
            f"float_workspace_buffer has {workspace.numel()} bytes; the ETAP kernel needs {needed} "
            f"on {workspace.device}"
        )
    if workspace.data_ptr() % ALIGNMENT_BYTES:
        raise ValueError(
            f"float_workspace_buffer starts at address {workspace.data_ptr():#x}; it must be a "
            f"multiple of {ALIGNMENT_BYTES} bytes"
        )


def check_problem(problem: Problem) -> None:
    """Check types and ranges that hold for every backend."""
    for name, lowest in (
        ("num_heads", 1),
        ("head_dim_ckv", 1),
        ("head_dim_kpe", 0),
        ("page_size", 1),
    ):
        value = getattr(problem, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; it must be an int")
        if value < lowest:
            raise ValueError(f"{name} is {value}; it must be at least {lowest}")
    if not isinstance(problem.causal, bool):
        raise TypeError(f"causal is {problem.causal!r}; it must be True or False")
    if not isinstance(problem.sm_scale, numbers.Real) or isinstance(problem.sm_scale, bool):
        raise TypeError(f"sm_scale is {problem.sm_scale!r}; it must be a float")
    if not math.isfinite(problem.sm_scale):
        raise ValueError(f"sm_scale is {problem.sm_scale}; it must be finite")
    for name in ("q_data_type", "kv_data_type"):
        value = getattr(problem, name)
        if not isinstance(value, torch.dtype):
            raise TypeError(f"{name} is {value!r}; it must be a torch.dtype")
    check_fixed_split_size(problem.fixed_split_size, problem.page_size)


def check_fixed_split_size(pages: Any, page_size: int) -> None:
    """Check that parts are whole token tiles."""
    if pages is None:
        return
    if not isinstance(pages, int) or isinstance(pages, bool):
        raise TypeError(f"fixed_split_size is {pages!r}; it must be an int or None")
    if pages < 1 or pages * page_size % TOKEN_TILE:
        step = pages_of_smallest_part(page_size)
        raise ValueError(
            f"fixed_split_size is {pages} pages of {page_size} tokens; it must be a positive "
            f"multiple of {step} pages: parts are multiples of {TOKEN_TILE} tokens"
        )


def check_reference_dtypes(problem: Problem) -> None:
    """Check the data types that the reference backend computes with."""
    for name, allowed in (
        ("q_data_type", REFERENCE_DTYPES),
        ("kv_data_type", (*REFERENCE_DTYPES, torch.float8_e4m3fn)),
    ):
        if getattr(problem, name) not in allowed:
            raise ValueError(
                f"backend 'reference': {name} is {getattr(problem, name)}; allowed: "
                f"{', '.join(map(str, allowed))}"
            )


def check_index_tensors(
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_len_arr: torch.Tensor,
    device: torch.device,
) -> None:
    """Check the four index tensors by their attributes: int32, one-dimensional, long enough."""
    check_index_tensor("qo_indptr", qo_indptr, device)
    check_index_tensor("kv_indptr", kv_indptr, device)
    check_index_tensor("kv_indices", kv_indices, device)
    check_index_tensor("kv_len_arr", kv_len_arr, device)
    batch_size = kv_len_arr.numel()
    for name, tensor in (("qo_indptr", qo_indptr), ("kv_indptr", kv_indptr)):
        if tensor.numel() <= batch_size:
            raise ValueError(
                f"{name} has {tensor.numel()} elements; kv_len_arr gives a batch of {batch_size}, "
                f"so at least {batch_size + 1} are needed"
            )


def check_index_tensor(name: str, tensor: Any, device: torch.device) -> None:
    """Check one index tensor by its attributes; it may lie on the CPU or on ``device``."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
    if tensor.dtype != torch.int32:
        raise ValueError(f"{name}.dtype is {tensor.dtype}; it must be torch.int32")
    if tensor.ndim != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"{name} has shape {list(tensor.shape)} and strides {list(tensor.stride())}; it must "
            "be one-dimensional and contiguous"
        )
    if tensor.device != device and not tensor.is_cpu:
        raise ValueError(
            f"{name} is on {tensor.device}; it must be on the workspace's device, {device}, or on "
            "the CPU"
        )


def query_extent(qo_indptr: torch.Tensor, batch_size: int) -> tuple[int, int]:
    """Check the query offsets, on the CPU; return total queries and the longest request's."""
    offsets = qo_indptr[: batch_size + 1].long()  # differences of int32 could wrap around
    if int(offsets[0]) != 0:
        raise ValueError(f"qo_indptr starts at {int(offsets[0])}; it must start at 0")
    if batch_size == 0:
        return 0, 0
    lengths = offsets.diff()
    shortest = int(lengths.min())
    if shortest < 0:
        request = int(lengths.argmin())
        raise ValueError(
            f"qo_indptr falls from {int(offsets[request])} to {int(offsets[request + 1])} at "
            f"request {request}; it must not decrease"
        )
    return int(offsets[-1]), int(lengths.max())


def check_page_values(
    kv_indptr: torch.Tensor, kv_indices: torch.Tensor, kv_len_arr: torch.Tensor, page_size: int
) -> None:
    """Check page offsets and lengths, both on the CPU, against each other and ``kv_indices``."""
    batch_size = kv_len_arr.numel()
    if batch_size == 0:
        return
    offsets = kv_indptr[: batch_size + 1].long()
    lengths = kv_len_arr.long()
    pages = offsets.diff()
    if int(lengths.min()) < 0:
        request = int(lengths.argmin())
        raise ValueError(
            f"kv_len_arr is {int(lengths[request])} for request {request}; it must be at least 0"
        )
    if int(offsets[0]) < 0 or int(pages.min()) < 0:
        raise ValueError(
            f"kv_indptr starts at {int(offsets[0])} and has differences down to "
            f"{int(pages.min())}; it must start at 0 or above and must not decrease"
        )
    if int(offsets[-1]) > kv_indices.numel():
        raise ValueError(
            f"kv_indptr ends at {int(offsets[-1])}; kv_indices has only {kv_indices.numel()} "
            "elements"
        )
    excess = lengths - pages * page_size
    if int(excess.max()) > 0:
        request = int(excess.argmax())
        raise ValueError(
            f"kv_len_arr is {int(lengths[request])} for request {request}, whose "
            f"{int(pages[request])} pages of {page_size} tokens hold "
            f"{int(pages[request]) * page_size}"
        )


def checked_graph_buffers(
    qo_indptr: Any, kv_indptr: Any, kv_indices: Any, kv_len_arr: Any, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Check and return the caller's buffers of a CUDA graph: all given, int32, on the device."""
    buffers = {
        "qo_indptr": qo_indptr,
        "kv_indptr": kv_indptr,
        "kv_indices": kv_indices,
        "kv_len_arr": kv_len_arr,
    }
    missing = [name for name, buffer in buffers.items() if buffer is None]
    if missing:
        raise ValueError(
            f"use_cuda_graph=True needs the buffers {', '.join(buffers)}; missing: "
            f"{', '.join(missing)}"
        )
    check_index_tensors(qo_indptr, kv_indptr, kv_indices, kv_len_arr, device)
    for name, buffer in buffers.items():
        if buffer.device != device:
            raise ValueError(
                f"the CUDA-graph buffer {name} is on {buffer.device}; it must be on the "
                f"workspace's device, {device}"
            )
    return qo_indptr, kv_indptr, kv_indices, kv_len_arr


def check_fits_graph_buffers(
    batch_size: int, num_pages: int, buffers: tuple[torch.Tensor, ...]
) -> None:
    """Check that a plan fits the buffers of a captured graph."""
    kv_indices, kv_len_arr = buffers[2], buffers[3]
    if batch_size != kv_len_arr.numel():
        raise ValueError(
            f"kv_len_arr has {batch_size} elements; the CUDA-graph buffer was made for a batch of "
            f"{kv_len_arr.numel()}, which cannot change (pad with requests of length 0)"
        )
    if num_pages > kv_indices.numel():
        raise ValueError(
            f"kv_indices has {num_pages} elements; the CUDA-graph buffer holds {kv_indices.numel()}"
        )


def plan_option_refusal(options: dict[str, Any], problem: Problem) -> str | None:
    """Say which of plan's optional arguments only stock FlashInfer serves; None if none of them.

    Parameters
    ----------
    options : dict
        The optional arguments that differ from their defaults.
    problem : Problem
        ``q_data_type`` is the only output type allowed.
    """
    for name, value in options.items():
        if name in ("query_layout", "kv_cache_layout"):
            if value not in LAYOUTS:
                raise ValueError(f"{name} is {value!r}; allowed: 'packed', 'split'")
        elif name == "lse_mode":
            if value not in LSE_MODES:
                raise ValueError(f"lse_mode is {value!r}; allowed: {', '.join(LSE_MODES)}")
        elif name == "output_dtype":
            if value != problem.q_data_type:
                return f"output_dtype is {value}; allowed: q_data_type, {problem.q_data_type}"
        elif name == "scale_mode" and value == "kv-per-tensor":
            if problem.kv_cache_format != "fp8_e4m3":
                return f"scale_mode is {value!r}, which needs kv_cache_format 'fp8_e4m3'"
        elif name == "enable_pdl":
            if value is not False:
                return f"enable_pdl is {value!r}; allowed: None or False"
        elif isinstance(value, torch.Tensor):
            return f"{name} (dense page tables) is not supported; give qo_indptr and the others"
        else:
            return f"{name} is {value!r}, which is not supported; leave it out"
    return None


# Arguments of ``run`` that only stock FlashInfer's backends take, and which of them.
STOCK_RUN_OPTIONS = {
    "profiler_buffer": "a plan of backend 'fa2' or 'fa3' with use_profiler=True",
    "kv_len": "backend='cutlass'",
    "page_table": "backend='cutlass'",
    "o_scale": "backend='cutlass'",
    "ckv_scale_arr": "backend='fa3' with an fp8 cache",
    "sinks": "a stock FlashInfer backend planned with use_sinks=True",
    "skip_softmax_threshold_scale_factor": "a stock FlashInfer backend planned for it",
    "bmm1_scale": "a stock FlashInfer backend planned for it",
    "bmm2_scale": "a stock FlashInfer backend planned for it",
}


def check_run_options(backend: str, options: tuple[Any, ...]) -> None:
    """Refuse the arguments of ``run`` named in ``STOCK_RUN_OPTIONS``, given in its order."""
    for value in options:  # names are looked up when one of them is needed
        if value is not None:
            named = zip(STOCK_RUN_OPTIONS.items(), options, strict=True)
            name, taker = next(item for item, given in named if given is not None)
            raise ValueError(
                f"{name} was given, which backend {backend!r} does not support; only {taker} "
                "takes it"
            )


def split_packed(name: str, value: Any, head_dim_ckv: int, head_dim_kpe: int) -> tuple[Any, Any]:
    """Split ``query`` or ``kv_cache``, a packed tensor or a pair, into its two parts."""
    if isinstance(value, tuple) and len(value) == 2:
        return value
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{name} is a {type(value).__name__}; it must be a packed torch.Tensor or a pair of "
            "tensors"
        )
    if value.ndim != 3 or value.shape[2] != head_dim_ckv + head_dim_kpe:
        raise ValueError(
            f"{name} has shape {list(value.shape)}; planned: three dimensions, the last of "
            f"{head_dim_ckv} + {head_dim_kpe} elements"
        )
    return value[:, :, :head_dim_ckv], value[:, :, head_dim_ckv:]


def check_tensor(
    name: str,
    tensor: Any,
    leading: str,
    trailing: tuple[int, int],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Check type, dtype, device and the last two of the three dimensions of an input of ``run``.

    ``leading`` names the first dimension in the message.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
    if tensor.dtype not in dtypes:
        planned = " or ".join(map(str, dtypes))
        raise ValueError(f"{name}.dtype is {tensor.dtype}; planned: {planned}")
    if tensor.device != device:
        raise ValueError(
            f"{name} is on {tensor.device}; it must be on the workspace's device, {device}"
        )
    if tensor.ndim != 3 or tensor.shape[1:] != trailing:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}; planned: "
            f"[{leading}, {trailing[0]}, {trailing[1]}]"
        )


def layout_of(tensor: Any) -> Layout:
    """All that the checks of ``out`` or ``lse`` look at; tensors of equal layouts pass alike."""
    try:
        misalignment = tensor.data_ptr() % ALIGNMENT_BYTES
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, misalignment
    except AttributeError:
        return ()


def layout_of_inputs(inputs: tuple[Any, Any, Any, Any]) -> Layout:
    """All that the checks of the inputs of ``run`` look at.

    The shape of ``q_nope`` comes first. Every run pays for this; a loop would take a third longer.
    """
    a, b, c, d = inputs
    try:
        if d is None:  # the cache is one tensor, as in FlashMLA's layout
            addresses = a.data_ptr() | b.data_ptr() | c.data_ptr()
            return (
                *(a.shape, a.stride(), a.dtype, a.device),
                *(b.shape, b.stride(), b.dtype, b.device),
                *(c.shape, c.stride(), c.dtype, c.device),
                addresses % ALIGNMENT_BYTES,
            )
        addresses = a.data_ptr() | b.data_ptr() | c.data_ptr() | d.data_ptr()
        return (
            *(a.shape, a.stride(), a.dtype, a.device),
            *(b.shape, b.stride(), b.dtype, b.device),
            *(c.shape, c.stride(), c.dtype, c.device),
            *(d.shape, d.stride(), d.dtype, d.device),
            addresses % ALIGNMENT_BYTES,
        )
    except AttributeError:
        return ()


def check_queries(q_nope: Any, q_pe: Any, problem: Problem, device: torch.device) -> None:
    """Check the queries against what was planned."""
    heads, dtypes = problem.num_heads, (problem.q_data_type,)
    nope, pe = (heads, problem.head_dim_ckv), (heads, problem.head_dim_kpe)
    check_tensor("q_nope", q_nope, "total queries", nope, dtypes, device)
    check_tensor("q_pe", q_pe, "total queries", pe, dtypes, device)
    if q_pe.shape[0] != q_nope.shape[0]:
        raise ValueError(f"q_pe holds {q_pe.shape[0]} queries, q_nope {q_nope.shape[0]}")


def check_total_queries(given: int, planned: int | None) -> None:
    """Check the number of queries where the plan knows it."""
    if planned is not None and given != planned:
        raise ValueError(
            f"q_nope holds {given} queries; planned: {planned} (the end of qo_indptr); call plan "
            "again"
        )


def check_kernel_queries(q_nope: torch.Tensor, q_pe: torch.Tensor) -> None:
    """Check what the ETAP kernel needs of the queries beyond what was planned."""
    check_kernel_layout("q_nope", q_nope, STRIDE_ELEMENTS, ALIGNMENT_BYTES)
    check_kernel_layout("q_pe", q_pe, STRIDE_ELEMENTS, ALIGNMENT_BYTES)


def check_kernel_layout(
    name: str, tensor: torch.Tensor, stride_elements: int, alignment_bytes: int
) -> None:
    """Check strides and alignment that the kernel's vector accesses and TMA copies need."""
    first, second, last = tensor.stride()
    if last != 1:
        raise ValueError(
            f"{name} has strides {[first, second, last]}; the last dimension must be contiguous"
        )
    if first % stride_elements or second % stride_elements:
        for size, stride in zip(tensor.shape[:2], (first, second), strict=True):
            if size > 1 and stride % stride_elements:  # of one element, the stride means nothing
                raise ValueError(
                    f"{name} has strides {[first, second, last]}; all but the last must be "
                    f"multiples of {stride_elements} elements"
                )
    if tensor.data_ptr() % alignment_bytes:
        raise ValueError(
            f"{name} starts at address {tensor.data_ptr():#x}; it must be a multiple of "
            f"{alignment_bytes} bytes"
        )


def check_result(
    name: str, tensor: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Check a caller's ``out`` or ``lse``."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; it must be {dtype} "
            f"{list(shape)} on {device}"
        )
    if any(size > 1 and stride == 0 for size, stride in zip(shape, tensor.stride(), strict=True)):
        raise ValueError(
            f"{name} has strides {list(tensor.stride())}; its elements must not share memory"
        )


def check_out(out: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Check a caller's ``out``."""
    check_result("out", out, shape, dtype, device)
    check_kernel_layout("out", out, STRIDE_ELEMENTS, ALIGNMENT_BYTES)


def check_lse(lse: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """Check a caller's ``lse``."""
    check_result("lse", lse, shape, torch.float32, device)
    if not lse.is_contiguous():
        raise ValueError(f"lse has strides {list(lse.stride())}; it must be contiguous")


def check_lse_mode(planned: str, base_e: bool) -> None:
    """Check the base of the log-sum-exp against the one planned, if one was."""
    wanted = "basee" if base_e else "base2"
    if planned not in ("none", wanted):
        raise ValueError(
            f"return_lse_base_on_e={base_e} asks for lse_mode {wanted!r}; planned: {planned!r}"
        )
