"""Layouts of the caller's tensors, output buffers, hostile indices and very large pools."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from gpu_helpers import (
    SM_SCALE,
    check,
    check_lse,
    exact,
    make_problem,
    make_wrapper,
    poisoned_outputs,
    run_once,
)

pytestmark = pytest.mark.gpu

LENGTHS = [65, 1, 1200, 64, 333]


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("query_layout", ["fused", "separate", "heads_first"])
@pytest.mark.parametrize("cache_layout", ["fused", "separate"])
def test_layouts(cache_layout, query_layout, page_size, seed, record):
    problem = make_problem(
        seed,
        [1, 2, 3, 1, 1],
        LENGTHS,
        24,
        page_size,
        cache_layout=cache_layout,
        query_layout=query_layout,
    )
    check(problem, *run_once(problem), record)


def test_wide_rows(seed):
    """Rows of 640 elements of which the cache and the queries are the first 576."""
    problem = make_problem(seed, [1] * 5, LENGTHS, 16)
    wide_pool = torch.full((*problem.ckv.shape[:2], 640), torch.nan, device="cuda").to(
        problem.dtype
    )
    wide_pool[..., :512], wide_pool[..., 512:576] = problem.ckv, problem.kpe
    wide_query = torch.full((5, 16, 640), torch.nan, device="cuda").to(problem.dtype)
    wide_query[..., :512], wide_query[..., 512:576] = problem.q_nope, problem.q_pe
    problem = dataclasses.replace(
        problem,
        ckv=wide_pool[..., :512],
        kpe=wide_pool[..., 512:576],
        q_nope=wide_query[..., :512],
        q_pe=wide_query[..., 512:576],
    )
    check(problem, *run_once(problem))


@pytest.mark.parametrize("base_e", [False, True], ids=("base 2", "base e"))
def test_lse_base(base_e, seed):
    problem = make_problem(seed, [1, 3, 1, 2, 1], [65, 9, 4000, 0, 333], 16, causal=True)
    wrapper = make_wrapper()
    wrapper.plan(*problem.plan_arguments())
    out, lse = wrapper.run(*problem.run_arguments(), return_lse=True, return_lse_base_on_e=base_e)
    check(problem, out, None)
    _, expected = exact(problem)
    assert lse.dtype == torch.float32
    assert lse.shape == (8, 16)
    check_lse(lse, expected * (math.log(2.0) if base_e else 1.0))


def test_without_buffers_and_without_lse(seed):
    problem = make_problem(seed, [1] * 5, LENGTHS, 16)
    wrapper = make_wrapper()
    wrapper.plan(*problem.plan_arguments())
    out = wrapper.run(*problem.run_arguments())
    assert isinstance(out, torch.Tensor)
    check(problem, out, None)


def test_nothing_else_is_written(seed):
    """Output and LSE rows around the ones asked for keep their bits."""
    problem = make_problem(seed, [1] * 5, LENGTHS, 9)
    wide_out = torch.full((7, 9, 512), -7.5, dtype=problem.dtype, device="cuda")
    wide_lse = torch.full((7, 9), -7.5, device="cuda")
    inputs = [tensor.clone() for tensor in problem.run_arguments()]
    wrapper = make_wrapper()
    wrapper.plan(*problem.plan_arguments())
    wrapper.run(*problem.run_arguments(), out=wide_out[1:6], lse=wide_lse[1:6], return_lse=True)
    check(problem, wide_out[1:6], wide_lse[1:6])
    for edge in (0, 6):
        assert (wide_out[edge] == -7.5).all()
        assert (wide_lse[edge] == -7.5).all()
    for before, after in zip(inputs, problem.run_arguments(), strict=True):
        assert torch.equal(before.view(torch.int16), after.contiguous().view(torch.int16))


def test_host_index_tensors_and_long_indptr(seed):
    problem = make_problem(seed, [1, 2, 1, 3, 1], LENGTHS, 16)
    tail = torch.tensor([2**31 - 1, -5], dtype=torch.int32)
    problem = dataclasses.replace(
        problem,
        qo_indptr=torch.cat([problem.qo_indptr.cpu(), tail]),
        kv_indptr=torch.cat([problem.kv_indptr.cpu(), tail]),
        kv_indices=problem.kv_indices.cpu(),
        kv_len_arr=problem.kv_len_arr.cpu(),
    )
    check(problem, *run_once(problem))


@pytest.mark.parametrize("page_size", [1, 64])
def test_large_pool(page_size, seed, record):
    """Pages beyond 2^31 elements of the pool: 32-bit offsets would read elsewhere."""
    first_page = (2**31 // 512) // page_size + 100
    for cache_layout in ("fused", "separate"):
        problem = make_problem(
            seed,
            [1] * 3,
            [65, 5000, 129],
            16,
            page_size,
            cache_layout=cache_layout,
            first_page=first_page,
        )
        assert first_page * page_size * problem.ckv.stride(1) > 2**31
        check(problem, *run_once(problem), record)
        del problem
        torch.cuda.empty_cache()


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_pages_outside_the_pool_read_as_zero(page_size, seed):
    problem = make_problem(seed, [1, 2], [40 * page_size, 7 * page_size], 16, page_size)
    starts = problem.kv_indptr.tolist()
    for request, page, value in ((0, 3, 2**31 - 1), (0, 39, -1), (1, 0, problem.ckv.shape[0])):
        problem.kv_indices[starts[request] + page] = value
        problem.tokens[request][page * page_size : (page + 1) * page_size] = 0
    check(problem, *run_once(problem))


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("heads", [8, 16, 32, 64, 128])
def test_a_pool_without_pages(heads, page_size, seed):
    """As FlashInfer's own tests have it for requests of no tokens; pages listed are outside it."""
    problem = make_problem(seed, [1, 3, 1], [0, 0, 130], heads, page_size, causal=True)
    problem = dataclasses.replace(problem, ckv=problem.ckv[:0], kpe=problem.kpe[:0])
    for _ in range(2):
        out, lse = run_once(problem)
        assert out.count_nonzero() == 0
        assert lse[:4].eq(-math.inf).all()
        check_lse(lse[4:], torch.full_like(lse[4:], math.log2(130)))


