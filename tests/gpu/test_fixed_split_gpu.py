"""Batch-invariant calls: a request's bits are its own, whatever else is in the batch."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from fp8_problems import check_fp8, make_fp8_problem
from gpu_helpers import (
    Problem,
    bits,
    capture_graph,
    check,
    make_problem,
    poisoned_outputs,
)
from test_hostile_gpu import Guards

import etap_flashinfer
from etap_flashinfer import dispatch, jit

pytestmark = pytest.mark.gpu

HEADS = (6, 16, 32, 64, 128)
KINDS = ("bf16", "fp16", "fp8")


def make(kind: str, seed: int, *arguments, **options) -> tuple[Problem, Callable]:
    """A problem and the function that compares its results with float64."""
    if kind == "fp8":
        return make_fp8_problem(seed, *arguments, cache_format="fp8_e4m3", **options), check_fp8
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    return make_problem(seed, *arguments, dtype=dtype, **options), check


def workspace_bytes(problem: Problem, tokens: int, entries: int | None = None) -> int:
    """What parts of ``tokens`` need, and a call without them."""
    kv_cache = "fp8" if problem.plan_options() else "same"
    variant = jit.EtapMlaVariant(
        problem.dtype,
        dispatch.choose_row_tile(problem.num_heads, 1, kv_cache),
        dispatch.choose_kv_loader(problem.page_size),
        kv_cache,
    )
    module = jit.get_etap_mla_module(variant)
    needed = module.fixed_split_workspace_bytes(
        torch.cuda.current_device(),
        problem.q_nope.shape[0],
        len(problem.kv_lens),
        problem.num_heads,
        problem.kv_indices.numel() if entries is None else entries,
        problem.page_size,
        tokens // dispatch.TOKEN_TILE,
    )
    return max(needed, module.workspace_bytes(torch.cuda.current_device()))


def make_wrapper(size: int, **arguments) -> etap_flashinfer.BatchMLAPagedAttentionWrapper:
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
    return etap_flashinfer.BatchMLAPagedAttentionWrapper(workspace, backend="etap", **arguments)


def plan(wrapper: object, problem: Problem, tokens: int) -> None:
    wrapper.plan(
        *problem.plan_arguments(),
        **problem.plan_options(),
        fixed_split_size=tokens // problem.page_size,
    )


def run(problem: Problem, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE, poisoned before, with a workspace of just the size that is needed."""
    wrapper = make_wrapper(workspace_bytes(problem, tokens))
    plan(wrapper, problem, tokens)
    out, lse = poisoned_outputs(problem)
    options = problem.run_options() | {"out": out, "lse": lse, "return_lse": True}
    wrapper.run(*problem.run_arguments(), **options)
    return out, lse


def rows_of(problem: Problem, request: int) -> slice:
    begin = sum(problem.q_lens[:request])
    return slice(begin, begin + problem.q_lens[request])


def subset(problem: Problem, requests: Sequence[int]) -> Problem:
    """Some requests of a batch, in another order, on the same pool."""
    ends = problem.kv_indptr.tolist()
    entries = [problem.kv_indices[ends[r] : ends[r + 1]] for r in requests]
    queries = torch.cat([torch.arange(*rows_of(problem, r).indices(1 << 30)) for r in requests])
    rows = queries.long().cuda()
    q_lens = [problem.q_lens[r] for r in requests]
    kv_lens = [problem.kv_lens[r] for r in requests]
    return dataclasses.replace(
        problem,
        q_nope=problem.q_nope[rows],
        q_pe=problem.q_pe[rows],
        qo_indptr=torch.tensor([0, *q_lens]).cumsum(0).int().cuda(),
        kv_indptr=torch.tensor([0, *map(len, entries)]).cumsum(0).int().cuda(),
        kv_indices=torch.cat(entries),
        kv_len_arr=torch.tensor(kv_lens, dtype=torch.int32, device="cuda"),
        q_lens=q_lens,
        kv_lens=kv_lens,
        tokens=[problem.tokens[r] for r in requests],
    )


