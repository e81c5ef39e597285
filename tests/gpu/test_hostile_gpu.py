"""Index tensors that lie, and guard bands: nothing outside the buffers matters or changes.

What a request gets for its own wrong entries is in test_tensors_gpu.py (pages outside the pool,
lengths beyond the pages, page ranges beyond the table).
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from gpu_helpers import Problem, check, make_problem, make_wrapper, run_once

import etap_flashinfer
from etap_flashinfer import validation

pytestmark = pytest.mark.gpu

BAND_BYTES = 1 << 16
# All row tiles with both loaders, up to 3 queries a request.
HEADS = (3, 8, 16, 64)
PAGE_SIZES = (1, 48, 64)


class Guards:
    """Allocations in which tensors lie between two bands of one repeated byte.

    0xFF makes NaN and -1, 0x7F makes very large numbers: whoever reads a band gets a wrong result.
    """

    def __init__(self, byte: int):
        self.byte = byte
        self.bands: list[tuple[str, torch.Tensor]] = []

    def around(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of ``tensor`` between bands; nothing lies between it and them."""
        size = tensor.numel() * tensor.element_size()
        raw = torch.full((2 * BAND_BYTES + size,), self.byte, dtype=torch.uint8, device="cuda")
        self.bands += [
            (f"in front of {name}", raw[:BAND_BYTES]),
            (f"behind {name}", raw[BAND_BYTES + size :]),
        ]
        inside = raw[BAND_BYTES : BAND_BYTES + size].view(tensor.dtype).view(tensor.shape)
        return inside.copy_(tensor)

    def check(self) -> None:
        changed = [name for name, band in self.bands if not bool((band == self.byte).all())]
        assert not changed, f"written to: {', '.join(changed)}"


