"""Semantics of the wrapper, on the CPU with the reference backend, against dense float64."""

import doctest
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wrapper_problem import PagedProblem

from etap_flashinfer import BatchMLAPagedAttentionWrapper, mla
from etap_flashinfer.reference import mla_paged_attention

# Relative error of rounding to the output type; beside it, the absolute error of the arithmetic
# in float32 on values of the order of 1.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
ARITHMETIC = 3e-5


def make_wrapper(**arguments) -> BatchMLAPagedAttentionWrapper:
    return BatchMLAPagedAttentionWrapper(torch.empty(16, dtype=torch.uint8), **arguments)


def assert_close(problem: PagedProblem, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Compare an output and a natural log-sum-exp with the dense answer."""
    expected_out, expected_lse = problem.expected()
    rounding = 1.01 * ROUNDING[problem.dtype]
    torch.testing.assert_close(out.double(), expected_out, rtol=rounding, atol=ARITHMETIC)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=ARITHMETIC)


def check(problem: PagedProblem) -> None:
    wrapper = make_wrapper(backend="reference")
    wrapper.plan(**problem.plan_arguments)
    out, lse = wrapper.run(*problem.inputs, return_lse=True, return_lse_base_on_e=True)
    assert out.dtype == problem.dtype
    assert lse.dtype == torch.float32
    assert_close(problem, out, lse)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_matches_dense_float64(data: st.DataObject) -> None:
    batch_size = data.draw(st.integers(1, 5), label="batch size")
    query_lens = st.lists(st.integers(0, 4), min_size=batch_size, max_size=batch_size)
    kv_lens = st.lists(st.integers(0, 40), min_size=batch_size, max_size=batch_size)
    check(
        PagedProblem(
            query_lens=data.draw(query_lens, label="query lengths"),
            kv_lens=data.draw(kv_lens, label="kv lengths"),
            num_heads=data.draw(st.integers(1, 5), label="heads"),
            page_size=data.draw(st.integers(1, 17), label="page size"),
            causal=data.draw(st.booleans(), label="causal"),
            sm_scale=data.draw(st.sampled_from([0.2, 1.0, -0.3, 0.0]), label="scale"),
            dtype=data.draw(st.sampled_from(list(ROUNDING)), label="dtype"),
            spare_pages=data.draw(st.integers(0, 2), label="spare pages"),
            indptr_tail=data.draw(st.integers(0, 2), label="indptr tail"),
            seed=data.draw(st.integers(0, 2**16), label="seed"),
        )
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_deepseek_widths(dtype: torch.dtype, causal: bool) -> None:
    check(
        PagedProblem(
            query_lens=[1, 3, 2],
            kv_lens=[65, 0, 130],
            num_heads=6,
            head_dim_ckv=512,
            head_dim_kpe=64,
            page_size=64,
            causal=causal,
            sm_scale=192**-0.5,
            dtype=dtype,
        )
    )


def test_large_scores_do_not_overflow() -> None:
    problem = PagedProblem([2, 1], [9, 30], sm_scale=100.0, dtype=torch.float16)
    wrapper = make_wrapper()
    wrapper.plan(**problem.plan_arguments)
    out, lse = wrapper.run(*problem.inputs, return_lse=True, return_lse_base_on_e=True)
    assert_close(problem, out, lse)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_reference_accumulates_in_the_type_asked_for(dtype: torch.dtype, bound: float) -> None:
    problem = PagedProblem([1, 2], [33, 7], causal=True)
    expected_out, expected_lse = problem.expected()
    out, lse = mla_paged_attention(
        *problem.inputs,
        *problem.index,
        problem.causal,
        problem.sm_scale,
        accumulate_dtype=dtype,
        lse_base_e=True,
    )
    assert out.dtype == lse.dtype == dtype
    torch.testing.assert_close(out.double(), expected_out, rtol=bound, atol=bound)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=bound, atol=bound)


def test_causal_queries_that_see_nothing_and_zero_lengths() -> None:
    problem = PagedProblem([4, 2, 1], [2, 0, 5], causal=True)
    wrapper = make_wrapper()
    wrapper.plan(**problem.plan_arguments)
    out, lse = wrapper.run(*problem.inputs, return_lse=True)
    blind = [0, 1, 4, 5]  # the first two of four queries on two tokens; both of an empty request
    seeing = [2, 3, 6]
    assert torch.equal(out[blind], torch.zeros_like(out[blind]))
    assert torch.all(lse[blind] == -math.inf)
    assert torch.isfinite(out[seeing]).all()
    assert torch.isfinite(lse[seeing]).all()


def test_lse_base() -> None:
    problem = PagedProblem([1, 2], [9, 30], dtype=torch.float32)
    wrapper = make_wrapper()
    wrapper.plan(**problem.plan_arguments)
    _, base_2 = wrapper.run(*problem.inputs, return_lse=True)
    _, base_e = wrapper.run(*problem.inputs, return_lse=True, return_lse_base_on_e=True)
    expected = problem.expected()[1]
    torch.testing.assert_close(base_e.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(base_2.double(), expected / math.log(2), rtol=1e-5, atol=1e-5)


def test_out_and_lse_buffers_are_filled_and_returned() -> None:
    problem = PagedProblem([1, 2], [9, 30], dtype=torch.float32)
    wrapper = make_wrapper()
    wrapper.plan(**problem.plan_arguments)
    packed = torch.full((3, 2 * problem.num_heads, problem.head_dim_ckv), math.nan)
    out = packed[:, ::2]  # a strided view; what lies between must stay as it was
    lse = torch.full((3, problem.num_heads), math.nan)
    result = wrapper.run(
        *problem.inputs, out=out, lse=lse, return_lse=True, return_lse_base_on_e=True
    )
    assert result[0] is out
    assert result[1] is lse
    assert_close(problem, out, lse)
    assert packed[:, 1::2].isnan().all()


def test_lse_buffer_is_filled_without_return_lse() -> None:
    problem = PagedProblem([1, 2], [9, 30], dtype=torch.float32)
    wrapper = make_wrapper()
    wrapper.plan(**problem.plan_arguments)
    lse = torch.full((3, problem.num_heads), math.nan)
    out = wrapper.run(*problem.inputs, lse=lse, return_lse_base_on_e=True)
    assert isinstance(out, torch.Tensor)
    assert_close(problem, out, lse)


def test_strided_views_and_separate_buffers_agree() -> None:
    problem = PagedProblem([1, 2, 1], [9, 30, 4])
    wrapper = make_wrapper()
    wrapper.plan(**problem.plan_arguments)
    expected = wrapper.run(*problem.inputs)
    separate = [tensor.contiguous() for tensor in problem.inputs]
    head_major = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in separate]
    assert head_major[0].stride() != separate[0].stride()
    assert torch.equal(wrapper.run(*separate), expected)
    assert torch.equal(wrapper.run(*head_major[:2], *separate[2:]), expected)
    packed = wrapper.run(query=problem.query, kv_cache=problem.cache)
    assert torch.equal(packed, expected)
    pairs = wrapper.run(query=tuple(separate[:2]), kv_cache=tuple(separate[2:]))
    assert torch.equal(pairs, expected)


def test_metadata_object() -> None:
    problem = PagedProblem([1, 2], [9, 30])
    arguments = problem.plan_arguments
    names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")
    metadata = SimpleNamespace(**{name: arguments.pop(name) for name in names})
    wrapper = make_wrapper()
    wrapper.plan(metadata=metadata, **arguments)
    out, lse = wrapper.run(*problem.inputs, return_lse=True, return_lse_base_on_e=True)
    assert_close(problem, out, lse)


@pytest.mark.parametrize("batch_size", [0, 3])
def test_no_queries(batch_size: int) -> None:
    problem = PagedProblem([0] * batch_size, [5] * batch_size)
    wrapper = make_wrapper()
    wrapper.plan(**problem.plan_arguments)
    out, lse = wrapper.run(*problem.inputs, return_lse=True)
    assert out.shape == (0, problem.num_heads, problem.head_dim_ckv)
    assert lse.shape == (0, problem.num_heads)


def test_a_cache_without_pages() -> None:
    """As FlashInfer's own tests have it."""
    problem = PagedProblem([1, 2], [0, 0])
    q_nope, q_pe, ckv, kpe = problem.inputs
    wrapper = make_wrapper()
    wrapper.plan(**problem.plan_arguments)
    out, lse = wrapper.run(q_nope, q_pe, ckv[:0], kpe[:0], return_lse=True)
    assert out.count_nonzero() == 0
    assert lse.eq(-torch.inf).all()


def test_replan_changes_the_problem() -> None:
    wrapper = make_wrapper()
    for problem in (PagedProblem([1], [9]), PagedProblem([2, 1], [3, 8], num_heads=2, causal=True)):
        wrapper.plan(**problem.plan_arguments)
        out, lse = wrapper.run(*problem.inputs, return_lse=True, return_lse_base_on_e=True)
        assert_close(problem, out, lse)


def test_index_tensors_on_the_device_are_followed() -> None:
    problem = PagedProblem([1, 1], [9, 30], dtype=torch.float32)
    wrapper = make_wrapper()
    wrapper.plan(**problem.plan_arguments)
    problem.kv_lens = [4, 11]
    problem.kv_len_arr.copy_(torch.tensor(problem.kv_lens))
    out, lse = wrapper.run(*problem.inputs, return_lse=True, return_lse_base_on_e=True)
    assert_close(problem, out, lse)


def test_query_offsets_on_the_device_are_followed() -> None:
    problem = PagedProblem([3, 1], [9, 30], dtype=torch.float32, causal=True)
    wrapper = make_wrapper()
    final = problem.qo_indptr.clone()
    problem.qo_indptr.copy_(torch.tensor([0, 1, 2]))
    wrapper.plan(**problem.plan_arguments)
    problem.qo_indptr.copy_(final)
    out, lse = wrapper.run(*problem.inputs, return_lse=True, return_lse_base_on_e=True)
    assert_close(problem, out, lse)


class TestGraphBuffers:
    """With use_cuda_graph, plan copies into the caller's buffers, whose addresses stay fixed."""

    def make(self) -> tuple[BatchMLAPagedAttentionWrapper, dict[str, torch.Tensor]]:
        buffers = {
            "qo_indptr": torch.full((5,), -1, dtype=torch.int32),
            "kv_indptr": torch.full((3,), -1, dtype=torch.int32),
            "kv_indices": torch.full((32,), -1, dtype=torch.int32),
            "kv_len_arr": torch.full((2,), -1, dtype=torch.int32),
        }
        return make_wrapper(use_cuda_graph=True, **buffers), buffers

    def test_plan_copies_and_replans_into_the_same_buffers(self) -> None:
        wrapper, buffers = self.make()
        addresses = [buffer.data_ptr() for buffer in buffers.values()]
        for kv_lens in ([9, 30], [17, 0]):
            problem = PagedProblem([1, 2], kv_lens, indptr_tail=1)
            wrapper.plan(**problem.plan_arguments)
            kept = [tensor.clone() for tensor in problem.index]
            for tensor in problem.index:
                tensor.fill_(-5)  # the caller's own tensors are no longer needed
            out, lse = wrapper.run(*problem.inputs, return_lse=True, return_lse_base_on_e=True)
            problem.qo_indptr, problem.kv_indptr, problem.kv_indices, problem.kv_len_arr = kept
            assert_close(problem, out, lse)
            assert torch.equal(buffers["kv_len_arr"], problem.kv_len_arr)
            assert torch.equal(buffers["qo_indptr"][:3], problem.qo_indptr[:3])
            assert torch.all(buffers["qo_indptr"][3:] == -1)
        assert addresses == [buffer.data_ptr() for buffer in buffers.values()]

    def test_run_follows_the_buffers_without_a_new_plan(self) -> None:
        wrapper, buffers = self.make()
        problem = PagedProblem([1, 2], [9, 30])
        wrapper.plan(**problem.plan_arguments)
        problem.kv_lens = [2, 21]
        buffers["kv_len_arr"].copy_(torch.tensor(problem.kv_lens))
        out, lse = wrapper.run(*problem.inputs, return_lse=True, return_lse_base_on_e=True)
        assert_close(problem, out, lse)

    def test_plan_accepts_the_buffers_themselves(self) -> None:
        wrapper, buffers = self.make()
        problem = PagedProblem([1, 2], [9, 30])
        for buffer, given_tensor in zip(buffers.values(), problem.index, strict=True):
            buffer[: given_tensor.numel()].copy_(given_tensor)
        wrapper.plan(**(problem.plan_arguments | buffers))
        out, lse = wrapper.run(*problem.inputs, return_lse=True, return_lse_base_on_e=True)
        assert_close(problem, out, lse)


def test_example_of_the_docstring() -> None:
    results = doctest.testmod(mla)
    assert results.attempted > 0
    assert results.failed == 0


def test_wrappers_share_no_state() -> None:
    first, second = PagedProblem([1], [9]), PagedProblem([2, 1], [3, 8], num_heads=2)
    wrappers = make_wrapper(), make_wrapper()
    for wrapper, problem in zip(wrappers, (first, second), strict=True):
        wrapper.plan(**problem.plan_arguments)
    for wrapper, problem in zip(wrappers, (first, second), strict=True):
        out, lse = wrapper.run(*problem.inputs, return_lse=True, return_lse_base_on_e=True)
        assert_close(problem, out, lse)
