"""Graphs whose index tensors change, wrappers on several streams, captures that fail."""

from __future__ import annotations

import math
import os
import pathlib
import random
import subprocess
import sys

import pytest
import torch
from fuzzing import compare, tensors
from gpu_helpers import SM_SCALE, check, make_problem, make_wrapper, poisoned_outputs, run_once

pytestmark = pytest.mark.gpu

REPLAYS = 1000
BATCH = 16
ROWS = 24  # of the captured queries
NUM_PAGES = {1: 6000, 16: 500, 64: 200}


class ChangingCall:
    """A captured call on fixed buffers, and new requests written into them."""

    def __init__(self, seed: int, heads: int, page_size: int):
        self.chosen = random.Random(seed)
        self.heads, self.page_size = heads, page_size
        self.num_pages = NUM_PAGES[page_size]
        self.generator = torch.Generator(device="cuda").manual_seed(seed)
        pool = torch.randn(
            self.num_pages, page_size, 576, generator=self.generator, device="cuda"
        ).bfloat16()
        self.pool = pool.view(-1, 576)
        self.queries = torch.zeros(ROWS, heads, 576, dtype=torch.bfloat16, device="cuda")
        shape = (ROWS, heads)
        self.out = torch.zeros(*shape, 512, dtype=torch.bfloat16, device="cuda")
        self.lse = torch.zeros(shape, device="cuda")
        self.index = {
            "qo_indptr": torch.zeros(BATCH + 1, dtype=torch.int32, device="cuda"),
            "kv_indptr": torch.zeros(BATCH + 1, dtype=torch.int32, device="cuda"),
            "kv_indices": torch.zeros(self.num_pages, dtype=torch.int32, device="cuda"),
            "kv_len_arr": torch.zeros(BATCH, dtype=torch.int32, device="cuda"),
        }
        self.wrapper = make_wrapper(use_cuda_graph=True, **self.index)
        self.inputs = (
            self.queries[..., :512],
            self.queries[..., 512:],
            pool[..., :512],
            pool[..., 512:],
        )

    def plan_arguments(self) -> tuple:
        dtype = torch.bfloat16
        shape = (self.heads, 512, 64, self.page_size)
        return (*self.index.values(), *shape, True, SM_SCALE, dtype, dtype)

    def capture(self) -> torch.cuda.CUDAGraph:
        self.wrapper.plan(*self.plan_arguments())
        self.run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        return graph

    def run(self) -> None:
        self.wrapper.run(*self.inputs, out=self.out, lse=self.lse, return_lse=True)

    def change(self) -> list[tensors.Group]:
        """Another number of requests, of queries each, of tokens and other pages."""
        chosen = self.chosen
        alive = chosen.randint(0, BATCH)
        q_lens, left, rows = [], self.num_pages, ROWS
        kv_lens, begins = [], [0]
        longest = chosen.choice((2, 70, 700, 5000))
        for request in range(BATCH):
            is_alive = request < alive
            q_lens.append(min(chosen.choice((1, 1, 1, 2, 4)), rows) if is_alive else 0)
            rows -= q_lens[-1]
            length = chosen.randint(0, longest) if is_alive else 0
            kv_lens.append(min(length, left * self.page_size))
            pages = -(-kv_lens[-1] // self.page_size)
            left -= pages
            begins.append(begins[-1] + pages)
        offsets = torch.tensor([0, *q_lens]).cumsum(0)
        self.index["qo_indptr"].copy_(offsets.int())
        self.index["kv_indptr"].copy_(torch.tensor(begins, dtype=torch.int32))
        self.index["kv_len_arr"].copy_(torch.tensor(kv_lens, dtype=torch.int32))
        order = torch.randperm(self.num_pages, generator=self.generator, device="cuda")
        self.index["kv_indices"].copy_(order.int())
        self.index["kv_indices"][begins[-1] :] = 2**31 - 1
        self.queries.normal_(generator=self.generator)
        self.out.fill_(math.nan)
        self.lse.fill_(math.nan)
        return tensors.make_groups(
            q_lens, kv_lens, begins, self.index["kv_indices"], self.page_size, self.heads
        )

    def judge(self, groups: list[tensors.Group]) -> torch.Tensor:
        """Errors over what is allowed, still on the GPU; infinite if a row of none is written."""
        found = compare.compare(self.queries, self.pool, groups, True, SM_SCALE, self.out, self.lse)
        covered = torch.arange(ROWS, device="cuda") < self.index["qo_indptr"][-1]
        is_left = self.out.isnan().all(-1).all(-1) & self.lse.isnan().all(-1)
        stray = torch.where(covered | is_left, 0.0, math.inf).amax()
        return torch.stack([found.element, found.rmse, found.lse, stray.double()])


@pytest.mark.parametrize(("heads", "page_size"), [(16, 64), (8, 1), (64, 16)])
def test_a_thousand_replays_under_change(heads, page_size, seed):
    """Every replay has other requests and is compared with float64; no plan in between."""
    call = ChangingCall(seed, heads, page_size)
    graph = call.capture()
    results = []
    for _ in range(REPLAYS):
        groups = call.change()
        graph.replay()
        results.append(call.judge(groups))
    worst = torch.stack(results)
    wrong = (~(worst <= 1)).any(1).nonzero().flatten().tolist()
    assert not wrong, f"replays {wrong[:10]} of {REPLAYS} are wrong: {worst[wrong[0]].tolist()}"


def test_wrappers_interleaved_on_several_streams(seed):
    """Any wrapper on any stream, one call after another on each wrapper: bits as when alone."""
    chosen = random.Random(seed)
    problems = [
        make_problem(seed + k, [1 + k % 3] * 5, [3000 * k + 90 * j for j in range(5)], heads, page)
        for k, (heads, page) in enumerate(((16, 64), (128, 64), (6, 1), (32, 16), (64, 48)))
    ]
    expected = [run_once(problem) for problem in problems]
    for problem, result in zip(problems, expected, strict=True):
        check(problem, *result)
    wrappers = [make_wrapper() for _ in problems]
    streams = [torch.cuda.Stream() for _ in range(3)]
    last = [torch.cuda.Event() for _ in problems]
    torch.cuda.synchronize()
    results = []
    for _ in range(150):
        index = chosen.randrange(len(problems))
        with torch.cuda.stream(chosen.choice(streams)):
            torch.cuda.current_stream().wait_event(last[index])
            wrappers[index].plan(*problems[index].plan_arguments())
            inputs = problems[index].run_arguments()
            results.append((index, wrappers[index].run(*inputs, return_lse=True)))
            last[index].record()
    torch.cuda.synchronize()
    for number, (index, result) in enumerate(results):
        for given, wanted in zip(result, expected[index], strict=True):
            assert torch.equal(given, wanted), f"call {number}, problem {index}"


@pytest.mark.parametrize("where", ["device", "pinned"])
@pytest.mark.parametrize("graph_buffers", [False, True], ids=("referenced", "copied"))
def test_plan_on_one_stream_and_run_on_another(graph_buffers, where, seed):
    """The stream of plan is late with the index tensors; an event is what run waits for."""
    problem = make_problem(seed, [1, 2, 1], [700, 65, 3000], 16)
    names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")
    right = [getattr(problem, name) for name in names]
    given = [torch.zeros_like(tensor) for tensor in right]
    buffers = {}
    if graph_buffers:
        buffers = {name: torch.zeros_like(t) for name, t in zip(names, right, strict=True)}
    wrapper = make_wrapper(use_cuda_graph=graph_buffers, **buffers)
    run_once(problem, wrapper)
    out, lse = poisoned_outputs(problem)
    if where == "pinned":
        given = [tensor.cpu().pin_memory() for tensor in right]
    for buffer in buffers.values():
        buffer.zero_()
    planning, running = torch.cuda.Stream(), torch.cuda.Stream()
    is_planned = torch.cuda.Event()
    torch.cuda.synchronize()
    with torch.cuda.stream(planning):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        if where == "device":
            for target, source in zip(given, right, strict=True):
                target.copy_(source)
        wrapper.plan(*given, *problem.plan_arguments()[4:])
        is_planned.record()
    with torch.cuda.stream(running):
        running.wait_event(is_planned)
        wrapper.run(*problem.run_arguments(), out=out, lse=lse, return_lse=True)
    torch.cuda.synchronize()
    check(problem, out, lse)


def captured(wrapper: object, problem: object, out: torch.Tensor, lse: torch.Tensor) -> None:
    """A good capture and its replay, compared."""
    out.fill_(math.nan)
    lse.fill_(math.nan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wrapper.run(*problem.run_arguments(), out=out, lse=lse, return_lse=True)
    graph.replay()
    check(problem, out, lse)


@pytest.mark.parametrize("launched", [False, True], ids=("before the launch", "after it"))
def test_wrapper_is_usable_after_an_error_in_a_capture(launched, seed):
    problem = make_problem(seed, [1, 2, 1], [700, 65, 3000], 16)
    wrapper = make_wrapper()
    out, lse = run_once(problem, wrapper)
    q_nope, q_pe, ckv, kpe = problem.run_arguments()

    def capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            if launched:
                wrapper.run(q_nope, q_pe, ckv, kpe, out=out, lse=lse, return_lse=True)
            wrapper.run(q_nope, q_pe[:2], ckv, kpe)

    with pytest.raises(ValueError, match="q_pe holds 2 queries"):
        capture()
    check(problem, *run_once(problem, wrapper))
    captured(wrapper, problem, out, lse)


_INVALIDATED = """
import torch
from gpu_helpers import check, make_problem, make_wrapper, run_once
problem = make_problem({seed}, [1, 2, 1], [700, 65, 3000], 16)
wrapper = make_wrapper()
out, lse = run_once(problem, wrapper)
failed = False
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        wrapper.run(*problem.run_arguments(), out=out, lse=lse, return_lse=True)
        torch.cuda.synchronize()  # not allowed: ends the capture with an error
except RuntimeError as error:
    failed = True
    print("the capture failed:", str(error).splitlines()[0])
assert failed, "the capture did not fail"
out.fill_(torch.nan)
lse.fill_(torch.nan)
wrapper.run(*problem.run_arguments(), out=out, lse=lse, return_lse=True)
check(problem, out, lse)
print("right after it")
"""


def test_wrapper_is_usable_after_an_invalidated_capture(seed):
    """In a process of its own: PyTorch may not capture again after CUDA ended a capture."""
    here = pathlib.Path(__file__).resolve()
    root = here.parents[2]
    own = [here.parent, root, root / "scripts"]  # as pyproject.toml has it for this process
    paths = [*map(str, own), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-c", _INVALIDATED.format(seed=seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    assert "right after it" in done.stdout
