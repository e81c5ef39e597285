#!/usr/bin/env python
"""Times SGLang's decode steps end to end with ``etap`` and with its own backends, on one GPU.

    python scripts/bench_sglang.py                          the whole grid, about a minute a backend
    python scripts/bench_sglang.py --backends etap flashmla --batches 16 --contexts 32768
    python scripts/bench_sglang.py --kv-cache-dtype fp8_e4m3 --backends etap flashmla

The model has the shapes that one GPU sees of DeepSeek-V3 under tensor parallelism 8: hidden size
7168, 16 heads, the dense layers' MLP; random weights (``--load-format dummy``) and a random cache.
Steps are timed by SGLang's own ``one_batch`` tools, one process a backend (sglang_eval/
bench_worker.py says what differs), with CUDA graphs. The profiler gives attention's share.
Writes the section "bench" of results/<gpu>/sglang.json, with an fp8 cache "bench_fp8".
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from sglang_eval import evidence, plugin
from sglang_eval.model import DEEPSEEK_V3
from sglang_eval.servers import environment, log

BACKENDS = ("etap", "fa3", "flashmla", "flashinfer")
K = 1024


def model_config(layers: int) -> dict[str, Any]:
    """DeepSeek-V3 as one of 8 GPUs sees it, with dense layers only."""
    return DEEPSEEK_V3 | {
        "vocab_size": 16160,
        "hidden_size": 7168,
        "intermediate_size": 2304,
        "moe_intermediate_size": 256,
        "num_hidden_layers": layers,
        "first_k_dense_replace": layers,
        "q_lora_rank": 1536,
        "max_position_embeddings": 131072,
    }


def worker_command(options: argparse.Namespace, backend: str, cases: pathlib.Path) -> list[str]:
    longest = max(options.contexts) + 2 * K
    values = {
        "--model-path": options.work / "model",
        "--load-format": "dummy",
        "--attention-backend": backend,
        "--kv-cache-dtype": options.kv_cache_dtype,
        "--sampling-backend": "pytorch",
        "--grammar-backend": "none",
        "--context-length": longest,
        "--max-total-tokens": max(options.batches) * longest,
        "--max-running-requests": max(options.batches),
        "--cuda-graph-max-bs-decode": max(options.batches),
        "--mem-fraction-static": 0.88,
        "--random-seed": 0,
        "--cases-file": cases,
        "--steps": options.steps,
    }
    flags = ["--skip-tokenizer-init", "--disable-flashinfer-autotune", "--disable-radix-cache"]
    flags.append("--disable-prefill-cuda-graph")
    command = [sys.executable, "-m", "sglang_eval.bench_worker", *flags]
    command += [str(part) for pair in values.items() for part in pair]
    for name in ("--batches", "--cuda-graph-bs-decode"):
        command += [name, *map(str, options.batches)]
    return [*command, "--contexts", *map(str, options.contexts)]


class Worker:
    """One backend's process. It starts at once, and takes the GPU when told to."""

    def __init__(self, options: argparse.Namespace, backend: str) -> None:
        self.backend = backend
        self.cases = options.work / f"cases.{backend}.json"
        self.cases.unlink(missing_ok=True)
        self.log_path = options.work / f"bench.{backend}.log"
        with open(self.log_path, "w") as output:
            self.process = subprocess.Popen(
                worker_command(options, backend, self.cases),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment(options.work),
                start_new_session=True,
            )
        log(f"{backend}: importing, log in {self.log_path}")

    def run(self, seconds: float) -> dict[str, Any] | None:
        """Let it measure for so long; its cases, or None if there are none."""
        log(f"{self.backend}: {seconds:.0f} s to measure")
        status: int | str
        try:
            # A case in progress may take a little longer than the time it was given.
            self.process.communicate(f"{time.time() + seconds - 10}\n", timeout=seconds)
            status = self.process.returncode
        except subprocess.TimeoutExpired:
            status = "none: out of time"
        self.stop()
        if status != 0 or not self.cases.exists():
            tail = "\n".join(self.log_path.read_text(errors="replace").splitlines()[-30:])
            log(f"PROBLEM: {self.backend}: status {status}\n{tail}")
        if not self.cases.exists():
            return None
        found: dict[str, Any] = json.loads(self.cases.read_text())
        cases = len(found["cases"])
        log(f"{self.backend}: {found['class']}, page size {found['page_size']}, {cases} cases")
        return found

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run_all(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run the backends one after another, each with an equal share of the time that is left."""
    end = time.monotonic() + options.time_budget
    workers = [Worker(options, backend) for backend in options.backends]
    found: dict[str, dict[str, Any]] = {}
    try:
        for index, worker in enumerate(workers):
            share = (end - time.monotonic()) / (len(workers) - index)
            content = worker.run(max(share, 1.0))
            if content is not None:
                found[worker.backend] = content
    finally:
        for worker in workers:
            worker.stop()
    return found


def merged(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each batch and context, with every backend's figures."""
    cases: dict[tuple[int, int], dict[str, Any]] = {}
    for backend, content in found.items():
        for case in content["cases"]:
            key = (case["batch"], case["context"])
            entry = cases.setdefault(key, {"batch": key[0], "context": key[1], "backends": {}})
            figures = {k: v for k, v in case.items() if k not in ("batch", "context")}
            entry["backends"][backend] = figures
    return [cases[key] for key in sorted(cases)]


def table(cases: list[dict[str, Any]], backends: list[str]) -> str:
    """Step times and attention's share, and the fastest other backend's time over etap's."""
    lines = ["batch context  " + "  ".join(f"{name:>22}" for name in backends) + "  best/etap"]
    for case in cases:
        cells = []
        for name in backends:
            figures = case["backends"].get(name)
            share = figures and 100 * figures["attention_us"] / max(figures["gpu_us"], 1e-9)
            cells.append(f"{figures['step_ms']:9.3f} ms, {share:4.0f} %" if figures else "-")
        others = [f["step_ms"] for n, f in case["backends"].items() if n != "etap"]
        ours = case["backends"].get("etap", {}).get("step_ms")
        ratio = f"{min(others) / ours:9.3f}" if ours and others else "        -"
        row = f"{case['batch']:5d} {case['context'] // K:6d}K  "
        lines.append(row + "  ".join(f"{cell:>22}" for cell in cells) + f"  {ratio}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 16, 64))
    parser.add_argument("--contexts", nargs="+", type=int, default=(4 * K, 32 * K, 64 * K))
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8_e4m3"), default="auto")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=33)
    parser.add_argument("--time-budget", type=float, default=300.0, help="seconds in all (300)")
    parser.add_argument("--work", type=pathlib.Path, help="logs and caches; temporary if not given")
    parser.add_argument("--out", type=pathlib.Path, help="results/<gpu>/sglang.json")
    options = parser.parse_args(arguments)
    options.work = options.work or pathlib.Path(tempfile.mkdtemp(prefix="etap_sglang_"))
    plugin.ensure_discoverable()
    (options.work / "model").mkdir(parents=True, exist_ok=True)
    config = model_config(options.layers)
    (options.work / "model" / "config.json").write_text(json.dumps(config))
    found = run_all(options)
    cases = merged(found)
    print(table(cases, list(found)))
    if not cases:
        return 1
    settings = {name: {k: c[k] for k in ("class", "page_size")} for name, c in found.items()}
    section = {"layers": options.layers, "backends": settings, "cases": cases}
    name = "bench" if options.kv_cache_dtype == "auto" else "bench_fp8"
    print(f"written: {evidence.update(options.out, name, section)}")
    return 0 if set(found) == set(options.backends) else 1


if __name__ == "__main__":
    sys.exit(main())
