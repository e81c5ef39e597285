"""Problems with poisoned surroundings, their exact float64 results, and the accuracy check."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from fuzzing import compare

import etap_flashinfer

SM_SCALE = 192**-0.5
WORKSPACE_BYTES = 128 * 1024 * 1024
GARBAGE_PAGES = (2**31 - 1, -1, 10**9, -(2**31))
DTYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8_e4m3",
    torch.uint8: "flashmla_656",
}
RMSE_BOUND = 1.15
LSE_BOUND = 1e-5


@dataclasses.dataclass
class Problem:
    """One call's tensors and the latent tokens of each request, kept apart from the pool.

    ``tokens[r]`` is ``[kv_lens[r], 576]``: the reference reads these and not the pages, so that a
    wrong page table here cannot hide a wrong page table in the kernel.
    """

    q_nope: torch.Tensor
    q_pe: torch.Tensor
    ckv: torch.Tensor
    kpe: torch.Tensor
    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    kv_len_arr: torch.Tensor
    q_lens: list[int]
    kv_lens: list[int]
    tokens: list[torch.Tensor]
    num_heads: int
    page_size: int
    causal: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.q_nope.dtype

    def plan_arguments(self) -> tuple:
        """Positional arguments of ``plan``."""
        return (
            self.qo_indptr,
            self.kv_indptr,
            self.kv_indices,
            self.kv_len_arr,
            self.num_heads,
            512,
            64,
            self.page_size,
            self.causal,
            SM_SCALE,
            self.dtype,
            self.ckv.dtype,
        )

    def run_arguments(self) -> tuple:
        """Positional arguments of ``run``."""
        return (self.q_nope, self.q_pe, self.ckv, self.kpe)

    def plan_options(self) -> dict:
        """Arguments of our ``plan`` by name."""
        return {}

    def run_options(self) -> dict:
        """Arguments of ``run`` by name."""
        return {}


def random_queries(
    generator: torch.Generator, total: int, heads: int, dtype: torch.dtype, layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal queries as two tensors: "separate", "fused" views of 576, or "heads_first"."""
    fused = torch.randn(total, heads, 576, generator=generator, device="cuda").to(dtype)
    if layout == "heads_first":
        fused = fused.transpose(0, 1).contiguous().transpose(0, 1)
    q_nope, q_pe = fused[..., :512], fused[..., 512:]
    if layout == "separate":
        return q_nope.contiguous(), q_pe.contiguous()
    assert layout in ("fused", "heads_first"), layout
    return q_nope, q_pe


