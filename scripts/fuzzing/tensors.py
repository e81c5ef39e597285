"""The tensors of a case: values, pages, memory layouts, and poison wherever nobody may look."""

from __future__ import annotations

import dataclasses
import math
import unittest.mock
from typing import Any

import torch

from etap_flashinfer import dispatch, quantization

from .cases import DTYPES, Case, Layout

TORCH_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "flashmla_656": quantization.FP8_DTYPE,
    "fp8_e4m3": quantization.FP8_DTYPE,
}
HEAD_DIM_CKV, HEAD_DIM_KPE = 512, 64
HEAD_DIM = HEAD_DIM_CKV + HEAD_DIM_KPE
# Listed as pages where no length reaches.
GARBAGE = (2**31 - 1, -1, 10**9, -(2**31))
# The first column of pe carries logits of a given shape: this times the query's value there.
COLUMN = 128.0
LARGEST_FP16_QUERY = 6e4
NAN_CODE = 0x7F
# Of e4m3: the smallest subnormal number, the largest, the smallest normal one, 0; both signs. And
# the largest of all.
SMALL_CODES = (0x01, 0x81, 0x07, 0x87, 0x08, 0x88, 0x00, 0x80)
LARGEST_CODES = (0x7E, 0xFE)


@dataclasses.dataclass
class Group:
    """Requests of similar length, padded to the longest of them; all on the device."""

    rows: torch.Tensor  # [requests, most queries]: row of the queries; 0 where there is none
    is_row: torch.Tensor  # the same shape
    slots: torch.Tensor  # [requests, most tokens]: row of the pool; 0 where there is none
    q_lens: torch.Tensor  # [requests]
    kv_lens: torch.Tensor  # [requests]


@dataclasses.dataclass
class Tensors:
    """A case's tensors on one device."""

    case: Case
    queries: torch.Tensor  # [total queries, heads, 576], dense
    pool: torch.Tensor  # [slots, 576], dense: the values of the cache
    groups: list[Group]
    index: tuple[torch.Tensor, ...]  # qo_indptr, kv_indptr, kv_indices, kv_len_arr
    # q_nope, q_pe and the cache, views in the case's layouts: ckv and kpe, or one of whole tokens
    inputs: tuple[torch.Tensor, ...]
    out: torch.Tensor
    lse: torch.Tensor


