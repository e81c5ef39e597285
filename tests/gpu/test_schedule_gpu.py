"""The schedule that the kernel keeps between calls: never used where it is not this call's."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from fp8_problems import check_fp8, make_fp8_problem
from gpu_helpers import (
    Problem,
    bits,
    capture_graph,
    check,
    kept_schedules,
    make_problem,
    make_wrapper,
    poisoned_outputs,
    run_once,
)
from test_hostile_gpu import Guards

import etap_flashinfer
from etap_flashinfer import execution

pytestmark = pytest.mark.gpu

HEADS = (8, 16, 32, 64, 128)
INDEX = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")
Results = tuple[torch.Tensor, torch.Tensor]


def kept_part(wrapper: object) -> torch.Tensor:
    """What each CTA keeps of a call, as ``[CTAs, bytes]``; not its counters of calls and parts."""
    return kept_schedules(wrapper)[:, :-128]


def assert_same_bits(found: Results, expected: Results, what: str) -> None:
    for name, given, wanted in zip(("output", "LSE"), found, expected, strict=True):
        differing = int((bits(given) != bits(wanted)).sum())
        assert differing == 0, f"{what}: {differing} of {given.numel()} values of the {name} differ"


class InPlaceCall:
    """A call planned once, on index tensors that are changed in place."""

    def __init__(self, problem: Problem, wrapper: object | None = None, **plan_options) -> None:
        self.wrapper = make_wrapper() if wrapper is None else wrapper
        self.plan_options = problem.plan_options() | plan_options
        self.index = {name: getattr(problem, name).clone() for name in INDEX}
        spare = torch.full((8,), -1, dtype=torch.int32, device="cuda")
        self.index["kv_indices"] = torch.cat([self.index["kv_indices"], spare])
        self.problem = dataclasses.replace(problem, **self.index)
        self.results = poisoned_outputs(problem)
        self.plan()

    def plan(self) -> None:
        self.wrapper.plan(*self.problem.plan_arguments(), **self.plan_options)

    def change(self, problem: Problem) -> None:
        """Write a problem of the same sizes into the index tensors."""
        for name, buffer in self.index.items():
            given = getattr(problem, name)
            buffer[: given.numel()].copy_(given)
        self.problem = dataclasses.replace(problem, **self.index)

    def run(self) -> None:
        out, lse = self.results
        options = self.problem.run_options() | {"out": out, "lse": lse, "return_lse": True}
        self.wrapper.run(*self.problem.run_arguments(), **options)

    def poison(self) -> None:
        for result in self.results:
            result.fill_(torch.nan)

    def fresh(self) -> Results:
        """The results of a wrapper that has kept nothing, on copies of the index tensors."""
        copies = {name: buffer.clone() for name, buffer in self.index.items()}
        wrapper = make_wrapper()
        problem = dataclasses.replace(self.problem, **copies)
        wrapper.plan(*problem.plan_arguments(), **self.plan_options)
        options = problem.run_options() | {"return_lse": True}
        found: Results = wrapper.run(*problem.run_arguments(), **options)
        return found

    def assert_right(self, what: str) -> None:
        """Of the schedule that this call makes, and of the one that it then keeps."""
        expected = self.fresh()
        for number in ("first", "second"):
            self.poison()
            self.run()
            assert_same_bits(self.results, expected, f"{what}, {number} call")
        compare = check_fp8 if self.problem.plan_options() else check
        compare(self.problem, *self.results)


def with_lengths(problem: Problem, kv_lens: Sequence[int]) -> Problem:
    """The problem with requests cut to these lengths."""
    tokens = [own[:length] for own, length in zip(problem.tokens, kv_lens, strict=True)]
    lengths = torch.tensor(list(kv_lens), dtype=torch.int32, device="cuda")
    return dataclasses.replace(problem, kv_lens=list(kv_lens), kv_len_arr=lengths, tokens=tokens)


def with_page_offsets_moved(problem: Problem) -> Problem:
    """The same pages, one entry further back in the page table."""
    entries = torch.cat([problem.kv_indices.new_full((1,), -1), problem.kv_indices])
    return dataclasses.replace(problem, kv_indptr=problem.kv_indptr + 1, kv_indices=entries)


def with_queries_of(problem: Problem, q_lens: Sequence[int]) -> Problem:
    """The same rows of queries, dealt out otherwise."""
    assert sum(q_lens) == sum(problem.q_lens)
    offsets = torch.tensor([0, *q_lens]).cumsum(0).int().cuda()
    return dataclasses.replace(problem, q_lens=list(q_lens), qo_indptr=offsets)


def with_pages_moved(problem: Problem) -> Problem:
    """The same tokens on other pages: changes the pool in place."""
    pages = problem.ckv.shape[0]
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(pages)).cuda()
    for pool in (problem.ckv, problem.kpe):
        pool.copy_(pool[order])
    is_page = (problem.kv_indices >= 0) & (problem.kv_indices < pages)
    moved = order.argsort()[problem.kv_indices.clamp(0, pages - 1).long()].int()
    return dataclasses.replace(problem, kv_indices=torch.where(is_page, moved, problem.kv_indices))


def changes(problem: Problem) -> Iterator[tuple[str, Problem]]:
    """The problem after every kind of change, one after another; each ends the one before."""
    full, lengths = problem, list(problem.kv_lens)
    yield "as planned", problem
    lengths[1] -= 1
    yield "one token less", with_lengths(full, lengths)
    lengths[0] = (lengths[0] - 1) // 64 * 64
    yield "one tile less", with_lengths(full, lengths)
    full = with_page_offsets_moved(full)
    yield "page offsets", with_lengths(full, lengths)
    full = with_queries_of(full, full.q_lens[::-1])
    yield "query offsets", with_lengths(full, lengths)
    full = with_pages_moved(full)
    yield "pages alone", with_lengths(full, lengths)
    lengths[3] = 0
    yield "a request without tokens", with_lengths(full, lengths)
    lengths[3:] = [0] * len(lengths[3:])
    yield "half of the requests without tokens", with_lengths(full, lengths)
    yield "all tokens again", full


LENGTHS = [321, 5000, 64, 777, 1, 2000]
Q_LENS = [1, 1, 2, 1, 1, 3]


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("heads", HEADS)
def test_index_tensors_changed_in_place(heads, page_size, seed):
    """One plan; every change is followed at the next call."""
    problem = make_problem(seed, Q_LENS, LENGTHS, heads, page_size, causal=True)
    call = InPlaceCall(problem)
    for what, changed in changes(problem):
        call.change(changed)
        call.assert_right(what)


@pytest.mark.parametrize("heads", [16, 128])
def test_changes_between_replays(heads, seed):
    """As above, but one captured call."""
    problem = make_problem(seed, Q_LENS, LENGTHS, heads, 64, causal=True)
    call = InPlaceCall(problem)
    graph = capture_graph(call.run)
    for what, changed in changes(problem):
        call.change(changed)
        expected = call.fresh()
        for number in ("first", "second"):
            call.poison()
            graph.replay()
            assert_same_bits(call.results, expected, f"{what}, {number} replay")
        check(call.problem, *call.results)


def test_layers_of_a_step(seed):
    """The schedule stays, queries and caches are other ones."""
    problem = make_problem(seed, [1] * 5, [321, 5000, 64, 0, 777], 16)
    call = InPlaceCall(problem)
    call.assert_right("the first layer")
    generator = torch.Generator(device="cuda").manual_seed(seed)
    for number in range(3):
        pool = torch.cat([problem.ckv, problem.kpe], -1)
        is_token = pool.isfinite().all(-1)
        shape = (int(is_token.sum()), 576)
        pool[is_token] = torch.randn(shape, generator=generator, device="cuda").to(pool.dtype)
        layer = with_tokens_of(problem, pool)
        layer.q_nope = torch.empty_like(problem.q_nope).normal_(generator=generator)
        call.change(layer)
        call.assert_right(f"layer {number}")


def with_tokens_of(problem: Problem, pool: torch.Tensor) -> Problem:
    """The problem with another pool ``[pages, page_size, 576]``, read by its page table."""
    starts, tokens = problem.kv_indptr.tolist(), []
    for start, length in zip(starts, problem.kv_lens, strict=False):
        pages = problem.kv_indices[start : start - (-length // problem.page_size)].long()
        tokens.append(pool[pages].flatten(0, 1)[:length])
    return dataclasses.replace(problem, ckv=pool[..., :512], kpe=pool[..., 512:], tokens=tokens)


def alternatives(seed: int) -> dict[str, InPlaceCall]:
    """Calls of one wrapper, many of which differ in one thing alone."""
    lengths, wrapper = [700, 65, 3000, 1], make_wrapper()
    common = {"num_heads": 64, "causal": True}
    several = make_problem(seed, [1, 3, 1, 1], lengths, 16, causal=True)
    problems = {
        "bf16": make_problem(seed, [1] * 4, lengths, **common),
        "not causal": make_problem(seed, [1] * 4, lengths, num_heads=64),
        "fp16": make_problem(seed, [1] * 4, lengths, dtype=torch.float16, **common),
        "16 heads": make_problem(seed, [1] * 4, lengths, num_heads=16, causal=True),
        "128 heads": make_problem(seed, [1] * 4, lengths, num_heads=128, causal=True),
        "two queries": make_problem(seed, [2] * 4, lengths, **common),
        "mean of queries": several,
        "most queries": dataclasses.replace(several, qo_indptr=several.qo_indptr.cpu()),
        "pages of 16": make_problem(seed, [1] * 4, lengths, page_size=16, **common),
        "pages of 1": make_problem(seed, [1] * 4, lengths, page_size=1, **common),
        "a request more": make_problem(seed, [1] * 5, [*lengths, 500], **common),
        "a request less": make_problem(seed, [1] * 3, lengths[:3], **common),
    }
    for cache_format in ("fp8_e4m3", "flashmla_656"):
        problems[cache_format] = make_fp8_problem(
            seed, [1] * 4, lengths, cache_format=cache_format, **common
        )
    calls = {name: InPlaceCall(problem, wrapper) for name, problem in problems.items()}
    fixed = problems["bf16"]
    for pages in (1, 4):
        calls[f"fixed split of {pages}"] = InPlaceCall(fixed, wrapper, fixed_split_size=pages)
    return calls


def test_plans_in_turns_on_one_wrapper(seed):
    """Row tiles, loaders and caches of all kinds use one buffer."""
    calls = alternatives(seed)
    chosen = random.Random(seed)
    expected = {name: call.fresh() for name, call in calls.items()}
    for name, call in calls.items():
        call.plan()
        call.assert_right(name)
    before = ""
    for _ in range(200):
        name = chosen.choice(list(calls))
        call = calls[name]
        call.plan()
        call.poison()
        call.run()
        assert_same_bits(call.results, expected[name], f"{name} after {before}")
        before = name


@pytest.mark.parametrize("heads", [16, 128])
def test_fixed_splits_alternate_with_ordinary_calls(heads, seed):
    problem = make_problem(seed, Q_LENS, LENGTHS, heads, 64, causal=True)
    ordinary = InPlaceCall(problem)
    fixed = InPlaceCall(problem, ordinary.wrapper, fixed_split_size=4)
    for what, changed in changes(problem):
        for call, kind in ((ordinary, "ordinary"), (fixed, "fixed split"), (ordinary, "again")):
            call.change(changed)
            call.plan()
            call.assert_right(f"{what}, {kind}")


@pytest.mark.parametrize("heads", [16, 128])
def test_two_graphs_of_one_wrapper(heads, seed):
    """Captured with other numbers of requests, replayed in turns, lengths changed in between."""
    chosen = random.Random(seed)
    wrapper = make_wrapper()
    problems = [
        make_problem(seed, [1] * 4, [3000, 700, 65, 128], heads),
        make_problem(seed + 1, [1] * 7, [5000, 1, 64, 640, 90, 2000, 333], heads),
    ]
    calls = [InPlaceCall(problem, wrapper) for problem in problems]
    graphs = []
    for call in calls:
        call.plan()
        graphs.append(capture_graph(call.run))
    for turn in range(12):
        which = turn % 2
        call, problem = calls[which], problems[which]
        if chosen.random() < 0.7:
            lengths = [chosen.randint(0, length) for length in problem.kv_lens]
            call.change(with_lengths(problem, lengths))
        expected = call.fresh()
        for _ in range(chosen.choice((1, 2))):
            call.poison()
            graphs[which].replay()
            assert_same_bits(call.results, expected, f"turn {turn}")
        check(call.problem, *call.results)


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("batch", [1, 31, 32, 33, 128, 383, 384, 385, 500])
def test_numbers_of_requests(batch, heads, seed):
    """Also more than are kept; the first, a middle and the last request change in turns."""
    chosen = random.Random(seed)
    lengths = [chosen.choice((1, 64, 65, 200, 700)) for _ in range(batch)]
    problem = make_problem(seed, [1] * batch, lengths, heads)
    call = InPlaceCall(problem)
    call.assert_right("as planned")
    for request in (0, batch // 2, batch - 1):
        lengths[request] -= 1
        call.change(with_lengths(problem, lengths))
        call.assert_right(f"request {request} shorter")


def test_whatever_is_in_the_buffer(seed):
    """Random bytes, or what another wrapper kept of other requests or of the same; not counters."""
    problem = make_problem(seed, [1] * 6, LENGTHS, 16)
    call, other = InPlaceCall(problem), InPlaceCall(problem)
    kept, others = kept_part(call.wrapper), kept_part(other.wrapper)
    generator = torch.Generator(device="cuda").manual_seed(seed)
    for number in range(20):
        kept.copy_(torch.randint(0, 256, kept.shape, generator=generator, device="cuda"))
        call.assert_right(f"random bytes, {number}")
        # Small numbers are likelier to be taken for right ones.
        words = torch.randint(-2, 70, (len(kept), kept.shape[1] // 4), dtype=torch.int32)
        kept.copy_(words.view(torch.uint8))
        call.assert_right(f"small random numbers, {number}")
    for byte in (0, 1, 0xFF):
        kept.fill_(byte)
        call.assert_right(f"bytes of {byte}")
    for lengths in (LENGTHS, LENGTHS[::-1]):
        cut = [min(pair) for pair in zip(lengths, problem.kv_lens, strict=True)]
        other.change(with_lengths(problem, cut))
        other.run()
        kept.copy_(others)
        call.assert_right(f"kept by another wrapper for {cut}")


def test_half_of_the_buffer_is_another_calls(seed):
    """Each CTA judges what it has kept by itself."""
    problem = make_problem(seed, [1] * 6, LENGTHS, 16)
    call = InPlaceCall(problem)
    schedule = kept_part(call.wrapper)
    call.run()
    right = schedule.clone()
    shorter = with_lengths(problem, [length // 2 for length in LENGTHS])
    call.change(shorter)
    call.run()
    half = len(schedule) // 2
    schedule[half:] = right[half:]
    call.assert_right("the second half of the buffer of longer requests")
    call.change(problem)
    call.assert_right("longer requests again")


def test_wrappers_with_one_workspace(seed):
    """What FlashInfer's users do: the float workspace is shared, one call after another."""
    workspace = torch.full((128 << 20,), 0xFF, dtype=torch.uint8, device="cuda")
    calls = []
    for number, heads in enumerate((16, 128, 16)):
        wrapper = etap_flashinfer.BatchMLAPagedAttentionWrapper(workspace, backend="etap")
        problem = make_problem(seed + number, [1] * (4 + number), LENGTHS[: 4 + number], heads)
        calls.append(InPlaceCall(problem, wrapper))
    for _ in range(3):
        for number, call in enumerate(calls):
            call.assert_right(f"wrapper {number}")


