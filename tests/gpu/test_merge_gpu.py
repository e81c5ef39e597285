"""The merge at the end of the kernel, where CTAs wait for each other: also when not all can run."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import pathlib
import random
import shutil
import subprocess
import time

import pytest
import torch
from fp8_problems import token_slots
from gpu_helpers import (
    LSE_BOUND,
    check,
    exact,
    kept_memory,
    kept_schedules,
    make_problem,
    make_wrapper,
    poisoned_outputs,
    rmse,
    run_once,
)

pytestmark = pytest.mark.gpu

# Blocks that take most of an SM's shared memory each, and stay for a while.
HOG = """
#include <cuda_runtime.h>

__global__ void hog(long long nanoseconds) {
  extern __shared__ char memory[];
  memory[threadIdx.x] = 0;
  long long begin, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
  do {
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  } while (now - begin < nanoseconds);
}

extern "C" int launch(int blocks, long long nanoseconds, void* stream) {
  cudaFuncSetAttribute(hog, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 * 1024);
  hog<<<blocks, 1, 200 * 1024, (cudaStream_t)stream>>>(nanoseconds);
  return cudaGetLastError();
}
"""


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


@pytest.fixture(scope="module")
def hog(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc to compile a kernel that takes SMs away")
    directory: pathlib.Path = tmp_path_factory.mktemp("hog")
    source, library = directory / "hog.cu", directory / "hog.so"
    source.write_text(HOG)
    command = [nvcc, "-shared", "-Xcompiler", "-fPIC", "-arch=sm_90a"]
    subprocess.run([*command, "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))


def last_call(wrapper: object) -> tuple[int, torch.Tensor]:
    """Number of the last call, and what it left of each CTA's merge: -1 if nobody gave up."""
    words = kept_schedules(wrapper)[:, -128:].contiguous().view(torch.int32)
    next_calls, merges = words[:, 0], words[:, 4:6]
    assert (next_calls == next_calls[0]).all()
    call = int(next_calls[0]) - 1
    return call, merges[:, call % 2]


