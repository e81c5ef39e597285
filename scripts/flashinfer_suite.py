#!/usr/bin/env python
"""Runs FlashInfer's own tests of its MLA wrapper with ours in that one's place, on one GPU.

    git clone --depth 1 --branch v0.6.14 https://github.com/flashinfer-ai/flashinfer suite
    python scripts/flashinfer_suite.py --checkout suite

The tests are FlashInfer's files as they are in the checkout, of the version that is installed or
one near it. Their backends "fa2" and "fa3" both mean ETAP here, so each case runs once, as "fa3",
and never falls back to stock FlashInfer. Tests of prefill and of Blackwell's kernels are left out.
Where our wrapper means to differ (``DIFFERENCES``) a test must fail, or that is a failure. Writes
results/<gpu>/flashinfer_suite.json.

Exit status: 0 only if every test ended as it should.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import pytest
from decode_bench import evidence

TESTS = pathlib.Path("tests/attention")
TEST_FILES = (TESTS / "test_deepseek_mla.py", TESTS / "test_mla_decode_kernel.py")
CHOSEN = ("test_batch_mla", "test_fp8_kv", "test_mla_page_index")


class Difference(NamedTuple):
    """What our wrapper does instead of what a test asks for, and what its failure says then."""

    reason: str
    failure: str


WITHOUT_KPE = Difference(
    "without kpe stock FlashInfer serves, with backend='auto'", "head_dim_kpe 0"
)
DIFFERENCES = {
    "test_fp8_kv_plan_rejects_fp16_q": Difference(
        "fp16 queries with an fp8 cache are served", "DID NOT RAISE"
    ),
    "test_fp8_kv_requires_scales": Difference(
        "scales are 1.0 if not given, as SGLang stores its cache", "DID NOT RAISE"
    ),
    "test_batch_mla_without_kpe": WITHOUT_KPE,
    "test_batch_mla_fp8_nope_group_scales_matches_bf16_reference": WITHOUT_KPE,
}


class Suite:
    """A pytest plugin: puts our wrapper into FlashInfer's module and counts what comes of it."""

    def __init__(self, part: int, parts: int) -> None:
        self.part, self.parts = part, parts
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(
            collections.Counter
        )
        self.failed: list[str] = []

    def pytest_configure(self) -> None:
        import flashinfer.mla
        import flashinfer.utils

        from etap_flashinfer import BatchMLAPagedAttentionWrapper

        class Wrapper(BatchMLAPagedAttentionWrapper):
            def __init__(self, *args: Any, backend: str = "auto", **options: Any) -> None:
                super().__init__(*args, backend="etap", **options)

        flashinfer.mla.BatchMLAPagedAttentionWrapper = Wrapper
        # A fixture would compile stock kernels, which nothing here runs.
        flashinfer.utils.has_flashinfer_jit_cache = lambda: True

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        chosen = [item for item in items if self._is_chosen(item)]
        items[:] = chosen[self.part :: self.parts]
        for item in items:
            if item.originalname in DIFFERENCES:
                reason = DIFFERENCES[item.originalname].reason
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))

    @staticmethod
    def _is_chosen(item: Any) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        is_first = parameters.get("backend", "fa3") == "fa3"
        return item.originalname.startswith(CHOSEN) and is_first

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        name = report.nodeid.split("::")[-1]
        function = name.split("[")[0]
        outcome = report.outcome
        if hasattr(report, "wasxfail"):
            is_meant = DIFFERENCES[function].failure in str(report.longrepr)
            outcome = "differs" if is_meant else "failed"
        self.counts[function][outcome] += 1
        if outcome == "failed":
            self.failed.append(name)


