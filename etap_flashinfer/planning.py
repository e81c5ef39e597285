"""What ``plan`` is given, checked, and what it leaves for ``run``."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import cache_format, dispatch, validation
from .validation import Problem

# qo_indptr, kv_indptr, kv_indices, kv_len_arr
IndexTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
# dtype, row tile, loader, cache
VariantKey = tuple[torch.dtype, int, dispatch.KvLoader, dispatch.KvCache]


PLAN_DEFAULTS: dict[str, Any] = {
    "use_profiler": False,
    "cum_seq_lens_q": None,
    "block_tables": None,
    "seq_lens": None,
    "max_q_len": None,
    "query_layout": None,
    "kv_cache_layout": None,
    "lse_mode": "none",
    "output_dtype": None,
    "output_scale": "none",
    "scale_mode": "default",
    "skip_softmax": False,
    "enable_pdl": None,
    "use_sinks": False,
}


@dataclass
class CheckedCall:
    """Inputs of ``run`` that passed the checks, and what follows from their layout.

    Most calls have the layouts of the one before, and the checks take as long as the launch.
    """

    layout: validation.Layout
    out_shape: tuple[int, int, int]
    kernel: Callable[..., None] | None = None  # found by the first launch
    # Of the caller's buffers that passed the checks.
    out_layout: validation.Layout | None = None
    lse_layout: validation.Layout | None = None


@dataclass
class Plan:
    """What ``plan`` leaves for ``run``."""

    problem: Problem
    lse_mode: str
    index: IndexTensors
    batch_size: int
    # Known if qo_indptr came from the CPU to a workspace elsewhere: a copy, which nobody changes.
    total_queries: int | None
    max_query_len: int | None
    # Of problem, if nothing but index tensors was given beside it; equal in plans of the same.
    problem_key: tuple[Any, ...] | None = None
    # What run() found out, for the runs that follow; and the kernel for a query length and is_long,
    # which plans of the same problem share.
    checked_call: CheckedCall | None = None
    kernels: dict[tuple[int, bool], Callable[..., None]] = field(default_factory=dict)
    fixed_split_tiles: int = field(init=False)  # of a part in batch-invariant calls; 0 in others
    is_long: bool = field(init=False)  # dispatch.counts_as_long() of the room in kv_indices

    def __post_init__(self) -> None:
        problem = self.problem
        pages = problem.fixed_split_size or 0
        self.fixed_split_tiles = pages * problem.page_size // dispatch.TOKEN_TILE
        num_rows = problem.num_heads * (self.max_query_len or 1)
        num_tokens = self.index[2].numel() * problem.page_size
        self.is_long = dispatch.counts_as_long(num_tokens, num_rows)

    def take_over(self, other: "Plan") -> None:
        """Take what a plan of the same problem found out."""
        self.kernels = other.kernels
        for size in ("batch_size", "total_queries", "max_query_len", "is_long"):
            if getattr(self, size) != getattr(other, size):
                return
        self.checked_call = other.checked_call


def given_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options that differ from their defaults."""
    return {
        name: value
        for name, value in options.items()
        if value is not PLAN_DEFAULTS[name]
        and (isinstance(value, torch.Tensor) or value != PLAN_DEFAULTS[name])
    }


def checked_problem(
    arguments: dict[str, Any], kv_cache_format: Any, fixed_split_size: Any
) -> Problem:
    """The arguments of ``plan`` that are not tensors, checked.

    Raises
    ------
    ValueError, TypeError
        For what no backend but a forced stock one could serve.
    """
    missing = [name for name, value in arguments.items() if value is None]
    if missing:
        raise TypeError(f"plan() is missing {', '.join(missing)}")
    problem = Problem(
        **arguments, kv_cache_format=kv_cache_format, fixed_split_size=fixed_split_size
    )
    validation.check_problem(problem)
    problem.sm_scale = float(problem.sm_scale)
    problem.kv_cache_format = cache_format.resolve(problem.kv_data_type, kv_cache_format)
    cache_format.check_head_dims(problem)
    return problem


def problem_key(problem: dict[str, Any], *others: Any) -> tuple[Any, ...]:
    """Equal for equal problems: types first, so that a tensor is not compared with a number."""
    values = (*problem.values(), *others)
    return (*map(type, values), *values)


def refusal_of(
    problem: Problem, metadata: Any, options: dict[str, Any], for_etap: bool
) -> str | None:
    """Say why ETAP, or the reference, can't serve a plan that stock FlashInfer may; else None."""
    if metadata is not None and getattr(metadata, "qo_indptr", None) is None:
        return "metadata holds dense page tables only; give MLAPlanMetadata.csr(...)"
    if refusal := validation.plan_option_refusal(options, problem):
        return refusal
    if for_etap:
        return dispatch.etap_problem_refusal(
            problem.num_heads,
            problem.head_dim_ckv,
            problem.head_dim_kpe,
            problem.q_data_type,
            problem.kv_data_type,
        )
    validation.check_reference_dtypes(problem)
    return None


