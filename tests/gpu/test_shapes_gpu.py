"""ETAP decode against float64 over heads, query lengths, page sizes, lengths and batch sizes."""

from __future__ import annotations

import random

import pytest
import torch
from gpu_helpers import check, make_problem, make_wrapper, run_once

from etap_flashinfer import dispatch

pytestmark = pytest.mark.gpu

HEADS = (1, 2, 6, 8, 9, 16, 24, 32, 64, 96, 128)
DTYPES = (torch.bfloat16, torch.float16)
PAGE_SIZES = (1, 2, 3, 8, 16, 24, 32, 48, 64, 96, 128)
EDGE_LENGTHS = (0, 1, 2, 7, 31, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 257)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_heads(heads, dtype, seed, record):
    problem = make_problem(seed, [1] * 6, [1, 64, 65, 777, 2048, 4095], heads, dtype=dtype)
    check(problem, *run_once(problem), record)


@pytest.mark.parametrize("causal", [False, True], ids=("full", "causal"))
@pytest.mark.parametrize("heads", [1, 6, 8, 9, 16, 24, 128])
def test_mixed_query_lengths(heads, causal, seed, record):
    lengths = [9, 10, 64, 65, 130, 500, 1025, 70, 3000]
    problem = make_problem(seed, list(range(1, 10)), lengths, heads, causal=causal)
    check(problem, *run_once(problem), record)


@pytest.mark.parametrize("q_len", range(1, 10))
def test_equal_query_lengths(q_len, seed, record):
    problem = make_problem(seed, [q_len] * 4, [64, 129, 640, 1999], 16, causal=True)
    check(problem, *run_once(problem), record)


@pytest.mark.parametrize("causal", [False, True], ids=("full", "causal"))
def test_requests_without_queries(causal, seed, record):
    problem = make_problem(seed, [2, 0, 1, 0, 3], [100, 50, 65, 0, 700], 16, causal=causal)
    check(problem, *run_once(problem), record)


def test_more_queries_than_tokens(seed):
    """Causal rows before the first token see nothing: output 0 and LSE -inf."""
    problem = make_problem(seed, [4, 9, 5], [2, 1, 0], 16, causal=True)
    check(problem, *run_once(problem))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_page_sizes(page_size, dtype, seed, record):
    edges = [page_size - 1, page_size, page_size + 1, 5 * page_size, 5 * page_size + 1]
    lengths = [*edges, 1000, 2049]
    problem = make_problem(seed, [1] * len(lengths), lengths, 16, page_size, dtype)
    check(problem, *run_once(problem), record)


@pytest.mark.parametrize("page_size", [1, 3, 16, 48, 64, 128])
@pytest.mark.parametrize("heads", [8, 16, 32, 128])
def test_edge_lengths(heads, page_size, seed, record):
    """Each row tile with each loader at the edges of pages and of 64-token tiles."""
    problem = make_problem(seed, [1] * len(EDGE_LENGTHS), EDGE_LENGTHS, heads, page_size)
    check(problem, *run_once(problem), record)


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize(
    "lengths", [[4096], [8191, 20_011], [65_537], [70_001, 5, 0, 12_345]], ids=str
)
@pytest.mark.parametrize("heads", [16, 64])
def test_long_contexts(heads, lengths, page_size, seed, record):
    problem = make_problem(seed, [1] * len(lengths), lengths, heads, page_size)
    check(problem, *run_once(problem), record)


@pytest.mark.parametrize("heads", [128, 96])
def test_long_context_many_rows(heads, seed, record):
    problem = make_problem(seed, [2, 4], [30_001, 9000], heads, causal=True)
    check(problem, *run_once(problem), record)


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("heads", [72, 128])
def test_short_and_long_requests_of_many_rows(heads, page_size, seed, record, monkeypatch):
    """Calls of one wrapper that take turns on the two kernels of more than 64 rows."""
    monkeypatch.setattr(dispatch, "MIN_LONG_TILES", 256)
    wrapper = make_wrapper()
    for index, length in enumerate((300, 9001, 64, 8193)):
        problem = make_problem(seed + index, [1, 2], [length, length // 2], heads, page_size)
        check(problem, *run_once(problem, wrapper), record)
        assert wrapper._plan.is_long == (length > 8000)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 17, 64, 131, 132, 133, 256, 1024, 1500])
def test_batch_sizes(batch, seed, record):
    chosen = random.Random(seed)
    lengths = [chosen.randrange(300) for _ in range(batch)]
    problem = make_problem(seed, [1] * batch, lengths, 16)
    check(problem, *run_once(problem), record)


@pytest.mark.parametrize(
    ("batch", "shortest", "longest", "heads"),
    [
        (40, 1, 3000, 64),  # cut evenly, with empty places
        (64, 1, 1024, 128),  # whole, padded to the longest
        (64, 960, 1024, 16),  # padded, in two parts each
        (16, 7900, 8192, 64),  # padded, in eight
        (260, 900, 960, 16),  # padded, two for a CTA
    ],
)
def test_lengths_that_differ(batch, shortest, longest, heads, seed, record):
    """All ways of cutting row tiles of different lengths (csrc/etap_mla_partition.h)."""
    chosen = random.Random(seed)
    lengths = [longest, *(chosen.randint(shortest, longest) for _ in range(batch - 1))]
    problem = make_problem(seed, [1] * batch, lengths, heads)
    check(problem, *run_once(problem), record)


def test_one_long_among_many_short(seed, record):
    chosen = random.Random(seed)
    lengths = [chosen.randrange(1, 200) for _ in range(127)]
    lengths.insert(chosen.randrange(128), 65_536)
    problem = make_problem(seed, [1] * 128, lengths, 16)
    check(problem, *run_once(problem), record)


def test_all_requests_empty(seed):
    problem = make_problem(seed, [1] * 5, [0] * 5, 16)
    out, lse = run_once(problem)
    assert (out == 0).all()
    assert torch.isneginf(lse).all()


@pytest.mark.parametrize("case", range(60))
def test_random_shapes(case, seed, record):
    """Anything goes: every draw is another shape, and ETAP_TEST_SEED brings one back."""
    chosen = random.Random(seed)
    batch = chosen.choice((1, 2, 4, 9, 33, 100))
    longest = chosen.choice((70, 700, 7000)) if batch <= 33 else 700
    problem = make_problem(
        seed,
        [chosen.randint(1, chosen.choice((1, 2, 9))) for _ in range(batch)],
        [chosen.randrange(longest) for _ in range(batch)],
        chosen.choice(HEADS),
        chosen.choice(PAGE_SIZES),
        chosen.choice(DTYPES),
        causal=chosen.random() < 0.5,
        cache_layout=chosen.choice(("fused", "separate")),
        query_layout=chosen.choice(("fused", "separate", "heads_first")),
    )
    check(problem, *run_once(problem), record)