def run_part(checkout: pathlib.Path, part: int, parts: int, extra: list[str]) -> dict[str, Any]:
    """Run every ``parts``-th test in this process."""
    # Behind everything else: the checkout has a package flashinfer, too, and that is not meant.
    sys.path.append(str(checkout))
    suite = Suite(part, parts)
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "--import-mode=importlib"]
    options += ["--tb=short", "--maxfail=40", f"--rootdir={checkout}"]
    files = [str(checkout / name) for name in TEST_FILES]
    status = pytest.main([*options, *files, *extra], plugins=[suite])
    return {
        "status": int(status),
        "tests": {name: dict(counts) for name, counts in suite.counts.items()},
        "failed": suite.failed,
    }


def run_all(checkout: pathlib.Path, workers: int, extra: list[str]) -> dict[str, Any]:
    """All tests, shared by so many processes; their counts together."""
    with tempfile.TemporaryDirectory() as directory:
        results = [pathlib.Path(directory) / f"{part}.json" for part in range(workers)]
        command = [sys.executable, __file__, "--checkout", str(checkout)]
        # FlashInfer's tests empty PyTorch's cache when it holds so much of the GPU.
        environment = os.environ | {"FLASHINFER_TEST_MEMORY_THRESHOLD": str(0.5 / workers)}
        processes = [
            subprocess.Popen(
                [*command, "--part", str(part), str(workers), str(result), "--", *extra],
                env=environment,
            )
            for part, result in enumerate(results)
        ]
        for process in processes:
            process.wait()
        ended = [json.loads(result.read_text()) for result in results if result.is_file()]
    if len(ended) < workers:
        raise RuntimeError(f"{workers - len(ended)} of {workers} processes left no result")
    return joined(ended)


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts and failures of all processes together, tests in the order of their names."""
    tests: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for part in parts:
        for name, counts in part["tests"].items():
            tests[name].update(counts)
    failed = sorted(name for part in parts for name in part["failed"])
    # 0: all passed; 1: some failed; 5: none was chosen. Anything else is pytest's own trouble.
    broken = [part["status"] for part in parts if part["status"] not in (0, 1, 5)]
    if broken:
        failed.append(f"pytest ended with status {broken[0]}")
    return {"tests": {name: dict(tests[name]) for name in sorted(tests)}, "failed": failed}


def suite_version(checkout: pathlib.Path) -> dict[str, str]:
    """Which tests these are."""
    version = checkout / "version.txt"
    found = {"version": version.read_text().strip() if version.is_file() else "unknown"}
    for name in TEST_FILES:
        found[name.name] = hashlib.sha256((checkout / name).read_bytes()).hexdigest()
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", type=pathlib.Path, required=True, help="FlashInfer's sources")
    parser.add_argument("--workers", type=int, default=4, help="processes on the GPU (4)")
    parser.add_argument("--out", type=pathlib.Path, help="directory, default results/<gpu>")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)  # of a worker: which, of, result
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    options = parser.parse_args(arguments)
    checkout = options.checkout.resolve()
    missing = [str(name) for name in TEST_FILES if not (checkout / name).is_file()]
    if missing:
        print(f"{options.checkout} has no {missing[0]}: not FlashInfer's sources", file=sys.stderr)
        return 2
    if options.part:
        part, parts, result = options.part
        found = run_part(checkout, int(part), int(parts), options.pytest)
        pathlib.Path(result).write_text(json.dumps(found))
        return 0
    path = (options.out or evidence.default_directory()) / "flashinfer_suite.json"
    header = evidence.header(evidence.check_sources_match(), None)
    found = run_all(checkout, options.workers, options.pytest)
    differences = {name: difference.reason for name, difference in DIFFERENCES.items()}
    command = f"python scripts/flashinfer_suite.py --checkout suite --workers {options.workers}"
    content = header | {"command": command, "suite": suite_version(checkout)}
    evidence.write(path, content | {"differences": differences, "cases": []} | found)
    for name, counts in found["tests"].items():
        print(f"{name}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    for name in found["failed"]:
        print(f"!!! {name}")
    print(f"written: {path}")
    passed = sum(counts.get("passed", 0) for counts in found["tests"].values())
    return 0 if passed and not found["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
