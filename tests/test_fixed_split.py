"""Batch-invariant plans: what they refuse, and what of them reaches the kernel."""

import fake_kernel
import pytest
import torch
import wrapper_problem
from fake_kernel import META, FakeKernel, Variant, plan_arguments, run_inputs

from etap_flashinfer import BatchMLAPagedAttentionWrapper, stock


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    return fake_kernel.install(monkeypatch)


def make_wrapper() -> BatchMLAPagedAttentionWrapper:
    workspace = torch.empty(fake_kernel.WORKSPACE_BYTES, dtype=torch.int8, device=META)
    return BatchMLAPagedAttentionWrapper(workspace, backend="etap")


@pytest.mark.parametrize(("page_size", "pages", "tiles"), [(64, 4, 4), (1, 2048, 32), (48, 8, 6)])
def test_the_kernel_gets_token_tiles(
    kernel: FakeKernel, page_size: int, pages: int, tiles: int
) -> None:
    wrapper = make_wrapper()
    lengths = torch.tensor([100, 100], dtype=torch.int32, device=META)
    planned = plan_arguments(index_device=META, page_size=page_size, kv_len_arr=lengths)
    wrapper.plan(**planned, fixed_split_size=pages)
    wrapper.run(**run_inputs(page_size=page_size))
    assert kernel.calls[0][1][-1] == tiles
    wrapper.plan(**planned)  # keeps nothing of the plan before
    wrapper.run(**run_inputs(page_size=page_size))
    assert kernel.calls[1][1][-1] == 0


@pytest.mark.parametrize(
    ("num_heads", "row_tile"), [(6, 8), (16, 16), (17, 32), (64, 64), (128, 128)]
)
@pytest.mark.parametrize("query_lens", [(1, 1), (1, 3), (4, 4)])
def test_the_row_tile_is_that_of_one_query(
    kernel: FakeKernel, num_heads: int, row_tile: int, query_lens: tuple[int, ...]
) -> None:
    wrapper = make_wrapper()
    wrapper.plan(**plan_arguments(query_lens, num_heads=num_heads), fixed_split_size=2)
    wrapper.run(**run_inputs(sum(query_lens), num_heads))
    assert kernel.calls[0][0] == Variant(torch.bfloat16, row_tile, "tma")


def test_a_workspace_too_small_is_refused(kernel: FakeKernel) -> None:
    wrapper = make_wrapper()
    planned = plan_arguments((1, 3))
    wrapper.plan(**planned, fixed_split_size=2)
    # device (META has no index), queries, requests, heads, entries of kv_indices, page size, tiles
    assert kernel.fixed_splits == [(None, 4, 2, 16, 4, 64, 2)]
    with pytest.raises(ValueError, match=r"has 4096 bytes; the ETAP kernel needs 4097"):
        wrapper.plan(**planned, fixed_split_size=1)
    with pytest.raises(RuntimeError, match="before plan"):
        wrapper.run(**run_inputs(4))
    # Queries unknown on the host: the run asks for itself.
    wrapper.plan(**plan_arguments(index_device=META), fixed_split_size=1)
    wrapper.run(**run_inputs())
    assert len(kernel.fixed_splits) == 2


@pytest.mark.parametrize("backend", ["etap", "reference"])
@pytest.mark.parametrize(
    ("page_size", "pages", "error", "message"),
    [
        (1, 100, ValueError, "100 pages of 1 tokens; it must be a positive multiple of 64 pages"),
        (48, 2, ValueError, "multiple of 4 pages"),
        (64, 0, ValueError, "0 pages of 64 tokens; it must be a positive multiple of 1 pages"),
        (64, -1, ValueError, "-1 pages"),
        (64, 2.0, TypeError, "fixed_split_size is 2.0; it must be an int or None"),
        (64, True, TypeError, "fixed_split_size is True"),
    ],
)
def test_refused_sizes(kernel, backend, page_size, pages, error, message) -> None:
    device = META if backend == "etap" else torch.device("cpu")
    workspace = torch.empty(fake_kernel.WORKSPACE_BYTES, dtype=torch.int8, device=device)
    wrapper = BatchMLAPagedAttentionWrapper(workspace, backend=backend)
    with pytest.raises(error, match=message):
        wrapper.plan(**plan_arguments(page_size=page_size), fixed_split_size=pages)


def test_auto_does_not_turn_to_stock(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other kernels would take the plan, but not keep the promise."""
    workspace = torch.empty(fake_kernel.WORKSPACE_BYTES, dtype=torch.int8, device=META)
    wrapper = BatchMLAPagedAttentionWrapper(workspace, backend="auto")
    monkeypatch.setattr(stock, "make_wrapper", lambda *_: pytest.fail("took a stock wrapper"))
    with pytest.raises(ValueError, match=r"'auto' does not take \(for ETAP: .*num_heads 200"):
        wrapper.plan(**plan_arguments(num_heads=200), fixed_split_size=2)


def test_stock_backends_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock, "make_wrapper", lambda *_: None)
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(64, device=META), backend="fa2")
    with pytest.raises(ValueError, match="fixed_split_size is 2, which backend 'fa2' does not"):
        wrapper.plan(**plan_arguments(), fixed_split_size=2)


def test_the_reference_is_batch_invariant() -> None:
    """The bits of a request alone are those in a batch, with and without the argument."""
    problem = wrapper_problem.PagedProblem([2, 1, 3], [150, 65, 7], page_size=16, causal=True)
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(16, dtype=torch.uint8))
    results = []
    for pages in (4, None):
        wrapper.plan(**problem.plan_arguments, fixed_split_size=pages)
        results.append(wrapper.run(*problem.inputs))
    begin, end = problem.kv_indptr[1:3].tolist()
    alone = problem.plan_arguments | {
        "qo_indptr": torch.tensor([0, 1], dtype=torch.int32),
        "kv_indptr": torch.tensor([0, end - begin], dtype=torch.int32),
        "kv_indices": problem.kv_indices[begin:end].clone(),
        "kv_len_arr": problem.kv_len_arr[1:2].clone(),
    }
    wrapper.plan(**alone, fixed_split_size=4)
    q_nope, q_pe, ckv, kpe = problem.inputs
    assert torch.equal(results[0], results[1])
    assert torch.equal(wrapper.run(q_nope[2:3], q_pe[2:3], ckv, kpe), results[0][2:3])
