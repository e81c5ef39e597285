"""ETAP decode of fp8 caches, against float64 attention on the dequantised cache."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from fp8_problems import (
    FORMATS,
    WIDTHS,
    Fp8Problem,
    check_fp8,
    make_fp8_problem,
)
from gpu_helpers import (
    WORKSPACE_BYTES,
    capture_graph,
    make_wrapper,
    poisoned_outputs,
    run_once,
)
from test_execution_gpu import GraphBuffers, bits

import etap_flashinfer

pytestmark = pytest.mark.gpu

HEADS = (1, 2, 6, 8, 9, 16, 24, 32, 64, 96, 128)
DTYPES = (torch.bfloat16, torch.float16)
PAGE_SIZES = (1, 3, 8, 16, 24, 48, 64, 128)
EDGE_LENGTHS = (0, 1, 2, 7, 31, 33, 48, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 257)
each_format = pytest.mark.parametrize("cache_format", FORMATS)
each_loader = pytest.mark.parametrize("page_size", [1, 64], ids=("gather", "tma"))


# Shapes


@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_heads(heads, dtype, cache_format, seed, record):
    lengths = [1, 64, 65, 777, 2048, 4095]
    problem = make_fp8_problem(
        seed, [1] * 6, lengths, heads, dtype=dtype, cache_format=cache_format
    )
    check_fp8(problem, *run_once(problem), record)


@each_format
@pytest.mark.parametrize("causal", [False, True], ids=("full", "causal"))
@pytest.mark.parametrize("heads", [1, 8, 16, 24, 128])
def test_mixed_query_lengths(heads, causal, cache_format, seed, record):
    lengths = [9, 10, 64, 65, 130, 500, 1025, 70, 3000]
    problem = make_fp8_problem(
        seed, list(range(1, 10)), lengths, heads, causal=causal, cache_format=cache_format
    )
    check_fp8(problem, *run_once(problem), record)


@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_page_sizes(page_size, dtype, cache_format, seed, record):
    edges = [page_size - 1, page_size, page_size + 1, 5 * page_size, 5 * page_size + 1]
    lengths = [*edges, 1000, 2049]
    problem = make_fp8_problem(
        seed, [1] * len(lengths), lengths, 16, page_size, dtype, cache_format=cache_format
    )
    check_fp8(problem, *run_once(problem), record)


@each_format
@pytest.mark.parametrize("page_size", [1, 3, 16, 48, 64])
@pytest.mark.parametrize("heads", [8, 16, 32, 128])
def test_edge_lengths(heads, page_size, cache_format, seed, record):
    """Each row tile with each loader at the edges of pages and of 64-token tiles."""
    queries = [1] * len(EDGE_LENGTHS)
    problem = make_fp8_problem(
        seed, queries, EDGE_LENGTHS, heads, page_size, cache_format=cache_format
    )
    check_fp8(problem, *run_once(problem), record)


@each_format
@each_loader
@pytest.mark.parametrize("lengths", [[8191, 20_011], [70_001, 5, 0, 12_345]], ids=str)
@pytest.mark.parametrize("heads", [16, 64])
def test_long_contexts(heads, lengths, page_size, cache_format, seed, record):
    queries = [1] * len(lengths)
    problem = make_fp8_problem(seed, queries, lengths, heads, page_size, cache_format=cache_format)
    check_fp8(problem, *run_once(problem), record)


@each_format
@pytest.mark.parametrize("batch", [1, 3, 17, 132, 256, 1024])
def test_batch_sizes(batch, cache_format, seed, record):
    chosen = random.Random(seed)
    lengths = [chosen.randrange(1, 300) for _ in range(batch)]
    problem = make_fp8_problem(seed, [1] * batch, lengths, 16, cache_format=cache_format)
    check_fp8(problem, *run_once(problem), record)


@each_format
@pytest.mark.parametrize("causal", [False, True], ids=("full", "causal"))
def test_requests_without_queries_or_tokens(causal, cache_format, seed, record):
    queries, lengths = [2, 0, 1, 0, 3], [100, 50, 65, 0, 700]
    problem = make_fp8_problem(seed, queries, lengths, 16, causal=causal, cache_format=cache_format)
    check_fp8(problem, *run_once(problem), record)


@each_format
def test_nothing_visible(cache_format, seed):
    """Causal rows before the first token, and whole requests without one: 0 and -inf."""
    problem = make_fp8_problem(
        seed, [4, 9, 5], [2, 1, 0], 16, causal=True, cache_format=cache_format
    )
    check_fp8(problem, *run_once(problem))
    problem.kv_len_arr.zero_()
    out, lse = run_once(problem)
    assert (out == 0).all()
    assert torch.isneginf(lse).all()


@each_format
@pytest.mark.parametrize("case", range(30))
def test_random_shapes(case, cache_format, seed, record):
    """Anything goes: every draw is another shape, and ETAP_TEST_SEED brings one back."""
    chosen = random.Random(seed)
    batch = chosen.choice((1, 2, 4, 9, 33))
    longest = chosen.choice((70, 700, 7000))
    problem = make_fp8_problem(
        seed,
        [chosen.randint(1, chosen.choice((1, 2, 9))) for _ in range(batch)],
        [chosen.randrange(1, longest) for _ in range(batch)],
        chosen.choice(HEADS),
        chosen.choice(PAGE_SIZES),
        chosen.choice(DTYPES),
        causal=chosen.random() < 0.5,
        cache_format=cache_format,
        cache_layout=chosen.choice(("fused", "separate")),
        query_layout=chosen.choice(("fused", "separate", "heads_first")),
    )
    check_fp8(problem, *run_once(problem), record)


# Storage, execution


def workspace() -> torch.Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("cache_layout", ["fused", "separate"])
@each_loader
def test_ways_to_give_codes(page_size, cache_layout, seed):
    problem = make_fp8_problem(
        seed,
        [1, 2, 1],
        [65, 9, 1200],
        24,
        page_size,
        cache_layout=cache_layout,
        cache_format="fp8_e4m3",
    )
    out, lse = run_once(problem)
    check_fp8(problem, out, lse)
    problem.ckv, problem.kpe = problem.ckv.view(torch.uint8), problem.kpe.view(torch.uint8)
    for again in zip(run_once(problem), (out, lse), strict=True):
        assert torch.equal(*map(bits, again))


@each_loader
def test_ways_to_give_packed_tokens(page_size, seed):
    """As either type, with FlashMLA's dimension of one head, with bytes between tokens and pages,
    and as the reference backend reads them."""
    problem = make_fp8_problem(
        seed, [1, 2, 1], [65, 9, 1200], 24, page_size, cache_format="flashmla_656"
    )
    out, lse = run_once(problem)
    check_fp8(problem, out, lse)
    pages = problem.pool.shape[0]
    wide = torch.full((pages, page_size + 3, 672), 0xFF, dtype=torch.uint8, device="cuda")
    wide[:, :page_size, :656] = problem.pool
    strided = wide[:, :page_size, :656]
    for cache in (problem.pool.view(torch.float8_e4m3fn), problem.pool.unsqueeze(2), strided):
        problem.ckv = cache
        for again in zip(run_once(problem), (out, lse), strict=True):
            assert torch.equal(*map(bits, again))
    problem.ckv = problem.pool
    wrapper = etap_flashinfer.BatchMLAPagedAttentionWrapper(workspace(), backend="reference")
    check_fp8(problem, *run_once(problem, wrapper))


def test_wide_rows_of_codes(seed):
    problem = make_fp8_problem(seed, [1] * 3, [65, 9, 1200], 16, cache_format="fp8_e4m3")
    wide = torch.full((*problem.pool.shape[:2], 640), 0x7F, dtype=torch.uint8, device="cuda")
    wide[..., :576] = problem.pool
    problem.ckv, problem.kpe = wide[..., :512], wide[..., 512:576]
    check_fp8(problem, *run_once(problem))


@each_format
@each_loader
def test_large_pool(page_size, cache_format, seed):
    """Pages beyond 2^31 bytes of the pool: 32-bit offsets would read elsewhere."""
    first_page = (2**31 // 512) // page_size + 100
    problem = make_fp8_problem(
        seed,
        [1] * 3,
        [65, 5000, 129],
        16,
        page_size,
        first_page=first_page,
        cache_format=cache_format,
    )
    assert first_page * page_size * problem.ckv.stride(1) > 2**31
    check_fp8(problem, *run_once(problem))
    del problem
    torch.cuda.empty_cache()


@each_format
@each_loader
def test_pages_outside_the_pool_read_as_zero(page_size, cache_format, seed):
    problem = make_fp8_problem(
        seed, [1, 2], [40 * page_size, 7 * page_size], 16, page_size, cache_format=cache_format
    )
    starts = problem.kv_indptr.tolist()
    for request, page, value in ((0, 3, 2**31 - 1), (0, 39, -1), (1, 0, problem.ckv.shape[0])):
        problem.kv_indices[starts[request] + page] = value
        problem.tokens[request][page * page_size : (page + 1) * page_size] = 0
    check_fp8(problem, *run_once(problem))


@each_format
@each_loader
@pytest.mark.parametrize("heads", [6, 16, 32, 64, 128])
def test_bitwise_repeatable(heads, page_size, cache_format, seed):
    problem = make_fp8_problem(
        seed, [1, 2, 1, 3], [5000, 1, 20_000, 777], heads, page_size, cache_format=cache_format
    )
    wrapper = make_wrapper()
    first_out, first_lse = run_once(problem, wrapper)
    for repeat in range(20):
        out, lse = run_once(problem, make_wrapper() if repeat == 19 else wrapper)
        assert torch.equal(bits(out), bits(first_out)), f"output differs in repeat {repeat}"
        assert torch.equal(bits(lse), bits(first_lse)), f"LSE differs in repeat {repeat}"


def graph_rounds(seed: int, heads: int, page_size: int, cache_format: str) -> list[Fp8Problem]:
    """Problems of 8 queries in all and one pair of scales, which a captured graph keeps."""
    chosen = random.Random(seed)
    rounds = []
    for index, longest in enumerate((300, 9000, 65, 1, 30_000, 2)):
        q_lens = chosen.sample([1, 1, 2, 3, 1], 5)
        lengths = [chosen.randrange(longest) for _ in range(5)]
        lengths[chosen.randrange(5)] = longest
        rounds.append(
            make_fp8_problem(
                seed + index,
                q_lens,
                lengths,
                heads,
                page_size,
                causal=True,
                scales=(1 / 64, 0.03),
                cache_format=cache_format,
            )
        )
    return rounds


@pytest.mark.parametrize("replan", [False, True], ids=("in place", "new plan"))
@each_format
@each_loader
@pytest.mark.parametrize("heads", [16, 128])
def test_graph_replay_with_changed_lengths(heads, page_size, cache_format, replan, seed):
    rounds = graph_rounds(seed, heads, page_size, cache_format)
    first = rounds[0]
    pages = max(problem.pool.shape[0] for problem in rounds)
    shape = (pages, page_size, WIDTHS[cache_format])
    pool = torch.full(shape, 0xFF, dtype=torch.uint8, device="cuda")
    caches = (pool, None) if cache_format == "flashmla_656" else (pool[..., :512], pool[..., 512:])
    buffers = GraphBuffers(first, max(p.kv_indices.numel() for p in rounds) + 3)
    buffers.wrapper.plan(*first.plan_arguments(), **first.plan_options())
    queries = torch.zeros(8, heads, 576, dtype=torch.bfloat16, device="cuda")
    out, lse = poisoned_outputs(first)
    options = first.run_options() | {"out": out, "lse": lse, "return_lse": True}

    def call() -> None:
        buffers.wrapper.run(queries[..., :512], queries[..., 512:], *caches, **options)

    graph = capture_graph(call)
    for problem in rounds:
        pool.fill_(0xFF)
        pool[: problem.pool.shape[0]] = problem.pool
        queries[..., :512], queries[..., 512:] = problem.q_nope, problem.q_pe
        if replan:
            buffers.wrapper.plan(*problem.plan_arguments(), **problem.plan_options())
        else:
            buffers.copy_in_place(problem)
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        check_fp8(problem, out, lse)


@each_format
def test_plan_and_run_never_synchronise(cache_format, seed):
    problem = make_fp8_problem(seed, [1] * 4, [65, 1000, 1, 300], 16, cache_format=cache_format)
    wrapper = make_wrapper()
    run_once(problem, wrapper)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        wrapper.plan(*problem.plan_arguments(), **problem.plan_options())
        options = problem.run_options() | {"return_lse": True}
        out, lse = wrapper.run(*problem.run_arguments(), **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_fp8(problem, out, lse)


def test_auto_takes_etap_and_one_wrapper_serves_every_cache(seed):
    wrapper = etap_flashinfer.BatchMLAPagedAttentionWrapper(workspace(), backend="auto")
    for index, (dtype, cache_format) in enumerate(itertools.product(DTYPES, FORMATS)):
        problem = make_fp8_problem(
            seed + index, [1, 2], [65, 1000], 16, 64, dtype, cache_format=cache_format
        )
        check_fp8(problem, *run_once(problem, wrapper))
        assert wrapper.backend == "etap"


@each_format
def test_memory_does_not_grow_with_context(cache_format, seed):
    grown = []
    for length in (64, 65_536):
        problem = make_fp8_problem(seed, [1] * 4, [length] * 4, 16, cache_format=cache_format)
        wrapper = make_wrapper()
        out, lse = run_once(problem, wrapper)
        options = problem.run_options() | {"out": out, "lse": lse, "return_lse": True}
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        wrapper.run(*problem.run_arguments(), **options)
        torch.cuda.synchronize()
        grown.append(torch.cuda.max_memory_allocated() - before)
    assert grown[0] == grown[1]