def refuse_fixed_split(fixed_split_size: Any, backend: str, reason: str | None) -> None:
    """Refuse ``fixed_split_size`` with the stock backends, saying why it is not ETAP."""
    if fixed_split_size is not None:
        why = "" if reason is None else f" (for ETAP: {reason})"
        raise ValueError(
            f"fixed_split_size is {fixed_split_size}, which backend {backend!r} does not take"
            f"{why}; backends 'etap' and 'reference' do"
        )


def variant_key(problem: Problem, query_len: int, is_long: bool = True) -> VariantKey:
    """Choose the variant that serves requests of ``query_len`` queries best.

    That of batch-invariant calls is the one for a single query and long requests, so that other
    requests have no say.
    """
    kv_cache = dispatch.KV_CACHE_OF_FORMAT[problem.kv_cache_format]
    if problem.fixed_split_size is not None:
        query_len, is_long = 1, True
    return (
        problem.q_data_type,
        dispatch.choose_row_tile(problem.num_heads, query_len, kv_cache, is_long),
        dispatch.choose_kv_loader(problem.page_size),
        kv_cache,
    )


def check_fixed_split_workspace(plan: Plan, workspace: torch.Tensor) -> None:
    """Check the workspace for a batch-invariant plan, if the queries are known; else the run does.

    It grows with queries, pages and parts, as a captured graph may find them at its replays.
    """
    if not plan.fixed_split_tiles or plan.total_queries is None:
        return
    from . import jit

    problem = plan.problem
    module = jit.get_etap_mla_module(jit.EtapMlaVariant(*variant_key(problem, query_len=1)))
    needed = module.fixed_split_workspace_bytes(
        workspace.device.index,
        plan.total_queries,
        plan.batch_size,
        problem.num_heads,
        plan.index[2].numel(),
        problem.page_size,
        plan.fixed_split_tiles,
    )
    validation.check_workspace_bytes(workspace, needed)


def csr_tensors(index: dict[str, Any], metadata: Any) -> IndexTensors:
    """The four index tensors, given one by one or in ``metadata``."""
    given = [name for name, tensor in index.items() if tensor is not None]
    if metadata is not None:
        if given:
            raise ValueError(f"plan() got both metadata and {', '.join(given)}; give one of them")
        index = {name: getattr(metadata, name, None) for name in index}
    missing = [name for name, tensor in index.items() if tensor is None]
    if missing:
        raise TypeError(f"plan() is missing {', '.join(missing)}")
    return index["qo_indptr"], index["kv_indptr"], index["kv_indices"], index["kv_len_arr"]


def make_plan(
    problem: Problem,
    lse_mode: str,
    index: IndexTensors,
    device: torch.device,
    graph_buffers: IndexTensors | None,
) -> Plan:
    """Check the index tensors and bring them to the device, or into a CUDA graph's buffers.

    Tensors on the device are kept as they are: nothing is read from them.
    """
    validation.check_index_tensors(*index, device)
    qo_indptr, kv_indptr, kv_indices, kv_len_arr = index
    batch_size = kv_len_arr.numel()
    total_queries: int | None = None
    max_query_len: int | None = None
    if qo_indptr.is_cpu:
        total_queries, max_query_len = validation.query_extent(qo_indptr, batch_size)
    if kv_indptr.is_cpu and kv_len_arr.is_cpu:
        validation.check_page_values(kv_indptr, kv_indices, kv_len_arr, problem.page_size)
    if device.type == "cpu":
        # On a CPU workspace the tensors are referenced: the caller may change them in place.
        total_queries = max_query_len = None
    if batch_size == 0:
        total_queries = 0
    if graph_buffers is None:
        kept = [t if t.device == device else t.to(device, non_blocking=True) for t in index]
        index = (kept[0], kept[1], kept[2], kept[3])
    else:
        _copy_to_graph_buffers(index, graph_buffers)
        index = graph_buffers
    return Plan(problem, lse_mode, index, batch_size, total_queries, max_query_len)


def _copy_to_graph_buffers(index: IndexTensors, buffers: IndexTensors) -> None:
    batch_size, num_pages = index[3].numel(), index[2].numel()
    validation.check_fits_graph_buffers(batch_size, num_pages, buffers)
    lengths = (batch_size + 1, batch_size + 1, num_pages, batch_size)
    targets, sources = [], []
    for buffer, given, length in zip(buffers, index, lengths, strict=True):
        if buffer.data_ptr() != given.data_ptr():  # else the caller wrote into the buffer
            targets.append(buffer[:length])
            sources.append(given[:length])
    if targets:
        # One launch for all four where they are on the GPU already.
        torch._foreach_copy_(targets, sources, non_blocking=True)