def make_problem(
    seed: int,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    num_heads: int = 16,
    page_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = False,
    cache_layout: str = "fused",
    query_layout: str = "fused",
    spare_entries: int = 2,
    first_page: int = 0,
) -> Problem:
    """Random tokens on shuffled pages; all else in the pool and in the page table is poison.

    The pool holds NaN and infinities wherever no visible token lies: in the tails of last pages and
    on pages that no request owns. Each request's page range ends with up to ``spare_entries``
    entries of garbage that its length does not reach. ``first_page`` leaves pages free in front.
    """
    generator = torch.Generator(device="cuda").manual_seed(seed)
    host = torch.Generator().manual_seed(seed)
    pages = [-(-length // page_size) for length in kv_lens]
    used, unused = sum(pages), 5
    order = torch.randperm(used + unused, generator=host)[:used] + first_page
    entries, ends, position = [], [0], 0
    for count in pages:
        spare = int(torch.randint(spare_entries + 1, (), generator=host))
        garbage = [GARBAGE_PAGES[(position + k) % len(GARBAGE_PAGES)] for k in range(spare)]
        entries += [order[position : position + count], torch.tensor(garbage, dtype=torch.int64)]
        position += count
        ends.append(ends[-1] + count + spare)
    tokens = torch.randn(sum(kv_lens), 576, generator=generator, device="cuda").to(dtype)
    slots = _token_slots(order, pages, kv_lens, page_size).cuda()
    ckv, kpe = _fill_pool(first_page + used + unused, page_size, dtype, cache_layout, slots, tokens)
    q_nope, q_pe = random_queries(generator, sum(q_lens), num_heads, dtype, query_layout)
    return Problem(
        q_nope=q_nope,
        q_pe=q_pe,
        ckv=ckv,
        kpe=kpe,
        qo_indptr=torch.tensor([0, *q_lens]).cumsum(0).int().cuda(),
        kv_indptr=torch.tensor(ends, dtype=torch.int32, device="cuda"),
        kv_indices=torch.cat([*entries, torch.tensor([2**31 - 1])]).int().cuda(),
        kv_len_arr=torch.tensor(list(kv_lens), dtype=torch.int32, device="cuda"),
        q_lens=list(q_lens),
        kv_lens=list(kv_lens),
        tokens=list(tokens.split(list(kv_lens))),
        num_heads=num_heads,
        page_size=page_size,
        causal=causal,
    )


def _token_slots(
    order: torch.Tensor, pages: Sequence[int], kv_lens: Sequence[int], page_size: int
) -> torch.Tensor:
    """Row of the pool, page * page_size + offset, of every token of every request."""
    rows = (order[:, None] * page_size + torch.arange(page_size)).flatten()
    starts = torch.tensor([0, *pages]).cumsum(0) * page_size
    parts = [rows[start : start + length] for start, length in zip(starts, kv_lens, strict=False)]
    return torch.cat(parts) if parts else rows


def _poison(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    pool = torch.full(shape, torch.nan, dtype=dtype, device="cuda")
    pool[..., ::3] = torch.inf
    pool[..., 1::3] = -torch.inf
    return pool


def _fill_pool(
    num_pages: int,
    page_size: int,
    dtype: torch.dtype,
    layout: str,
    slots: torch.Tensor,
    tokens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    if layout == "fused":
        pool = _poison((num_pages, page_size, 576), dtype)
        pool.view(-1, 576)[slots] = tokens
        return pool[..., :512], pool[..., 512:]
    assert layout == "separate", layout
    ckv, kpe = (_poison((num_pages, page_size, width), dtype) for width in (512, 64))
    ckv.view(-1, 512)[slots] = tokens[:, :512]
    kpe.view(-1, 64)[slots] = tokens[:, 512:]
    return ckv, kpe


def exact(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[T, heads, 512]`` and base-2 LSE ``[T, heads]`` in float64, request by request."""
    total = problem.q_nope.shape[0]
    output = torch.zeros(total, problem.num_heads, 512, dtype=torch.float64, device="cuda")
    lse = torch.full((total, problem.num_heads), -torch.inf, dtype=torch.float64, device="cuda")
    queries = torch.cat([problem.q_nope, problem.q_pe], -1)
    first = 0
    for q_len, kv_len, tokens in zip(problem.q_lens, problem.kv_lens, problem.tokens, strict=True):
        rows = slice(first, first + q_len)
        first += q_len
        if q_len == 0 or kv_len == 0:
            continue
        cache = tokens.double()
        scores = torch.einsum("qhd,td->qht", queries[rows].double(), cache) * SM_SCALE
        if problem.causal:
            newest = torch.arange(kv_len - q_len, kv_len, device="cuda")
            hidden = torch.arange(kv_len, device="cuda")[None] > newest[:, None]
            scores.masked_fill_(hidden[:, None], -torch.inf)
        log_sum = scores.logsumexp(-1)
        weights = torch.exp(scores - log_sum[..., None]).nan_to_num_(0.0)  # no visible token: 0
        output[rows] = torch.einsum("qht,td->qhd", weights, cache[:, :512])
        lse[rows] = log_sum / torch.log(torch.tensor(2.0, dtype=torch.float64))
    return output, lse


def make_wrapper(device: str = "cuda", **arguments) -> object:
    """An ETAP wrapper with a workspace of its own, poisoned."""
    workspace = torch.full((WORKSPACE_BYTES,), 0xFF, dtype=torch.uint8, device=device)
    return etap_flashinfer.BatchMLAPagedAttentionWrapper(workspace, backend="etap", **arguments)


def kept_memory(wrapper: object) -> tuple[torch.Tensor, torch.Tensor]:
    """What the variant of the last plan keeps: schedules, ``[CTAs, bytes]``, and places of parts,
    ``[sets of places, bytes]``."""
    executor, plan = wrapper._executor, wrapper._plan
    call = plan.checked_call
    used = executor.kernel(plan, plan.max_query_len or 1) if call is None else call.kernel
    ((dtype, row_tile, *_), kept), *others = (
        (key, executor.kept[key]) for key, kernel in executor.kernels.items() if kernel is used
    )
    assert not others
    num_ctas = torch.cuda.get_device_properties(0).multi_processor_count
    rows, sets = min(row_tile, 64), 1 if row_tile >= 64 else 2
    part_bytes = rows * (512 * (2 if dtype == torch.bfloat16 else 4) + 8)
    places_bytes = -(-part_bytes // 128) * 128 * 2 * num_ctas
    schedules, places = kept.split([kept.numel() - sets * places_bytes, sets * places_bytes])
    return schedules.view(num_ctas, -1), places.view(sets, -1)


def kept_schedules(wrapper: object) -> torch.Tensor:
    return kept_memory(wrapper)[0]


def capture_graph(call: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """``call`` in a CUDA graph, after a first one on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A result as integers, of which NaN and the zeros compare as they are stored."""
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def poisoned_outputs(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE buffers full of NaN: whatever is not written fails the comparison."""
    shape = (problem.q_nope.shape[0], problem.num_heads, 512)
    device = problem.q_nope.device
    out = torch.full(shape, torch.nan, dtype=problem.dtype, device=device)
    return out, torch.full(shape[:2], torch.nan, dtype=torch.float32, device=device)


def run_once(problem: Problem, wrapper: object | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Plan and run on poisoned outputs; returns output and base-2 LSE."""
    wrapper = make_wrapper() if wrapper is None else wrapper
    wrapper.plan(*problem.plan_arguments(), **problem.plan_options())
    out, lse = poisoned_outputs(problem)
    options = problem.run_options() | {"out": out, "lse": lse, "return_lse": True}
    returned = wrapper.run(*problem.run_arguments(), **options)
    assert returned[0] is out
    assert returned[1] is lse
    return out, lse


def rmse(values: torch.Tensor, reference: torch.Tensor) -> float:
    return (values.double() - reference).square().mean().sqrt().item()


def check(
    problem: Problem,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    record: Callable[[dict], None] | None = None,
    rmse_bound: float = RMSE_BOUND,
    probability_roundoff: float = 0.0,
) -> None:
    """Compare with float64: the whole batch and every request by itself.

    RMSE at most ``rmse_bound`` times that of the exact result rounded to the output type (and 1e-6
    of its size, for results such as a single token's that rounding leaves exact), LSE within 1e-5.
    ``probability_roundoff``: relative error of a P that is rounded once, which a request with one
    row and few tokens that count shows in all columns alike. Of caches of bf16 or fp16, requests
    beyond ``compare.TWO_PART_TOKENS_MANY_ROWS`` may have such a P; on the average of a weight's
    error.
    """
    expected, expected_lse = exact(problem)
    rounded = expected.to(problem.dtype)
    figure, rounding = rmse(out, expected), rmse(rounded, expected)
    if record is not None:
        record(
            {
                "batch": len(problem.kv_lens),
                "context": max(problem.kv_lens),
                "heads": problem.num_heads,
                "q_len": max(problem.q_lens),
                "page_size": problem.page_size,
                "dtype": DTYPE_NAMES[problem.dtype],
                "kv_dtype": DTYPE_NAMES[problem.ckv.dtype],
                "rmse": figure,
                "rmse_rounding": rounding,
            }
        )
    assert torch.isfinite(out).all(), "NaN or Inf in the output"
    squares = (out.double() - expected).square().mean((1, 2))
    floor = (rounded.double() - expected).square().mean((1, 2))
    size = expected.square().mean((1, 2))
    first = 0
    for request, q_len in enumerate(problem.q_lens):
        if q_len:
            rows = slice(first, first + q_len)
            roundoff = probability_roundoff
            is_long = problem.kv_lens[request] > compare.TWO_PART_TOKENS_MANY_ROWS
            if is_long and problem.ckv.dtype in compare.UNIT_ROUNDOFF:
                roundoff = compare.UNIT_ROUNDOFF[problem.ckv.dtype] / 4
            own = squares[rows].mean().sqrt()
            own_size = size[rows].mean().sqrt()
            bound = torch.hypot(rmse_bound * floor[rows].mean().sqrt(), roundoff * own_size)
            bound += 1e-6 * own_size
            assert own <= bound, (
                f"request {request} (q {q_len}, length {problem.kv_lens[request]}): "
                f"rmse {own:.3e} above {bound:.3e}"
            )
        first += q_len
    assert figure <= rmse_bound * rounding + 1e-6 * rmse(torch.zeros_like(expected), expected)
    if lse is not None:
        check_lse(lse, expected_lse)


def check_lse(lse: torch.Tensor, expected: torch.Tensor) -> None:
    """LSE within 1e-5 of its size (of 1, where it is smaller), -inf exactly where expected."""
    empty = torch.isinf(expected)
    assert torch.equal(torch.isneginf(lse), empty), "-inf in the wrong places of the LSE"
    error = (lse.double() - expected).abs() / expected.abs().clamp(min=1.0)
    worst = error[~empty].max().item() if (~empty).any() else 0.0
    assert worst <= LSE_BOUND, f"LSE off by {worst:.2e} relative"