# Few parts of long requests, many of one request, requests with parts in two CTAs.
SHAPES = {
    "16 x 2000": ([1] * 16, [2000] * 16),
    "1 x 20000": ([1], [20000]),
    "40 x various": ([1] * 40, [50 * i + 1 for i in range(40)]),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("heads", [8, 16, 64, 128])
@pytest.mark.parametrize("blocks", [1, 40, 131])
def test_sms_taken_by_another_kernel(hog, blocks, heads, shape, seed):
    """CTAs start 5 ms late, longer than others wait for them: the same bits nevertheless."""
    problem = make_problem(seed, *SHAPES[shape], heads)
    wrapper = make_wrapper()
    expected = run_once(problem, wrapper)
    check(problem, *expected)
    side = torch.cuda.Stream()
    for attempt in range(3):
        out, lse = poisoned_outputs(problem)
        torch.cuda.synchronize()
        stream = ctypes.c_void_p(side.cuda_stream)
        assert hog.launch(blocks, ctypes.c_longlong(5_000_000), stream) == 0
        wrapper.run(*problem.run_arguments(), out=out, lse=lse, return_lse=True)
        torch.cuda.synchronize()
        if shape == "1 x 20000" and blocks == 131:  # nearly every CTA has a part, and one SM
            _, merges = last_call(wrapper)
            assert (merges != -1).any(), "no CTA had to wait so long that it left"
        for given, wanted in zip((out, lse), expected, strict=True):
            assert torch.equal(given, wanted), f"attempt {attempt}"
    # Nothing is left behind that disturbs the next call.
    for given, wanted in zip(run_once(problem, wrapper), expected, strict=True):
        assert torch.equal(given, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [8, 16, 32])
def test_places_are_empty_for_the_next_call(heads, dtype, seed):
    """Whatever calls leave, in whichever order: with schedules that are kept and that are not, with
    parts, without, and in batch-invariant calls."""
    shapes = [*SHAPES.values(), ([1] * 400, [300] * 400), ([1] * 132, [64] * 132)]
    wrapper = make_wrapper()
    problems = [make_problem(seed, *shape, heads, dtype=dtype) for shape in shapes]
    expected = [run_once(problem) for problem in problems]
    chosen = random.Random(seed)
    filled = 0
    for number in range(40):
        k = chosen.randrange(len(problems))
        if number % 5 == 0:
            problem = problems[k % len(SHAPES)]
            wrapper.plan(*problem.plan_arguments(), fixed_split_size=64)
            wrapper.run(*problem.run_arguments())
        for _ in range(chosen.choice((1, 1, 2, 3))):
            found = run_once(problems[k], wrapper)
            for given, wanted in zip(found, expected[k], strict=True):
                assert torch.equal(given, wanted), f"call {number}"
            places = kept_memory(wrapper)[1]
            call, _ = last_call(wrapper)
            assert (places[(call + 1) % 2] == 0xFF).all(), f"call {number}"
            filled += bool((places[call % 2] != 0xFF).any())
    assert filled > 20


def test_lengths_that_change_while_a_kernel_runs(hog, seed):
    """An error, and its results are worth nothing; but the call ends, and the next one is right.

    The first CTAs have one SM, on which each waits for parts in vain and leaves. The others then
    find other lengths, by which one of those should have left a part that it has not: all have
    begun, so it is waited for.
    """
    problem = make_problem(seed, [1, 1], [19680, 19680], 16)
    wrapper = make_wrapper()
    at_first, later = torch.tensor([[19680, 320], [320, 19680]], dtype=torch.int32).pin_memory()
    problem.kv_len_arr.copy_(later)
    expected = run_once(problem, wrapper)
    problem.kv_len_arr.copy_(at_first)
    blocks = torch.cuda.get_device_properties(0).multi_processor_count - 1
    torch.cuda.synchronize()
    side, copies = torch.cuda.Stream(), torch.cuda.Stream()
    stream = ctypes.c_void_p(side.cuda_stream)
    begin = time.perf_counter()
    assert hog.launch(blocks, ctypes.c_longlong(50_000_000), stream) == 0
    wrapper.run(*problem.run_arguments())
    time.sleep(0.01)
    with torch.cuda.stream(copies):
        problem.kv_len_arr.copy_(later, non_blocking=True)
    torch.cuda.synchronize()
    assert time.perf_counter() - begin > 5, "all parts came"
    for given, wanted in zip(run_once(problem, wrapper), expected, strict=True):
        assert torch.equal(given, wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("heads", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("exponent", [-90, 0, 90])
def test_columns_of_any_size(exponent, heads, shape, seed):
    """Parts are kept in fp16: columns 2^-8 to 2^8 times a common size have the same relative error,
    also beside one that an infinite value makes NaN."""
    problem = make_problem(seed, *SHAPES[shape], heads)
    exponents = torch.randint(-8, 9, (512,), generator=torch.Generator().manual_seed(seed))
    scale = torch.exp2(exponents + float(exponent)).cuda()
    column = 77  # of one token alone, whose weight it makes 0
    scale[column] = 1.0
    problem.q_nope[..., column] = -1.0
    largest = torch.finfo(problem.dtype).max
    first_token = (problem.kv_indices[problem.kv_indptr[-2]], 0, column)
    for latents in (problem.ckv, *problem.tokens):
        latents[..., column] = 0.0
    problem.ckv[first_token] = problem.tokens[-1][0, column] = largest

    scaled = dataclasses.replace(
        problem,
        q_nope=(problem.q_nope.double() / scale).to(problem.dtype),
        ckv=(problem.ckv.double() * scale).to(problem.dtype),
    )
    out, lse = run_once(scaled)
    check(problem, out.double() / scale, lse)

    scaled.ckv[first_token] = torch.inf
    broken, broken_lse = run_once(scaled)
    assert broken[-1, :, column].isnan().all()
    broken[-1, :, column] = out[-1, :, column]
    check(problem, broken.double() / scale, lse)
    assert torch.equal(broken_lse, lse)


@pytest.mark.parametrize("heads", [8, 16, 32, 64, 128])
def test_parts_of_any_size(heads, seed):
    """Each fifth of the tokens has values in a fifth of the columns, of sizes that fp16 has and has
    not; one has none. So some parts are stored in fp16, and some in the workspace."""
    length, exponents = 20000, torch.tensor([0.0, 17.0, -9.0, -torch.inf, 3.0])
    problem = make_problem(seed, [1], [length], heads)
    problem.q_nope.zero_()  # kpe alone decides on weights
    fifth = torch.arange(length)[:, None] * 5 // length
    is_there = torch.arange(512) % 5 == fifth
    factor = torch.where(is_there, torch.exp2(exponents)[fifth], 0.0).cuda()
    values = problem.tokens[0][:, :512]
    values *= factor
    problem.ckv.view(-1, 512)[token_slots(problem)] = values

    out, lse = run_once(problem)
    expected, expected_lse = exact(problem)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=LSE_BOUND)
    rounded = expected.to(problem.dtype)
    # Weights are rounded, too: 1.37 times the error of rounding alone, and 1.53 at most in 120 such
    # problems. Fewer tokens share the weight than where RMSE_BOUND_ONE_PART holds.
    for column in range(5):
        of_size = (..., slice(column, None, 5))
        bound = 1.8 * rmse(rounded[of_size], expected[of_size])
        assert rmse(out[of_size], expected[of_size]) <= bound


def test_streams_of_different_priority(seed):
    """Calls that take SMs from each other while they run: all end, with the bits of calls alone."""
    chosen = random.Random(seed)
    problems = [
        make_problem(seed + k, [1] * batch, [length] * batch, heads)
        for k, (batch, length, heads) in enumerate(
            ((16, 1000, 16), (1, 9000, 16), (8, 3000, 128), (3, 20000, 16), (60, 700, 64))
        )
    ]
    wrappers = [make_wrapper() for _ in problems]
    expected = [run_once(*pair) for pair in zip(problems, wrappers, strict=True)]
    streams = [torch.cuda.Stream(priority=-(k % 3)) for k in range(len(problems))]
    torch.cuda.synchronize()
    results = []
    for _ in range(400):
        k = chosen.randrange(len(problems))
        with torch.cuda.stream(streams[k]):
            inputs = problems[k].run_arguments()
            results.append((k, wrappers[k].run(*inputs, return_lse=True)))
    torch.cuda.synchronize()
    for number, (k, result) in enumerate(results):
        for given, wanted in zip(result, expected[k], strict=True):
            assert torch.equal(given, wanted), f"call {number}, problem {k}"
