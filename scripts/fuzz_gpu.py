#!/usr/bin/env python
"""Random calls of the ETAP kernel against float64, and the evidence, results/<gpu>/fuzz.json.

Each case is drawn from the seed and its number: heads, query lengths, lengths, pages, memory
layouts, types, scales and logits of every size (scripts/fuzzing). Output and LSE are compared with
float64 computed on the GPU; fuzzing/compare.py says what is allowed and why.

    python scripts/fuzz_gpu.py --cases 20000
    python scripts/fuzz_gpu.py --case 1234 --seed 5      one case again, request by request

With ``--device cpu`` smaller cases run on the reference backend, and no evidence is written.
Exit status: 0 only if at least one case ran and none mismatched.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import json
import os
import pathlib
import secrets
import sys
import time
from typing import Any

import torch
import validate_gpu
from decode_bench import evidence
from fuzzing import cases, codes, compare, tensors

WORKSPACE_BYTES = 128 * 1024 * 1024
CASES_AT_ONCE = 64  # results read with one copy to the host
HANG_SECONDS = 120
PRINTED_MISMATCHES = 20


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20_000, help="how many, default 20000")
    parser.add_argument("--seed", type=int, help="default: a new one, printed")
    parser.add_argument("--first", type=int, default=0, help="number of the first case, default 0")
    parser.add_argument("--case", type=int, help="only this one, with details; needs --seed")
    parser.add_argument("--time-budget", type=float, default=300, help="seconds, default 300")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=pathlib.Path, help="directory, default results/<gpu>")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parallel compilations")
    options = parser.parse_args(arguments)
    if options.case is not None and options.seed is None:
        parser.error("--case needs the --seed that it was drawn from")
    if options.seed is None:
        options.seed = secrets.randbits(31)
    return options


class Fuzzer:
    """Runs cases one after another and collects what is wrong with them."""

    def __init__(self, seed: int, device: str):
        import etap_flashinfer

        self.seed = seed
        self.device = torch.device(device)
        is_gpu = device == "cuda"
        self.limits = cases.GPU_LIMITS if is_gpu else cases.CPU_LIMITS
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.wrapper = etap_flashinfer.BatchMLAPagedAttentionWrapper(
            workspace, backend="etap" if is_gpu else "reference"
        )
        self.worst = compare.Worst()
        self.done = 0
        self.mismatches: list[int] = []
        self._pending: list[tuple[cases.Case, torch.Tensor]] = []

    def add(self, number: int) -> None:
        """Run a case; its result is judged later."""
        case = cases.draw_case(self.seed, number, self.limits)
        try:
            self._pending.append((case, self._run(case).stacked()))
        except (ValueError, TypeError, RuntimeError) as error:
            if "CUDA error" in str(error):
                raise
            self.done += 1
            self._report(case, f"{type(error).__name__}: {error}")
        if len(self._pending) == CASES_AT_ONCE:
            self.judge()

    def _run(self, case: cases.Case) -> compare.Worst:
        given = tensors.build(case, self.device)
        tensors.run(self.wrapper, given)
        return self._compare(given, given.groups)

    def _compare(self, given: tensors.Tensors, groups: list[tensors.Group]) -> compare.Worst:
        case = given.case
        return compare.compare(
            given.queries,
            given.pool,
            groups,
            case.causal,
            case.sm_scale,
            given.out,
            given.lse,
            case.lse_base_e,
            compare.two_part_tokens(case.heads, max(case.q_lens)),
            is_flashmla=case.kv_dtype == "flashmla_656",
            codes=codes.Codes.of_case(case),
        )

    def judge(self) -> None:
        """Read the results that are still on the device."""
        if not self._pending:
            return
        rows = torch.stack([result for _, result in self._pending]).tolist()
        for (case, _), row in zip(self._pending, rows, strict=True):
            found = compare.Worst.read(row)
            for field in dataclasses.fields(found):
                largest = max(getattr(self.worst, field.name), getattr(found, field.name))
                setattr(self.worst, field.name, largest)
            self.done += 1
            if found.is_mismatch():
                self._report(case, describe(found))
        self._pending.clear()

    def _report(self, case: cases.Case, text: str) -> None:
        self.mismatches.append(case.number)
        if len(self.mismatches) <= PRINTED_MISMATCHES:
            device = "" if self.device.type == "cuda" else " --device cpu"
            command = f"--case {case.number} --seed {self.seed}{device}"
            print(f"MISMATCH {command} | {text} | {case.describe()}", flush=True)

    def show(self, number: int) -> bool:
        """One case with details; True if it is right."""
        case = cases.draw_case(self.seed, number, self.limits)
        for field in dataclasses.fields(case):
            print(f"  {field.name}: {getattr(case, field.name)}")
        given = tensors.build(case, self.device, one_by_one=True)
        tensors.run(self.wrapper, given)
        requests = [request for request, count in enumerate(case.q_lens) if count > 0]
        for request, group in zip(requests, given.groups, strict=True):
            found = compare.Worst.read(self._compare(given, [group]).stacked().tolist())
            mark = "MISMATCH" if found.is_mismatch() else "right"
            shape = f"q {case.q_lens[request]}, length {case.kv_lens[request]}"
            print(f"request {request} ({shape}): {mark}, {describe(found)}")
        whole = compare.Worst.read(self._compare(given, given.groups).stacked().tolist())
        print(f"whole: {'MISMATCH' if whole.is_mismatch() else 'right'}, {describe(whole)}")
        return not whole.is_mismatch()


def describe(found: compare.Worst) -> str:
    """Errors over what is allowed (above 1 is wrong), and what is not judged."""
    return (
        f"of what is allowed: element {found.element:.3g}, RMSE {found.rmse:.3g}, "
        f"LSE {found.lse:.3g} (RMSE over rounding alone {found.rmse_over_rounding:.4g}, "
        f"uncertainty {found.uncertainty:.2g})"
    )


def run_cases(fuzzer: Fuzzer, first: int, count: int, budget: float) -> float:
    """Run cases until they or the time are used up; returns the seconds it took."""
    started = time.monotonic()
    spoke = started
    for number in range(first, first + count):
        if number % CASES_AT_ONCE == 0:
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=sys.__stderr__)
        try:
            fuzzer.add(number)
        except RuntimeError:
            earliest = max(first, number - CASES_AT_ONCE)
            again = f"--first {earliest} --cases {number - earliest + 1} --seed {fuzzer.seed}"
            print(f"CUDA error in one of: CUDA_LAUNCH_BLOCKING=1 {sys.argv[0]} {again}", flush=True)
            raise
        now = time.monotonic()
        if now - spoke > 10:
            spoke = now
            print(f"{fuzzer.done} cases after {now - started:.0f} s", flush=True)
        if now - started > budget:
            print(f"stopped by --time-budget {budget:g}", flush=True)
            break
    fuzzer.judge()
    faulthandler.cancel_dump_traceback_later()
    return time.monotonic() - started


def write_evidence(path: pathlib.Path, csrc_hash: str, run: dict[str, Any]) -> None:
    """Add a run to those of the same sources; one of the same seed is replaced."""
    runs = []
    if path.is_file():
        found = json.loads(path.read_text())
        if found["csrc_sha256"] == csrc_hash:
            runs = [old for old in found["runs"] if old["seed"] != run["seed"]]
    evidence.write(path, evidence.header(csrc_hash, None) | {"runs": [*runs, run], "cases": []})


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    is_gpu = options.device == "cuda"
    csrc_hash = evidence.check_sources_match()
    if is_gpu:
        if not torch.cuda.is_available():
            print("fuzz_gpu.py needs a GPU, or --device cpu; torch sees none", file=sys.stderr)
            return 2
        os.environ.update(validate_gpu.environment(options.jobs))
    fuzzer = Fuzzer(options.seed, options.device)
    if options.case is not None:
        return 0 if fuzzer.show(options.case) else 1
    print(f"seed {options.seed}", flush=True)
    seconds = run_cases(fuzzer, options.first, options.cases, options.time_budget)
    run = {
        "seed": options.seed,
        "first": options.first,
        "cases": fuzzer.done,
        "mismatches": len(fuzzer.mismatches),
        "mismatched": fuzzer.mismatches[:PRINTED_MISMATCHES],
        "seconds": round(seconds, 1),
        "rmse_bound": compare.RMSE_BOUND,
        "rmse_bound_one_part": compare.RMSE_BOUND_ONE_PART,
        "rmse_bound_codes": compare.RMSE_BOUND_CODES,
        "worst": {key: float(f"{value:.4g}") for key, value in vars(fuzzer.worst).items()},
    }
    print(f"{fuzzer.done} cases in {seconds:.0f} s, {len(fuzzer.mismatches)} mismatches; worst")
    print(describe(fuzzer.worst))
    if is_gpu and fuzzer.done:
        path = (options.out or evidence.default_directory()) / "fuzz.json"
        write_evidence(path, csrc_hash, run)
        print(f"written: {path}")
    return 0 if fuzzer.done and not fuzzer.mismatches else 1


if __name__ == "__main__":
    sys.exit(main())