@dataclasses.dataclass
class PageTable:
    """Pages of all requests, on the host."""

    entries: torch.Tensor  # kv_indices, int64, with garbage behind each request's pages
    begins: list[int]  # kv_indptr
    num_pages: int


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device; unlike a plain one it does not wait for what the GPU is doing."""
    return tensor.to(device, non_blocking=True)


def page_table(case: Case, generator: torch.Generator) -> PageTable:
    """Give each request its pages.

    "ordered" in a row, "scattered" at random; with "shared_prefix" requests begin with pages of the
    first one, and with "repeated" any page may serve any number of times.
    """
    counts = [-(-length // case.page_size) for length in case.kv_lens]
    used = sum(counts)
    spare = torch.randint(3, (len(counts),), generator=generator).tolist()
    order = torch.randperm(used + 3, generator=generator)
    if case.pages == "ordered":
        order = order.sort().values
    elif case.pages == "repeated":
        order = torch.randint(used // 2 + 1, (used + 3,), generator=generator)
    shared = [0] * len(counts)
    if case.pages == "shared_prefix":
        shared = [0] + [min(counts[0], count) for count in counts[1:]]
    parts, begins, position = [], [0], 0
    first = order[: counts[0]] if counts else order
    for index, count in enumerate(counts):
        own = order[position : position + count].clone()
        own[: shared[index]] = first[: shared[index]]
        garbage = [GARBAGE[(index + k) % len(GARBAGE)] for k in range(spare[index])]
        parts += [own, torch.tensor(garbage, dtype=torch.int64)]
        position += count
        begins.append(begins[-1] + count + spare[index])
    parts.append(torch.tensor(GARBAGE[:2]))
    return PageTable(torch.cat(parts), begins, used + 3)


def make_groups(
    q_lens: list[int] | tuple[int, ...],
    kv_lens: list[int] | tuple[int, ...],
    page_begins: list[int],
    kv_indices: torch.Tensor,
    page_size: int,
    heads: int,
    one_by_one: bool = False,
) -> list[Group]:
    """Sort requests into groups in which padding wastes little; requests without queries are out.

    ``kv_indices`` is on the device, everything else on the host. ``one_by_one`` makes a group of
    each request.
    """
    row_begins = [0]
    for count in q_lens:
        row_begins.append(row_begins[-1] + count)
    buckets: dict[tuple[int, int], list[int]] = {}
    for request, (queries, length) in enumerate(zip(q_lens, kv_lens, strict=True)):
        if queries > 0:
            key = (length.bit_length() // 3, int(queries > 2))
            buckets.setdefault((request, 0) if one_by_one else key, []).append(request)
    groups = []
    for members in buckets.values():
        most_queries = max(q_lens[request] for request in members)
        longest = max(1, max(kv_lens[request] for request in members))
        at_once = max(1, 2**25 // (most_queries * heads * longest))
        for first in range(0, len(members), at_once):
            chosen = members[first : first + at_once]
            groups.append(
                _make_group(chosen, q_lens, kv_lens, row_begins, page_begins, kv_indices, page_size)
            )
    return groups


def _make_group(
    members: list[int],
    q_lens: list[int] | tuple[int, ...],
    kv_lens: list[int] | tuple[int, ...],
    row_begins: list[int],
    page_begins: list[int],
    kv_indices: torch.Tensor,
    page_size: int,
) -> Group:
    device = kv_indices.device
    facts = [(q_lens[r], kv_lens[r], row_begins[r], page_begins[r]) for r in members]
    columns = upload(torch.tensor(facts), device).unbind(1)
    own_q_lens, own_kv_lens, first_rows, first_pages = columns
    query = torch.arange(max(q_lens[r] for r in members), device=device)
    token = torch.arange(max(1, max(kv_lens[r] for r in members)), device=device)
    is_row = query < own_q_lens[:, None]
    is_token = token < own_kv_lens[:, None]
    entry = first_pages[:, None] + token // page_size
    page = kv_indices[torch.where(is_token, entry, 0)].long()
    return Group(
        rows=torch.where(is_row, first_rows[:, None] + query, 0),
        is_row=is_row,
        slots=torch.where(is_token, page * page_size + token % page_size, 0),
        q_lens=own_q_lens,
        kv_lens=own_kv_lens,
    )


def _is_token(group: Group) -> torch.Tensor:
    return torch.arange(group.slots.shape[1], device=group.slots.device) < group.kv_lens[:, None]


def shape_logits(
    case: Case,
    queries: torch.Tensor,
    pool: torch.Tensor,
    groups: list[Group],
    generator: torch.Generator,
) -> None:
    """Give the logits of a case their shape, in place; values are float32 still.

    "normal" leaves random products; "zero" makes all logits 0; "equal" makes them equal in each
    row. The others add the case's target, of either sign in each row: "one_hot" to one token of
    each request, "sunk" to all but a few of the tokens, and "ramp" grows from token to token.
    """
    if case.logits == "normal":
        return
    if case.logits in ("zero", "equal"):
        queries[..., :HEAD_DIM_CKV] = 0
        if case.logits == "zero":
            queries.zero_()
        else:
            pool[:, HEAD_DIM_CKV:] = pool[0, HEAD_DIM_CKV:].clone()
        return
    largest = COLUMN
    if case.kv_dtype == "fp8_e4m3":
        largest_code_value = quantization.FP8_MAX * case.fp8.kpe_scale
        largest = min(largest, largest_code_value * 2.0**-case.fp8.kpe_exponent)
    column = torch.zeros(pool.shape[0], device=pool.device)
    if case.logits == "sunk":
        kept = torch.rand(column.shape, generator=generator, device=column.device) < 0.02
        column = torch.where(kept, 0.0, largest)
    for group in groups if case.logits != "sunk" else ():
        # Pages may be shared, so the order of writes must not matter: the largest value stays.
        token = torch.arange(group.slots.shape[1], device=column.device)
        lengths = group.kv_lens[:, None]
        value = (token + 1) / lengths * largest
        if case.logits == "one_hot":
            chosen = torch.randint(2**31, lengths.shape, generator=generator, device=column.device)
            value = torch.where(token == chosen % lengths.clamp(min=1), largest, 0.0)
        value = torch.where(_is_token(group), value, 0.0)
        column.scatter_reduce_(0, group.slots.flatten(), value.flatten(), "amax")
    pool[:, HEAD_DIM_CKV] = column
    sign = torch.randint(2, queries.shape[:2], generator=generator, device=queries.device) * 2 - 1
    slope = case.logit_target / (case.sm_scale * largest) if case.sm_scale else 0.0
    queries[..., HEAD_DIM_CKV] = sign * min(abs(slope), 3e4) * math.copysign(1.0, slope)


def spread_values(case: Case, pool: torch.Tensor, generator: torch.Generator) -> None:
    """Bring ckv to sizes that lie decades apart, over tokens or over columns, in place."""
    count = {"tokens_apart": pool.shape[0], "columns_apart": HEAD_DIM_CKV}.get(case.fp8.pattern)
    if count is None:
        return
    exponents = torch.randint(15, (count,), generator=generator, device=pool.device)
    factors = torch.exp2(-exponents.float())
    is_over_tokens = case.fp8.pattern == "tokens_apart"
    pool[:, :HEAD_DIM_CKV] *= factors[:, None] if is_over_tokens else factors


def special_codes(case: Case, codes: torch.Tensor, generator: torch.Generator) -> None:
    """Put codes from the ends of e4m3 in the place of some of ckv, in place.

    The largest only where they are not so much larger than the others that logits would be beyond
    what float32 can tell apart.
    """
    if case.fp8.pattern != "special":
        return
    largest = quantization.FP8_MAX * case.fp8.ckv_scale * 2.0**-case.ckv_exponent
    chosen = SMALL_CODES + (LARGEST_CODES if largest < 16 else ())
    ckv = codes.view(torch.uint8)[:, :HEAD_DIM_CKV]
    kind = torch.randint(50 * len(chosen), ckv.shape, generator=generator, device=ckv.device)
    for number, code in enumerate(chosen):
        ckv.masked_fill_(kind == number, code)


def _codes(
    case: Case, pool: torch.Tensor, is_seen: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and codes of a cache of e4m3; NaN where no request looks."""
    scales = case.fp8.ckv_scale, case.fp8.kpe_scale
    codes = quantization.quantize_fp8_e4m3(pool, *scales).cache
    special_codes(case, codes, generator)
    codes.view(torch.uint8).masked_fill_(~is_seen, NAN_CODE)
    values = quantization.dequantize_fp8_e4m3(codes, *scales, torch.float64)
    return values, codes.view(torch.uint8) if case.fp8.as_bytes else codes