def workspace_bytes(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that the kernel variants of a problem ask for."""
    needed: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(validation, "check_workspace_bytes", lambda _, count: needed.append(count))
        run_once(problem)
    return max(needed)


def between_guards(
    problem: Problem, guards: Guards, size: int
) -> tuple[Problem, object, tuple[torch.Tensor, torch.Tensor]]:
    """The problem with every tensor between bands, a wrapper and results likewise.

    The pool is cut down to pages in use, and the page table to its entries, so that bands begin
    where the last visible page and the last entry end.
    """
    entries = problem.kv_indices[: int(problem.kv_indptr[-1])].long()
    pages, ranks = entries.unique(return_inverse=True)
    pool = guards.around("the pool", torch.cat([problem.ckv, problem.kpe], -1)[pages])
    query = guards.around("the queries", torch.cat([problem.q_nope, problem.q_pe], -1))
    guarded = dataclasses.replace(
        problem,
        q_nope=query[..., :512],
        q_pe=query[..., 512:],
        ckv=pool[..., :512],
        kpe=pool[..., 512:],
        qo_indptr=guards.around("qo_indptr", problem.qo_indptr),
        kv_indptr=guards.around("kv_indptr", problem.kv_indptr),
        kv_indices=guards.around("kv_indices", ranks.int()),
        kv_len_arr=guards.around("kv_len_arr", problem.kv_len_arr),
    )
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    wrapper = etap_flashinfer.BatchMLAPagedAttentionWrapper(
        guards.around("the workspace", workspace), backend="etap"
    )
    shape = (query.shape[0], problem.num_heads)
    poison = torch.full((*shape, 512), math.nan, dtype=problem.dtype, device="cuda")
    out = guards.around("out", poison)
    return guarded, wrapper, (out, guards.around("lse", poison[..., 0].float()))


def run_guarded(guarded: Problem, wrapper: object, results: tuple) -> None:
    out, lse = results
    wrapper.plan(*guarded.plan_arguments())
    wrapper.run(*guarded.run_arguments(), out=out, lse=lse, return_lse=True)
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("heads", HEADS)
def test_guard_bands(heads, page_size, dtype, seed, monkeypatch):
    """Right results, equal bits with two kinds of bands, and the bands as they were."""
    lengths = [130, 1, 5000, 64, 0, 333]
    problem = make_problem(
        seed, [1, 2, 3, 1, 1, 1], lengths, heads, page_size, dtype, causal=True, spare_entries=0
    )
    size = workspace_bytes(problem, monkeypatch)
    found = []
    for byte in (0xFF, 0x7F):
        guards = Guards(byte)
        guarded, wrapper, results = between_guards(problem, guards, size)
        run_guarded(guarded, wrapper, results)
        guards.check()
        check(guarded, *results)
        found.append(results)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_guards_see_a_write():
    guards = Guards(0x7F)
    inside = guards.around("three numbers", torch.arange(3, device="cuda"))
    guards.check()
    inside.as_strided((4,), (1,))[3] = 5
    with pytest.raises(AssertionError, match="behind three numbers"):
        guards.check()


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("heads", HEADS)
def test_random_index_tensors(heads, page_size, seed, monkeypatch):
    """Any 32-bit numbers at all: every call ends, no band changes, and the next call is right."""
    problem = make_problem(
        seed, [1, 2, 3, 1, 1, 1], [130, 1, 700, 64, 0, 333], heads, page_size, spare_entries=0
    )
    guards = Guards(0x7F)
    size = workspace_bytes(problem, monkeypatch)
    guarded, wrapper, results = between_guards(problem, guards, size)
    inputs = [tensor.clone() for tensor in guarded.run_arguments()]
    index = [guarded.qo_indptr, guarded.kv_indptr, guarded.kv_indices, guarded.kv_len_arr]
    right = [tensor.clone() for tensor in index]
    generator = torch.Generator(device="cuda").manual_seed(seed)
    for number in range(100):
        # The whole range of int32, or small numbers, which lead to more than clamped ends.
        high = 2**31 if number % 2 else 40
        for tensor in index if number % 3 else index[number % 4 : number % 4 + 1]:
            tensor.random_(-high, high, generator=generator)
        run_guarded(guarded, wrapper, results)
        guards.check()
        for tensor, before in zip(index, right, strict=True):
            tensor.copy_(before)
    for before, after in zip(inputs, guarded.run_arguments(), strict=True):
        assert torch.equal(before.view(torch.int16), after.contiguous().view(torch.int16))
    for result in results:
        result.fill_(math.nan)
    run_guarded(guarded, wrapper, results)
    guards.check()
    check(guarded, *results)


@pytest.mark.parametrize("page_size", [1, 64])
def test_page_offsets_that_fall(page_size, seed):
    """A request whose page range ends before it begins has none; the others have theirs."""
    lengths = [2 * page_size, 3 * page_size, 3 * page_size - 1, 90]
    problem = make_problem(seed, [1, 2, 1, 1], lengths, 16, page_size, spare_entries=0)
    problem.kv_indptr[2] = 1  # from 2 to 1 for request 1, and from there for request 2
    table = problem.kv_indices[1:4].long()
    rows = torch.cat([problem.ckv, problem.kpe], -1)[table].flatten(0, 1)
    problem.kv_lens[1], problem.tokens[1] = 0, problem.tokens[1][:0]
    problem.tokens[2] = rows[: lengths[2]].clone()
    last = problem.tokens[2].isnan().any() or problem.tokens[2].isinf().any()
    assert not last, "the pages of requests 0 and 1 are whole"
    check(problem, *run_once(problem))


def test_query_offsets_that_fall(seed):
    """Rows that several requests claim hold one of their results; the others are right."""
    problem = make_problem(seed, [1, 1, 1, 1, 1], [130, 65, 700, 64, 333], 16)
    problem.qo_indptr[2] = -7  # request 1 has no queries, request 2 rows 0 to 2
    out, lse = run_once(problem)
    assert torch.isfinite(out[:3]).all()
    own = dataclasses.replace(
        problem,
        q_nope=problem.q_nope[3:],
        q_pe=problem.q_pe[3:],
        q_lens=[1, 1],
        kv_lens=problem.kv_lens[3:],
        tokens=problem.tokens[3:],
    )
    check(own, out[3:], lse[3:])


def test_rows_of_no_request_are_not_written(seed):
    """A batch padded for a CUDA graph: offsets end before the queries do."""
    problem = make_problem(seed, [1, 2, 1, 3], [130, 65, 700, 64], 16)
    problem.qo_indptr[-1] = 4
    out, lse = run_once(problem)
    assert out[4:].isnan().all()
    assert lse[4:].isnan().all()
    own = dataclasses.replace(
        problem,
        q_nope=problem.q_nope[:4],
        q_pe=problem.q_pe[:4],
        q_lens=[1, 2, 1, 0],
    )
    check(own, out[:4], lse[:4])


# validate=True


@pytest.mark.parametrize(
    ("tensor", "place", "value", "message"),
    [
        ("qo_indptr", 0, 1, "qo_indptr starts at 1"),
        ("qo_indptr", 2, -3, "qo_indptr falls from 1 to -3 at request 1"),
        ("kv_indptr", 1, 2**31 - 1, "kv_indptr is 2147483647 behind request 0"),
        ("kv_indptr", 2, 0, "kv_indptr falls from 3 to 0 at request 1"),
        ("kv_len_arr", 2, -1, "kv_len_arr is -1 for request 2"),
        ("kv_len_arr", 0, 193, "193 for request 0, whose 3 pages of 64 tokens hold 192"),
        ("kv_indices", 4, -9, "kv_indices gives request 1 page -9"),
    ],
)
def test_validate_names_the_offender(tensor, place, value, message, seed):
    problem = make_problem(seed, [1, 1, 1], [130, 128, 700], 16, spare_entries=0)
    getattr(problem, tensor)[place] = value
    wrapper = make_wrapper()
    with pytest.raises(ValueError, match=message):
        wrapper.plan(*problem.plan_arguments(), validate=True)
    wrapper.plan(*problem.plan_arguments())  # does not look


def test_validate_accepts_what_is_right_and_holds_run_to_it(seed):
    problem = make_problem(seed, [1, 3, 1], [130, 0, 700], 16)
    wrapper = make_wrapper()
    wrapper.plan(*problem.plan_arguments(), validate=True)
    out, lse = wrapper.run(*problem.run_arguments(), return_lse=True)
    check(problem, out, lse)
    highest = int(problem.kv_indices[problem.kv_indices < 10**6].max())
    q_nope, q_pe, ckv, kpe = problem.run_arguments()
    with pytest.raises(ValueError, match=f"page {highest}; the cache has pages 0 to {highest - 1}"):
        wrapper.run(q_nope, q_pe, ckv[:highest], kpe[:highest])
    with pytest.raises(ValueError, match="qo_indptr ends at 5; q_nope holds only 4 queries"):
        wrapper.run(q_nope[:4], q_pe[:4], ckv, kpe)


def test_validate_is_refused_during_a_capture(seed):
    """Before anything that would spoil the capture, which goes on."""
    problem = make_problem(seed, [1, 1], [130, 700], 16)
    wrapper = make_wrapper()
    out, lse = run_once(problem, wrapper)
    out.fill_(math.nan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="can't validate while a CUDA graph is captured"):
            wrapper.plan(*problem.plan_arguments(), validate=True)
        wrapper.plan(*problem.plan_arguments())
        wrapper.run(*problem.run_arguments(), out=out, lse=lse, return_lse=True)
    graph.replay()
    check(problem, out, lse)