def assert_same_bits(
    problem: Problem, results: tuple, requests: Sequence[int], found: tuple, what: str
) -> None:
    """Of each of ``requests``: ``found`` in a batch of them, ``results`` in that of all."""
    own = subset(problem, requests)
    for place, request in enumerate(requests):
        for name, whole, part in zip(("output", "LSE"), results, found, strict=True):
            expected, got = whole[rows_of(problem, request)], part[rows_of(own, place)]
            differing = int((bits(expected) != bits(got)).sum())
            assert differing == 0, (
                f"{what}: {name} of request {request} (q {problem.q_lens[request]}, length "
                f"{problem.kv_lens[request]}), number {place} of {len(requests)}: {differing} of "
                f"{got.numel()} values differ"
            )


@pytest.mark.parametrize(("page_size", "tokens"), [(1, 2048), (64, 256), (48, 192), (16, 64)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", HEADS)
def test_bits_do_not_depend_on_the_batch(heads, kind, page_size, tokens, seed):
    """Alone, and in random batches of several sizes and orders; right as well."""
    chosen = random.Random(seed)
    lengths = [20_000, 9000, 4097, 2048, 777, 128, 65, 64, 1, 0, 3000, 6000]
    q_lens = [1, 2, 1, 4, 1, 3, 1, 1, 2, 1, 1, 1]
    problem, compare = make(
        kind, seed, q_lens, lengths, num_heads=heads, page_size=page_size, causal=heads != 16
    )
    results = run(problem, tokens)
    compare(problem, *results)
    everything = range(len(lengths))
    batches = [[request] for request in chosen.sample(everything, 4)]
    batches += [chosen.sample(everything, size) for size in (2, 3, 7, 12)]
    # More companions than the first search looks at together, and than the merge keeps at once.
    batches.append([0, *(chosen.choice(everything[2:]) for _ in range(200)), 1])
    for requests in batches:
        found = run(subset(problem, requests), tokens)
        assert_same_bits(problem, results, requests, found, f"batch {requests[:12]}")


@pytest.mark.parametrize("heads", [8, 16])
@pytest.mark.parametrize("tokens", [64, 192])
@pytest.mark.parametrize("length", [1000, 8192, 65_536])
def test_bits_do_not_depend_on_how_many_share_a_request(length, tokens, heads, seed):
    """From one CTA for several requests to all CTAs for one: cuts between leaves and blocks."""
    page_size = 64
    problem, compare = make(
        "bf16", seed, [1] * 5, [length] * 5, num_heads=heads, page_size=page_size
    )
    results = run(problem, tokens)
    compare(problem, *results)
    for requests in ([0], [1, 0, 2], [0] * 16, [4, *[0] * 63], [3] * 140):
        found = run(subset(problem, requests), tokens)
        assert_same_bits(problem, results, requests, found, f"{len(requests)} requests")


@pytest.mark.parametrize("heads", [16, 128])
def test_bits_do_not_depend_on_other_query_lengths(heads, seed):
    """A companion of many queries would ask for another row tile."""
    problem, _ = make("bf16", seed, [1, 9], [5000, 700], num_heads=heads, causal=True)
    both, alone = run(problem, 512), run(subset(problem, [0]), 512)
    assert_same_bits(problem, both, [0], alone, "alone")


@pytest.mark.parametrize("heads", [16, 32])
def test_parts_of_many_row_tiles(heads, seed):
    """700 requests of several parts each: with 32 heads the merge kernel takes them in rounds."""
    problem, compare = make("bf16", seed, [1] * 700, [129] * 350 + [300] * 350, num_heads=heads)
    results = run(problem, 64)
    compare(problem, *results)
    for request in (0, 159, 160, 349, 350, 699):
        found = run(subset(problem, [request]), 64)
        assert_same_bits(problem, results, [request], found, "alone")


@pytest.mark.parametrize("heads", [16, 128])
def test_graph_replay_with_changed_lengths(heads, seed):
    """One captured call, other lengths and page tables at every replay."""
    tokens, page_size, chosen = 128, 16, random.Random(seed)
    problem, _ = make(
        "bf16", seed, [1, 2, 1, 3], [9000, 300, 700, 64], num_heads=heads, page_size=page_size
    )
    entries = problem.kv_indices.numel() + 5
    buffers = {
        "qo_indptr": problem.qo_indptr.clone(),
        "kv_indptr": problem.kv_indptr.clone(),
        "kv_indices": torch.full((entries,), -1, dtype=torch.int32, device="cuda"),
        "kv_len_arr": problem.kv_len_arr.clone(),
    }
    wrapper = make_wrapper(
        workspace_bytes(problem, tokens, entries), use_cuda_graph=True, **buffers
    )
    plan(wrapper, problem, tokens)
    out, lse = poisoned_outputs(problem)
    q_nope, q_pe, *pools = problem.run_arguments()
    queries = [q_nope.clone(), q_pe.clone()]
    graph = capture_graph(lambda: wrapper.run(*queries, *pools, out=out, lse=lse, return_lse=True))
    for _ in range(4):
        requests = chosen.sample(range(4), 4)
        changed = subset(problem, requests)
        shorter = [chosen.randrange(length + 1) for length in changed.kv_lens]
        changed = dataclasses.replace(
            changed,
            kv_lens=shorter,
            kv_len_arr=torch.tensor(shorter, dtype=torch.int32, device="cuda"),
            tokens=[own[:length] for own, length in zip(changed.tokens, shorter, strict=True)],
        )
        for name, buffer in buffers.items():
            given = getattr(changed, name)
            buffer[: given.numel()].copy_(given)
        queries[0].copy_(changed.q_nope)
        queries[1].copy_(changed.q_pe)
        out.fill_(math.nan)
        lse.fill_(math.nan)
        graph.replay()
        check(changed, out, lse)
        for place in range(4):
            found = run(subset(changed, [place]), tokens)
            assert_same_bits(changed, (out, lse), [place], found, "alone, without a graph")


@pytest.mark.parametrize("heads", [3, 16, 128])
def test_random_index_tensors(heads, seed):
    """Any numbers at all: every call ends, the workspace's bands stay, the next call is right."""
    tokens = 64
    problem, _ = make(
        "bf16",
        seed,
        [1, 2, 3, 1, 1, 1],
        [130, 1, 700, 64, 0, 333],
        num_heads=heads,
        spare_entries=0,
        causal=True,
    )
    guards = Guards(0x7F)
    size = workspace_bytes(problem, tokens)
    workspace = guards.around("the workspace", torch.empty(size, dtype=torch.uint8, device="cuda"))
    out, lse = (
        guards.around(name, tensor)
        for name, tensor in zip(("out", "lse"), poisoned_outputs(problem), strict=True)
    )
    wrapper = etap_flashinfer.BatchMLAPagedAttentionWrapper(workspace, backend="etap")
    plan(wrapper, problem, tokens)
    index = [problem.qo_indptr, problem.kv_indptr, problem.kv_indices, problem.kv_len_arr]
    right = [tensor.clone() for tensor in index]
    expected = run(problem, tokens)
    generator = torch.Generator(device="cuda").manual_seed(seed)
    for number in range(60):
        high = 2**31 if number % 2 else 40
        for tensor in index if number % 3 else index[number % 4 : number % 4 + 1]:
            tensor.random_(-high, high, generator=generator)
        wrapper.run(*problem.run_arguments(), out=out, lse=lse, return_lse=True)
        guards.check()
        for tensor, before in zip(index, right, strict=True):
            tensor.copy_(before)
    out.fill_(math.nan)
    lse.fill_(math.nan)
    wrapper.run(*problem.run_arguments(), out=out, lse=lse, return_lse=True)
    guards.check()
    for given, wanted in zip((out, lse), expected, strict=True):
        assert torch.equal(bits(given), bits(wanted))


def test_a_workspace_too_small_is_refused(seed):
    """By plan where it knows the queries, else by run; nothing is launched."""
    problem, _ = make("bf16", seed, [1] * 16, [20_000] * 16)
    needed = workspace_bytes(problem, 64)
    wrapper = make_wrapper(needed - 16)
    plan(wrapper, problem, 64)
    out, lse = poisoned_outputs(problem)
    with pytest.raises(ValueError, match=rf"has {needed - 16} bytes; {needed} are needed"):
        wrapper.run(*problem.run_arguments(), out=out, lse=lse, return_lse=True)
    torch.cuda.synchronize()
    assert out.isnan().all()
    on_host = dataclasses.replace(problem, qo_indptr=problem.qo_indptr.cpu())
    with pytest.raises(ValueError, match=rf"has {needed - 16} bytes; .* needs {needed}"):
        plan(wrapper, on_host, 64)
    plan(wrapper, on_host, 1 << 20)  # no request can have two parts: needs nothing
    check(problem, *wrapper.run(*problem.run_arguments(), return_lse=True))
