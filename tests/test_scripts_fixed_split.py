"""Batch-invariant calls in the benchmark and the fuzzer, on the CPU: options, verdicts, table."""

from __future__ import annotations

import bench_decode
import pytest
import readme_tables
from decode_bench import evidence, grid, report
from fuzzing import cases
from test_scripts import make_case, make_evidence, readme_with, verdict

K = 1024


def measured(**factors: float) -> list[dict]:
    """All cells of the grid; ``t256=1.05`` gives parts of 256 tokens that much more time."""
    return [
        make_case(
            100.0,
            batch=cell.batch,
            context=cell.context,
            fixed_split={
                name[1:]: {"us": 80.0 * factor, "us_of_others": 80.0, "rmse": 1.26e-4}
                for name, factor in factors.items()
            },
        )
        for cell in grid.preset("fixed-split")
    ]


def test_sizes_of_parts():
    assert bench_decode.parse_arguments([]).fixed_split == [64, 256]
    assert bench_decode.parse_arguments(["--fixed-split"]).fixed_split == []
    with pytest.raises(SystemExit):
        bench_decode.parse_arguments(["--fixed-split", "100"])
    assert set(grid.preset("fixed-split")) <= set(grid.preset("issue4"))


def test_verdict_is_that_of_the_best_size():
    name = "batch-invariant calls"
    lines = report.Verdicts(measured(t256=1.05, t2048=1.3), 4600.0).issue4()
    assert verdict(lines, name) == "MET"
    (line,) = (line for line in lines if name in line)
    assert "1.050 times" in line
    assert "1.300 with 2048" in line
    lines = report.Verdicts(measured(t2048=1.11), 4600.0).issue4()
    assert verdict(lines, name) == "MISSED"
    lines = report.Verdicts(measured(t256=1.0)[1:], 4600.0).issue4()
    assert verdict(lines, name) == "OPEN"


def test_table(tmp_path):
    fresh = {"csrc_sha256": evidence.csrc_sha256()}
    readme, arguments = tmp_path / "README.md", ["--readme", str(tmp_path / "README.md")]
    arguments += ["--results", str(tmp_path / "results")]
    path = tmp_path / "results" / "decode.json"
    for found, text in (
        ([make_case()], "Not measured yet"),
        (measured(t256=1.0, t2048=1.5), "| 4 x 8K | 1.00 | 1.50 |"),
    ):
        evidence.write(path, make_evidence(*found, **fresh))
        readme.write_text(readme_with("fixed-split"))
        assert readme_tables.main(arguments) == 0
        assert text in readme.read_text()
    assert "| geometric mean | 1.00 | 1.50 |" in readme.read_text()


def test_the_fuzzer_draws_sizes_that_plan_takes():
    drawn = [cases.draw_case(3, number, cases.GPU_LIMITS) for number in range(400)]
    split = [case for case in drawn if case.fixed_split_size is not None]
    assert 20 < len(split) < 100
    for case in split:
        assert case.fixed_split_size * case.page_size % 64 == 0
        assert sum(case.q_lens) * case.heads <= 1000  # whose parts fit the workspace
    assert any(case.fixed_split_size * case.page_size < max(case.kv_lens) for case in split)
