#!/usr/bin/env python
"""Times plan() with and without validate=True, and writes results/<gpu>/plan_check.json.

Host time of one call, index tensors on the GPU, nothing else running there: with validate this
includes the wait for the GPU's answer. Takes seconds with ETAP_FLASHINFER_AOT_DIR set; otherwise
two modules are compiled first, about a minute each.

    python scripts/bench_validate.py
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import time
from typing import Any

import torch
from decode_bench import evidence

SHAPES = ((1, 8192, 64), (16, 8192, 64), (128, 8192, 64), (16, 65_536, 64), (16, 65_536, 1))
HEADS = 16
REPEATS = 200
WORKSPACE_BYTES = 128 * 1024 * 1024


def plan_arguments(batch: int, context: int, page_size: int, device: str) -> tuple:
    """A decode batch with its pages in random order."""
    pages = -(-context // page_size)
    index = {"dtype": torch.int32, "device": device}
    return (
        torch.arange(batch + 1, **index),
        torch.arange(batch + 1, **index) * pages,
        torch.randperm(batch * pages, device=device).int(),
        torch.full((batch,), context, **index),
        *(HEADS, 512, 64, page_size, False, 192**-0.5, torch.bfloat16, torch.bfloat16),
    )


def microseconds(wrapper: Any, arguments: tuple, validate: bool, repeats: int) -> float:
    """Median host time of one plan()."""
    times = []
    for _ in range(repeats + 10):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        wrapper.plan(*arguments, validate=validate)
        times.append(1e6 * (time.perf_counter() - started))
    return statistics.median(times[10:])


def measure(wrapper: Any, device: str, repeats: int) -> list[dict[str, Any]]:
    """All shapes; prints a line for each."""
    plans = []
    for batch, context, page_size in SHAPES:
        arguments = plan_arguments(batch, context, page_size, device)
        plain, checked = (
            microseconds(wrapper, arguments, validate, repeats) for validate in (False, True)
        )
        plan = {"batch": batch, "context": context, "page_size": page_size}
        plans.append(plan | {"us": round(plain, 1), "us_validated": round(checked, 1)})
        print(f"{batch} x {context}, page {page_size}: {plain:.1f} us, validated {checked:.1f} us")
    return plans


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, help="directory, default results/<gpu>")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench_validate.py needs a GPU; torch sees none", file=sys.stderr)
        return 2
    csrc_hash = evidence.check_sources_match()
    import etap_flashinfer

    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    wrapper = etap_flashinfer.BatchMLAPagedAttentionWrapper(workspace, backend="etap")
    plans = measure(wrapper, "cuda", REPEATS)
    path = (options.out or evidence.default_directory()) / "plan_check.json"
    evidence.write(path, evidence.header(csrc_hash, None) | {"plans": plans, "cases": []})
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
