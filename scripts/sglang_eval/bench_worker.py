"""Times decode steps of one backend with SGLang's ``one_batch`` tools: one process, one model.

Everything is SGLang's but two things. Prompts are not run through the model: their pages are only
allocated, and the cache is filled with random numbers once, because the weights are random as well
and 64 prompts of 64K tokens would take minutes. And there is no tokenizer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import pathlib
import sys
import time
from typing import Any

import torch
from torch.autograd import DeviceType

PROFILED_STEPS = 3
# Kernels that attend, as far as their names tell; writing the cache and indices is not attention.
ATTENTION_NAMES = (
    "etap_mla",
    "flash",
    "mla",
    "attention",
    "fmha",
    "splitkv",
    "_fwd_grouped_kernel",
)
OTHER_NAMES = ("set_mla_kv", "kv_indices", "_fill_kernel", "rope", "concat_mla")


def is_attention(kernel: str) -> bool:
    name = kernel.lower()
    return any(part in name for part in ATTENTION_NAMES) and not any(
        part in name for part in OTHER_NAMES
    )


def allocate(one_batch: Any, requests: list[Any], runner: Any) -> Any:
    """What ``one_batch.extend`` does, without running the model; returns the batch."""
    cache = one_batch.TreeCacheNamespace(
        page_size=runner.server_args.page_size,
        device=runner.device,
        token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
    )
    batch = one_batch.ScheduleBatch.init_new(
        reqs=requests,
        req_to_token_pool=runner.req_to_token_pool,
        token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
        tree_cache=cache,
        model_config=runner.model_config,
        enable_overlap=False,
        spec_algorithm=one_batch.SpeculativeAlgorithm.NONE,
    )
    batch.prepare_for_extend()
    return batch


def fill_cache(runner: Any) -> None:
    """Random numbers in every page: reading zeros takes less power."""
    pool = runner.token_to_kv_pool
    for buffer in pool.kv_buffer:
        for rows in buffer.split(1 << 18):
            numbers = torch.randn(rows.shape, dtype=torch.bfloat16, device=rows.device)
            rows.copy_(numbers.to(pool.dtype).view(rows.dtype))  # fp8 is stored as bytes


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of a union of intervals: a kernel may start while the one before it still runs."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def profile(bench: Any, tokens: torch.Tensor, batch: Any) -> dict[str, Any]:
    """GPU time of a step, in microseconds, from PyTorch's profiler.

    ``gpu_us`` and ``attention_us`` are the time in which any kernel, or an attention kernel, runs;
    ``kernels`` has the sums of the longest ones, which may overlap.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA]
    bench.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            tokens, _ = bench.decode(tokens, batch)
        bench.synchronize()
    spans: dict[str, list[tuple[float, float]]] = {}
    for event in profiler.events():
        span = (float(event.time_range.start), float(event.time_range.end))
        if event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset")):
            spans.setdefault(event.name, []).append(span)
    attention = [span for name, found in spans.items() if is_attention(name) for span in found]
    times = {name: sum(stop - start for start, stop in found) for name, found in spans.items()}
    top = sorted(times.items(), key=lambda item: -item[1])[:8]
    return {
        "gpu_us": round(
            covered([s for found in spans.values() for s in found]) / PROFILED_STEPS, 1
        ),
        "attention_us": round(covered(attention) / PROFILED_STEPS, 1),
        "kernels": {name[:90]: round(value / PROFILED_STEPS, 1) for name, value in top},
    }


def main() -> int:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.benchmark import one_batch

    parser = argparse.ArgumentParser()
    one_batch.ServerArgs.add_cli_args(parser)
    parser.add_argument("--cases-file", type=pathlib.Path, required=True)
    parser.add_argument("--batches", nargs="+", type=int, required=True)
    parser.add_argument("--contexts", nargs="+", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    server_args = one_batch.ServerArgs.from_cli_args(options)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    one_batch.get_tokenizer = lambda *arguments, **named: None
    one_batch._set_envs_and_config(server_args)
    for initialize in ("moe_config", "fp8_gemm_config", "fp4_gemm_config"):
        getattr(one_batch, f"initialize_{initialize}")(server_args)
    one_batch.configure_logger(server_args, prefix="")
    # Imports take as long as all that follows, so the next backend's process is started early.
    line = sys.stdin.readline()
    if not line:
        return 1  # the parent is gone
    end = float(line)
    port_args = one_batch.PortArgs.init_new(server_args)
    bench, _ = one_batch.load_model(server_args, port_args, 0, 0)
    runner = bench.torch_runner
    backend = type(runner.attn_backend).__name__
    print(f"backend in use: {backend}, page size {runner.page_size}", flush=True)
    fill_cache(runner)

    def extend(requests: list[Any]) -> tuple[torch.Tensor, None, Any]:
        tokens = torch.zeros(len(requests), dtype=torch.int64, device=runner.device)
        return tokens, None, allocate(one_batch, requests, runner)

    bench.extend = extend

    def requests_of(batch: int, context: int) -> list[Any]:
        return one_batch.prepare_synthetic_inputs_for_latency_test(batch, context)

    def measure(batch: int, context: int, steps: int) -> dict[str, Any] | None:
        no_profile = (False, False, ("GPU",), "", "all", 0)
        requests = requests_of(batch, context)
        return one_batch.latency_test_run_once(
            backend, bench, print, requests, batch, context, steps, 0, *no_profile
        )

    with torch.no_grad():
        measure(options.batches[0], options.contexts[0], 8)  # warm up
        cases = []
        for batch, context in itertools.product(options.batches, options.contexts):
            if time.time() > end:
                print("time is up", flush=True)
                break
            found = measure(batch, context, options.steps)
            if found is None:
                continue  # SGLang said why: more tokens than the pool has
            case = {
                "batch": batch,
                "context": context,
                "step_ms": 1e3 * float(found["median_decode_latency"]),
                "tokens_per_s": float(found["median_decode_throughput"]),
            }
            bench.clear()
            tokens, _, scheduled = extend(requests_of(batch, context))
            tokens, _ = bench.decode(tokens, scheduled)
            case |= profile(bench, tokens, scheduled)
            cases.append(case)
            print(json.dumps(case), flush=True)
            content = {"class": backend, "page_size": runner.page_size, "cases": cases}
            options.cases_file.write_text(json.dumps(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