@pytest.mark.parametrize("length", [-1, -(2**31), 10**6, 2**31 - 1])
def test_lengths_beyond_the_pages_given(length, seed):
    """A length is clamped to 0 and to what the request's pages hold."""
    problem = make_problem(seed, [1, 2, 1], [130, 128, 700], 16, spare_entries=0)
    problem.kv_len_arr[1] = length
    if length < 0:
        problem.kv_lens[1], problem.tokens[1] = 0, problem.tokens[1][:0]
    check(problem, *run_once(problem))


def test_page_range_beyond_the_page_table(seed):
    """A page range that ends behind kv_indices is cut there, and the length with it."""
    problem = make_problem(seed, [1, 1], [130, 192], 16, spare_entries=0)
    entries = int(problem.kv_indptr[-1])
    problem.kv_indices = problem.kv_indices[:entries].clone()
    problem.kv_indptr[-1] = 2**31 - 1
    problem.kv_len_arr[1] = 64 * 1000
    check(problem, *run_once(problem))


def test_scale(seed):
    """sm_scale is the caller's: a large one makes the softmax nearly a maximum."""
    problem = make_problem(seed, [1] * 5, LENGTHS, 16)
    wrapper = make_wrapper()
    arguments = list(problem.plan_arguments())
    arguments[9] = 8 * SM_SCALE
    wrapper.plan(*arguments)
    out, lse = poisoned_outputs(problem)
    wrapper.run(*problem.run_arguments(), out=out, lse=lse, return_lse=True)
    scaled = dataclasses.replace(
        problem, q_nope=(8 * problem.q_nope), q_pe=(8 * problem.q_pe)
    )  # times a power of two is exact
    check(scaled, out, lse)