def _values(
    case: Case, total_queries: int, slots: int, groups: list[Group], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, the pool's values and the pool as it is stored, dense, in the case's types; poison
    where no request looks."""
    generator = torch.Generator(device).manual_seed(case.seed * 1_000_003 + case.number)
    queries = torch.randn(total_queries, case.heads, HEAD_DIM, generator=generator, device=device)
    pool = torch.randn(slots, HEAD_DIM, generator=generator, device=device)
    if case.positive_ckv:
        pool[:, :HEAD_DIM_CKV].abs_()
    shape_logits(case, queries, pool, groups, generator)
    spread_values(case, pool, generator)
    if case.ckv_exponent:
        pool[:, :HEAD_DIM_CKV] *= 2.0**case.ckv_exponent
        queries[..., :HEAD_DIM_CKV] *= 2.0**-case.ckv_exponent
    if case.fp8.kpe_exponent:
        pool[:, HEAD_DIM_CKV:] *= 2.0**case.fp8.kpe_exponent
        queries[..., HEAD_DIM_CKV:] *= 2.0**-case.fp8.kpe_exponent
        if case.dtype == "fp16":
            queries.clamp_(-LARGEST_FP16_QUERY, LARGEST_FP16_QUERY)
    queries = queries.to(TORCH_DTYPES[case.dtype])
    is_seen = torch.zeros(slots + 1, dtype=torch.bool, device=device)  # the last is for padding
    for group in groups:
        seen = torch.where(_is_token(group), group.slots, slots)
        is_seen.scatter_(0, seen.flatten(), True)
    is_seen = is_seen[:slots, None]
    if case.kv_dtype == "flashmla_656":
        packed = quantization.quantize_flashmla_656(pool).cache.masked_fill_(~is_seen, 0xFF)
        return queries, quantization.dequantize_flashmla_656(packed, torch.float64), packed
    if case.kv_dtype == "fp8_e4m3":
        return queries, *_codes(case, pool, is_seen, generator)
    pool = pool.to(TORCH_DTYPES[case.kv_dtype])
    poison = torch.tensor([math.nan, math.inf, -math.inf]).repeat(HEAD_DIM // 3)
    pool = torch.where(is_seen, pool, upload(poison.to(pool.dtype), device))
    return queries, pool, pool


def place(values: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, ...]:
    """Copy dense ``[first, second, 576]`` values into a layout; returns the views of both parts.

    Of bytes there are two for each element of the layout; ``[first, second, 656]`` are one part.
    """
    if values.dtype == quantization.FP8_DTYPE:
        return tuple(part.view(values.dtype) for part in place(values.view(torch.uint8), layout))
    if values.dtype == torch.uint8:
        layout = dataclasses.replace(layout, lead=2 * layout.lead, tail=2 * layout.tail)
    if values.shape[-1] == quantization.FLASHMLA_TOKEN_BYTES:
        return (_store(values, layout),)
    parts = (values[..., :HEAD_DIM_CKV], values[..., HEAD_DIM_CKV:])
    if not layout.fused:
        nope, pe = (_store(part, layout) for part in parts)
        return nope, pe
    if layout.pe_first:
        stored = _store(torch.cat(parts[::-1], -1), layout)
        return stored[..., HEAD_DIM_KPE:], stored[..., :HEAD_DIM_KPE]
    stored = _store(values, layout)
    return stored[..., :HEAD_DIM_CKV], stored[..., HEAD_DIM_CKV:]


def _store(values: torch.Tensor, layout: Layout) -> torch.Tensor:
    poison = 0xFF if values.dtype == torch.uint8 else math.nan
    if layout.transposed:
        values = values.transpose(0, 1)
    outer, inner, width = values.shape
    shape = (outer, inner + layout.spare_rows, layout.lead + width + layout.tail)
    stored = values.new_full(shape, poison)[:, :inner, layout.lead : layout.lead + width]
    stored.copy_(values)
    return stored.transpose(0, 1) if layout.transposed else stored


def build(case: Case, device: torch.device, one_by_one: bool = False) -> Tensors:
    """Make a case's tensors. ``one_by_one`` compares requests one by one."""
    host = torch.Generator().manual_seed(case.seed * 1_000_003 + case.number)
    table = page_table(case, host)
    kv_indices = upload(table.entries.int(), device)
    groups = make_groups(
        case.q_lens,
        case.kv_lens,
        table.begins,
        kv_indices,
        case.page_size,
        case.heads,
        one_by_one,
    )
    total = sum(case.q_lens)
    slots = table.num_pages * case.page_size
    queries, pool, stored = _values(case, total, slots, groups, device)
    offsets = torch.tensor([0, *case.q_lens]).cumsum(0).int()
    tail = torch.tensor(GARBAGE[: case.number % 3])
    host_index = (
        torch.cat([offsets, tail]).int(),
        torch.cat([torch.tensor(table.begins), tail]).int(),
        table.entries.int(),
        torch.tensor(case.kv_lens, dtype=torch.int32),
    )
    on_device = (host_index[0], host_index[1], kv_indices, host_index[3])
    index = host_index if case.index_on_host else tuple(upload(t, device) for t in on_device)
    dtype = TORCH_DTYPES[case.dtype]
    rows = (total, case.heads)
    width = HEAD_DIM_CKV + case.out_tail
    return Tensors(
        case=case,
        queries=queries,
        pool=pool,
        groups=groups,
        index=index,
        inputs=(
            *place(queries, case.query_layout),
            *place(stored.view(table.num_pages, case.page_size, -1), case.cache_layout),
        ),
        out=torch.full((*rows, width), math.nan, dtype=dtype, device=device)[..., :HEAD_DIM_CKV],
        lse=torch.full(rows, math.nan, dtype=torch.float32, device=device),
    )


def _packed(first: torch.Tensor, second: torch.Tensor) -> Any:
    """The two parts as one argument: the tensor that both are views of, or the pair."""
    is_whole = first.stride() == second.stride() and (
        second.data_ptr() - first.data_ptr() == HEAD_DIM_CKV * first.element_size()
    )
    if not is_whole:
        return first, second
    return first.as_strided((*first.shape[:2], HEAD_DIM), first.stride())


def call(wrapper: Any, tensors: Tensors) -> None:
    """Plan and run; the results are in ``tensors.out`` and ``tensors.lse``."""
    case = tensors.case
    min_long_tiles = 0 if case.counts_as_long else dispatch.MIN_LONG_TILES
    with unittest.mock.patch.object(dispatch, "MIN_LONG_TILES", min_long_tiles):
        wrapper.plan(
            *tensors.index,
            case.heads,
            HEAD_DIM_CKV,
            HEAD_DIM_KPE,
            case.page_size,
            case.causal,
            case.sm_scale,
            TORCH_DTYPES[case.dtype],
            TORCH_DTYPES[case.kv_dtype],
            validate=case.validate,
            **({"kv_cache_format": case.kv_dtype} if case.kv_dtype not in DTYPES else {}),
            fixed_split_size=case.fixed_split_size,
        )
    results = {"out": tensors.out, "lse": tensors.lse, "return_lse": True}
    results["return_lse_base_on_e"] = case.lse_base_e
    if case.kv_dtype == "fp8_e4m3":
        results |= {"ckv_scale": case.fp8.ckv_scale, "kpe_scale": case.fp8.kpe_scale}
    if case.packed:
        caches = tensors.inputs[2:]
        cache = _packed(*caches) if len(caches) == 2 else caches[0]
        wrapper.run(query=_packed(*tensors.inputs[:2]), kv_cache=cache, **results)
    else:
        wrapper.run(*tensors.inputs, **results)


def graph_wrapper(workspace: torch.Tensor, tensors: Tensors, backend: str) -> Any:
    """A wrapper with buffers of a CUDA graph, full of garbage, that just hold the case's plan."""
    import etap_flashinfer

    names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")
    buffers = {
        name: torch.full_like(tensor, GARBAGE[0], device=workspace.device)
        for name, tensor in zip(names, tensors.index, strict=True)
    }
    return etap_flashinfer.BatchMLAPagedAttentionWrapper(
        workspace, use_cuda_graph=True, **buffers, backend=backend
    )


def run(wrapper: Any, tensors: Tensors) -> None:
    """Plan and run a case on ``wrapper``, or on one with graph buffers made for it on the same
    workspace."""
    if tensors.case.graph_buffers:
        wrapper = graph_wrapper(wrapper._float_workspace_buffer, tensors, wrapper.backend)
    call(wrapper, tensors)