@pytest.mark.parametrize("heads", [16, 128])
def test_nothing_is_written_around_the_buffer(heads, seed, monkeypatch):
    guards = Guards(0x7F)
    make = execution.make_kept_memory
    monkeypatch.setattr(
        execution, "make_kept_memory", lambda *given: guards.around("what is kept", make(*given))
    )
    for batch in (1, 6, 384, 385):
        lengths = ([321, 90, 64, 0] * 97)[:batch]
        wrapper = make_wrapper()
        problem = make_problem(seed + batch, [1] * batch, lengths, heads)
        for _ in range(2):
            check(problem, *run_once(problem, wrapper))
            guards.check()


def test_a_batch_planned_anew_with_equal_numbers(seed):
    """Index tensors from the CPU: every plan brings new copies of them."""
    problem = make_problem(seed, [1] * 6, LENGTHS, 16)
    on_host = {name: getattr(problem, name).cpu() for name in INDEX}
    wrapper = make_wrapper()
    expected = run_once(problem)
    for length in (5000, 5000, 4999, 5000):
        on_host["kv_len_arr"][1] = length
        lengths = [LENGTHS[0], length, *LENGTHS[2:]]
        given = dataclasses.replace(with_lengths(problem, lengths), **on_host)
        found = run_once(given, wrapper)
        check(given, *found)
        if length == 5000:
            assert_same_bits(found, expected, "planned anew")
