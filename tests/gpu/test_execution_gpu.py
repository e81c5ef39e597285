"""How calls are made: repeats, CUDA graphs, streams, devices, and no hidden synchronisation."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from gpu_helpers import (
    Problem,
    bits,
    capture_graph,
    check,
    make_problem,
    make_wrapper,
    poisoned_outputs,
    run_once,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("heads", [6, 16, 32, 64, 128])
def test_bitwise_repeatable(heads, page_size, seed):
    """Same call, same bits: also on another wrapper, whose workspace holds other garbage."""
    problem = make_problem(seed, [1, 2, 1, 3], [5000, 1, 20_000, 777], heads, page_size)
    wrapper = make_wrapper()
    first_out, first_lse = run_once(problem, wrapper)
    for repeat in range(20):
        out, lse = run_once(problem, make_wrapper() if repeat == 19 else wrapper)
        assert torch.equal(bits(out), bits(first_out)), f"output differs in repeat {repeat}"
        assert torch.equal(bits(lse), bits(first_lse)), f"LSE differs in repeat {repeat}"


class GraphBuffers:
    """Fixed buffers of a captured call and the wrapper on them."""

    def __init__(self, problem: Problem, most_entries: int):
        batch = len(problem.kv_lens)
        self.qo_indptr = torch.zeros(batch + 1, dtype=torch.int32, device="cuda")
        self.kv_indptr = torch.zeros(batch + 1, dtype=torch.int32, device="cuda")
        self.kv_indices = torch.full((most_entries,), -1, dtype=torch.int32, device="cuda")
        self.kv_len_arr = torch.zeros(batch, dtype=torch.int32, device="cuda")
        self.wrapper = make_wrapper(
            use_cuda_graph=True,
            qo_indptr=self.qo_indptr,
            kv_indptr=self.kv_indptr,
            kv_indices=self.kv_indices,
            kv_len_arr=self.kv_len_arr,
        )

    def copy_in_place(self, problem: Problem) -> None:
        """New lengths, pages and page tables without a plan()."""
        self.qo_indptr.copy_(problem.qo_indptr)
        self.kv_indptr.copy_(problem.kv_indptr)
        self.kv_indices.fill_(2**31 - 1)
        self.kv_indices[: problem.kv_indices.numel()].copy_(problem.kv_indices)
        self.kv_len_arr.copy_(problem.kv_len_arr)


def _graph_rounds(seed: int, heads: int, page_size: int) -> list[Problem]:
    chosen = random.Random(seed)
    rounds = []
    for index, longest in enumerate((300, 9000, 65, 1, 30_000, 2)):
        q_lens = chosen.sample([1, 1, 2, 3, 1], 5)  # the same total, another share each round
        lengths = [chosen.randrange(longest) for _ in range(5)]
        lengths[chosen.randrange(5)] = longest
        rounds.append(make_problem(seed + index, q_lens, lengths, heads, page_size, causal=True))
    return rounds


@pytest.mark.parametrize("replan", [False, True], ids=("in place", "new plan"))
@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("heads", [16, 128])
def test_graph_replay_with_changed_lengths(heads, page_size, replan, seed):
    rounds = _graph_rounds(seed, heads, page_size)
    pages = max(problem.ckv.shape[0] for problem in rounds)
    pool = torch.full((pages, page_size, 576), torch.nan, device="cuda").to(torch.bfloat16)
    buffers = GraphBuffers(rounds[0], max(p.kv_indices.numel() for p in rounds) + 3)
    buffers.wrapper.plan(*rounds[0].plan_arguments())
    queries = torch.zeros(8, heads, 576, dtype=torch.bfloat16, device="cuda")
    arguments = (queries[..., :512], queries[..., 512:], pool[..., :512], pool[..., 512:])
    out, lse = poisoned_outputs(rounds[0])

    def call() -> None:
        buffers.wrapper.run(*arguments, out=out, lse=lse, return_lse=True)

    graph = capture_graph(call)
    for problem in rounds:
        own_pages = problem.ckv.shape[0]
        pool.fill_(torch.nan)
        pool[:own_pages, :, :512], pool[:own_pages, :, 512:] = problem.ckv, problem.kpe
        queries[..., :512], queries[..., 512:] = problem.q_nope, problem.q_pe
        if replan:
            buffers.wrapper.plan(*problem.plan_arguments())
        else:
            buffers.copy_in_place(problem)
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        check(problem, out, lse)


def test_two_wrappers_on_two_streams(seed):
    problems = [
        make_problem(seed, [1] * 9, [4000 + 100 * k for k in range(9)], 16),
        make_problem(seed + 1, [2] * 7, [9000 - 700 * k for k in range(7)], 64, causal=True),
    ]
    wrappers = [make_wrapper() for _ in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    results: list[list] = [[], []]
    torch.cuda.synchronize()
    for _ in range(15):
        for index, problem in enumerate(problems):
            with torch.cuda.stream(streams[index]):
                wrappers[index].plan(*problem.plan_arguments())
                results[index].append(
                    wrappers[index].run(*problem.run_arguments(), return_lse=True)
                )
    torch.cuda.synchronize()
    for problem, runs in zip(problems, results, strict=True):
        check(problem, *runs[0])
        for out, lse in runs[1:]:
            assert torch.equal(bits(out), bits(runs[0][0]))
            assert torch.equal(bits(lse), bits(runs[0][1]))


def test_plan_and_run_never_synchronise(seed):
    """With its tensors on the GPU neither plan() nor run() copies to the host or waits."""
    problem = make_problem(seed, [1] * 4, [65, 1000, 1, 300], 16)
    wrapper = make_wrapper()
    run_once(problem, wrapper)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        wrapper.plan(*problem.plan_arguments())
        out, lse = wrapper.run(*problem.run_arguments(), return_lse=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check(problem, out, lse)


def test_one_wrapper_planned_again(seed):
    """A wrapper keeps nothing of an earlier plan: shapes, pages, types and scale all change."""
    wrapper = make_wrapper()
    for index, (heads, page_size, dtype) in enumerate(
        ((128, 64, torch.bfloat16), (6, 1, torch.float16), (16, 48, torch.bfloat16))
    ):
        problem = make_problem(
            seed + index, [1, 2, 1], [90 * (index + 1), 5, 1000], heads, page_size, dtype
        )
        check(problem, *run_once(problem, wrapper))


def test_auto_takes_etap(seed):
    import etap_flashinfer

    problem = make_problem(seed, [1] * 3, [65, 1000, 1], 16)
    workspace = torch.empty(128 * 1024 * 1024, dtype=torch.uint8, device="cuda")
    wrapper = etap_flashinfer.BatchMLAPagedAttentionWrapper(workspace, backend="auto")
    check(problem, *run_once(problem, wrapper))
    assert wrapper.backend == "etap"


def test_memory_does_not_grow_with_context(seed):
    """Beyond the inputs and the workspace a call of 64K tokens allocates what one of 64 does."""
    grown = []
    for length in (64, 65_536):
        problem = make_problem(seed, [1] * 4, [length] * 4, 16)
        wrapper = make_wrapper()
        run_once(problem, wrapper)
        out, lse = poisoned_outputs(problem)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        wrapper.run(*problem.run_arguments(), out=out, lse=lse, return_lse=True)
        torch.cuda.synchronize()
        grown.append(torch.cuda.max_memory_allocated() - before)
    assert grown[0] == grown[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_second_gpu(seed):
    problem = make_problem(seed, [1, 2], [700, 65], 16)
    names = ("q_nope", "q_pe", "ckv", "kpe", "qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")
    moved = dataclasses.replace(
        problem, **{name: getattr(problem, name).to("cuda:1") for name in names}
    )
    out, lse = run_once(moved, make_wrapper("cuda:1"))
    assert torch.cuda.current_device() == 0
    check(problem, out.to("cuda:0"), lse.to("cuda:0"))
