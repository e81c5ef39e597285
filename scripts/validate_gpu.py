#!/usr/bin/env python
"""Validates the kernels on a Hopper GPU and writes the evidence, results/<gpu>/validation.json.

Builds all kernel variants in parallel (unless ETAP_FLASHINFER_AOT_DIR already names a directory of
them), runs tests/gpu, and runs small cases of every variant under compute-sanitizer's tools, all of
them at the same time.

    python scripts/validate_gpu.py
    python scripts/validate_gpu.py --out /tmp/out --skip-sanitizer -- -k "not large_pool"

Exit status: 0 only if every test passed and every check that was asked for ran clean.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from decode_bench import evidence, report

# racecheck is slow: each variant runs once, batch-invariant and not.
SANITIZER_TOOLS = {
    "memcheck": (),
    "racecheck": ("--heads", "4", "8", "16", "32", "72", "--page-size", "1", "64"),
    "synccheck": (),
    "initcheck": (),
}
SANITIZER_ERROR = 9
PRINT_LIMIT = 10_000  # reports a tool prints; by default 100, which may leave kernels unnamed
TAIL_LINES = 25
_REPORTED_KERNEL = re.compile(r"etap_mla_\w*kernel<(.+>)>\(etap::Params")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; what follows ``--`` goes to pytest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, help="directory, default results/<gpu>")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parallel compilations")
    parser.add_argument("--skip-tests", action="store_true", help="sanitizer only")
    parser.add_argument("--skip-sanitizer", action="store_true", help="tests only")
    parser.add_argument(
        "--sanitizer-timeout", type=float, default=300, help="seconds for each tool"
    )
    parser.add_argument(
        "--sanitizer-tools",
        nargs="+",
        choices=sorted(SANITIZER_TOOLS),
        default=list(SANITIZER_TOOLS),
        metavar="TOOL",
        help=f"default: all of {', '.join(SANITIZER_TOOLS)}",
    )
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    return parser.parse_args(arguments)


def environment(jobs: int) -> dict[str, str]:
    """This process's environment with all kernel variants built, ready for child processes."""
    child = dict(os.environ)
    paths = [str(evidence.REPOSITORY), child.get("PYTHONPATH", "")]
    child["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if not child.get("ETAP_FLASHINFER_AOT_DIR"):
        directory = tempfile.mkdtemp(prefix="etap_aot_")
        command = [sys.executable, "-m", "etap_flashinfer.aot", "--out", directory]
        started = time.monotonic()
        subprocess.run([*command, "--jobs", str(jobs)], env=child, check=True)
        print(f"kernels built in {time.monotonic() - started:.0f} s", flush=True)
        child["ETAP_FLASHINFER_AOT_DIR"] = directory
    return child


def counts_of(report: pathlib.Path) -> dict[str, Any]:
    """Numbers of tests in a JUnit report."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total = {
        key: sum(int(suite.get(key, 0)) for suite in suites)
        for key in ("tests", "failures", "errors", "skipped")
    }
    ran_wrong = total["failures"] + total["errors"]
    return {
        "passed": total["tests"] - ran_wrong - total["skipped"],
        "failed": ran_wrong,
        "skipped": total["skipped"],
        "seconds": round(sum(float(suite.get("time", 0)) for suite in suites), 1),
    }


def run_tests(child: dict[str, str], extra: list[str]) -> tuple[dict[str, Any], list[dict]]:
    """Run tests/gpu; returns the counts and the recorded cases."""
    with tempfile.TemporaryDirectory() as directory:
        record = pathlib.Path(directory) / "record.jsonl"
        junit = pathlib.Path(directory) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", f"--junitxml={junit}", *extra]
        status = subprocess.run(
            command, env={**child, "ETAP_RECORD": str(record)}, cwd=evidence.REPOSITORY
        ).returncode
        if not junit.is_file():
            raise RuntimeError(f"pytest ended with status {status} before it ran a test")
        lines = record.read_text().splitlines() if record.is_file() else []
        counts = counts_of(junit)
    if status != 0 and counts["failed"] == 0:
        raise RuntimeError(f"pytest ended with status {status} although no test failed")
    return counts, [as_case(json.loads(line)) for line in lines]


def as_case(recorded: dict[str, Any]) -> dict[str, Any]:
    """A recorded test case in the evidence schema; validation times nothing."""
    untimed = {"us": None, "gbps": None, "peers": {}}
    case = {**untimed, **recorded}
    return {key: case[key] for key in (*evidence.CASE_KEYS, "test")}


def run_sanitizers(
    tools: list[str], child: dict[str, str], timeout: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Tools and what they found, in the order in which they end."""
    with ThreadPoolExecutor(len(tools)) as pool:
        pending = {pool.submit(run_sanitizer, tool, child, timeout): tool for tool in tools}
        for done in as_completed(pending):
            yield pending[done], done.result()


def run_sanitizer(tool: str, child: dict[str, str], timeout: float) -> dict[str, Any]:
    """What one compute-sanitizer tool found on the small cases.

    ``outcome`` is "clean" or what happened, ``kernels`` are those that its reports name.
    """
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"outcome": "not run: compute-sanitizer is not on PATH", "kernels": []}
    command = [program, "--tool", tool, "--error-exitcode", str(SANITIZER_ERROR)]
    command += ["--print-limit", str(PRINT_LIMIT)]
    command += [sys.executable, "scripts/sanitize_cases.py", *SANITIZER_TOOLS[tool]]
    started = time.monotonic()
    try:
        done = subprocess.run(
            command,
            env={**child, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            cwd=evidence.REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        print_tail(tool, text)
        return {
            "outcome": f"not finished after {timeout:.0f} s",
            "kernels": reported_kernels(text),
        }
    seconds = time.monotonic() - started
    print_tail(tool, f"{done.stdout}\nstatus {done.returncode} after {seconds:.0f} s")
    return {
        "outcome": sanitizer_outcome(done.returncode, done.stdout),
        "kernels": reported_kernels(done.stdout),
    }


def print_tail(tool: str, output: str) -> None:
    """The last lines, in one piece: the tools run at the same time."""
    lines = [f"{tool}: {line}" for line in output.splitlines()[-TAIL_LINES:]]
    print("\n".join(lines), flush=True)


def sanitizer_outcome(status: int, output: str) -> str:
    """Read a finished run: "clean" needs right results and the tool's own summary of no error.

    A failure comes with how many cases are right.
    """
    lines = output.splitlines()
    if any("Device not supported" in line for line in lines):
        return "not run: compute-sanitizer does not support this device or its virtualisation"
    summaries = [
        line
        for line in lines
        if line.startswith("=========") and ("ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line)
    ]
    none_found = bool(summaries) and "SUMMARY: 0 " in summaries[-1]
    if status == 0 and none_found:
        return "clean"
    if status == SANITIZER_ERROR or (summaries and not none_found):
        return "errors" + (f": {summaries[-1].lstrip('= ')}" if summaries else "")
    said = [line for line in lines if "cases right" in line] or lines or ["no output"]
    return f"failed with status {status}: {said[-1]}"


def reported_kernels(output: str) -> list[str]:
    """The instantiations, by their traits, that a sanitizer's reports name."""
    found = set(_REPORTED_KERNEL.findall(output))
    return sorted(re.sub(r"\((?:\w+::)?\w+\)|\w+::", "", name) for name in found)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    import torch

    if not torch.cuda.is_available():
        print("validate_gpu.py needs a GPU; torch sees none", file=sys.stderr)
        return 2
    path = (options.out or evidence.default_directory()) / "validation.json"
    csrc_hash = evidence.check_sources_match()
    child = environment(options.jobs)
    result: dict[str, Any] = evidence.header(csrc_hash, None)
    counts, cases = {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0}, []
    if not options.skip_tests:
        counts, cases = run_tests(child, options.pytest)
    result |= {"tests": counts, "sanitizer": {}, "cases": cases}
    evidence.write(path, result)  # kept even if a sanitizer run is cut short
    if not options.skip_sanitizer:
        tools, timeout = options.sanitizer_tools, options.sanitizer_timeout
        for tool, found in run_sanitizers(tools, child, timeout):
            result["sanitizer"][tool] = found
            evidence.write(path, result)
    print(f"tests: {counts}")
    for kind, (worst, count) in report.worst_ratios(cases).items():
        print(f"rmse over rounding alone, {kind} cache: at most {worst:.3f} over {count} cases")
    for tool, found in result["sanitizer"].items():
        mark = "" if found["outcome"] == "clean" else "!!! "
        print(f"{mark}{tool}: {', in '.join((found['outcome'], *found['kernels']))}")
    print(f"written: {path}")
    clean = all(found["outcome"] == "clean" for found in result["sanitizer"].values())
    ran = options.skip_tests or (counts["passed"] > 0 and counts["failed"] == 0)
    return 0 if ran and clean else 1


if __name__ == "__main__":
    sys.exit(main())
