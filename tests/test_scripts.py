"""The scripts' own logic, on the CPU: grids, inputs, evidence, tables, verdicts, and outcomes."""

from __future__ import annotations

import copy
import hashlib
import json
import math

import bench_decode
import bench_validate
import fake_kernel
import pytest
import readme_tables
import sanitize_cases
import torch
import validate_gpu
from decode_bench import evidence, grid, inputs, report

import etap_flashinfer
from etap_flashinfer import dispatch

K = 1024


def make_case(us: float = 100.0, peers: dict | None = None, **changes) -> dict:
    case = {
        "batch": 16,
        "context": 64 * K,
        "heads": 16,
        "q_len": 1,
        "page_size": 64,
        "dtype": "bf16",
        "kv_dtype": "bf16",
        "us": us,
        "rmse": 1.26e-4,
        "rmse_rounding": 1.24e-4,
        "peers": {
            name: {"us": microseconds, "rmse": 1.26e-4}
            for name, microseconds in (peers or {"flashmla": 120.0, "fa3": 150.0}).items()
        },
    }
    case |= changes
    case.setdefault("gbps", case["batch"] * case["context"] * grid.TOKEN_BYTES / us / 1e3)
    return case


def make_evidence(*cases: dict, **changes) -> dict:
    return {
        "csrc_sha256": "0" * 64,
        "device": "NVIDIA H200",
        "versions": {"torch": "2.11.0", "flashinfer-python": "0.6.14"},
        "date": "2026-11-21T10:00:00+00:00",
        "read_ceiling_gbps": 4600.0,
        "command": "python scripts/bench_decode.py",
        "cases": list(cases),
    } | changes


# Grid


@pytest.mark.parametrize("name", sorted(grid.PRESETS))
def test_presets_list_each_cell_once_in_measuring_order(name):
    cells = grid.preset(name)
    assert len(cells) == len(set(cells))
    assert cells == grid.measuring_order(cells)
    assert max(cell.nominal_bytes() for cell in cells) <= grid.LARGEST_CELL_BYTES


def test_issue4_holds_the_cells_of_every_bar():
    cells = set(grid.preset("issue4"))
    for batch in (1, 2, 4, 8, 16, 32, 64, 128):
        for exponent in range(9, 18):
            assert grid.Cell(batch, 2**exponent) in cells
    assert {cell.lengths for cell in cells} == set(grid.LENGTH_DISTRIBUTIONS)
    assert {cell.heads for cell in cells} == {8, 16, 32, 64, 128}
    assert {cell.q_len for cell in cells} == {1, 2, 4}
    assert {cell.page_size for cell in cells} == {1, 16, 64}


def test_issue2_holds_the_cells_of_its_bars():
    cells = set(grid.preset("issue2"))
    assert {grid.Cell(16, context * K) for context in (16, 32, 64)} <= cells
    assert {cell.dtype for cell in cells} == {"bf16", "fp16"}


@pytest.mark.parametrize("lengths", grid.LENGTH_DISTRIBUTIONS)
def test_request_lengths(lengths):
    cell = grid.Cell(64, 4096, q_len=2, lengths=lengths)
    drawn = cell.request_lengths(3)
    assert drawn == cell.request_lengths(3)
    assert len(drawn) == 64
    assert all(2 <= length <= 4096 for length in drawn)
    if lengths == "equal":
        assert set(drawn) == {4096}
    else:
        assert len(set(drawn)) > 20
    if lengths == "one_long":
        assert sorted(drawn)[-1] == 4096
        assert sorted(drawn)[-2] <= 1024


@pytest.mark.parametrize(
    "changes",
    [{"batch": 0}, {"page_size": -1}, {"dtype": "fp32"}, {"lengths": "odd"}, {"q_len": 600}],
)
def test_bad_cells_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        grid.Cell(**({"batch": 1, "context": 512} | changes))


def test_arguments():
    options = bench_decode.parse_arguments(
        ["--batch", "1", "2", "--context", "512", "--heads", "8", "--page-size", "1", "16"]
    )
    assert set(options.cells) == {
        grid.Cell(batch, 512, heads=8, page_size=page) for batch in (1, 2) for page in (1, 16)
    }
    assert bench_decode.parse_arguments([]).cells == grid.preset("quick")
    assert bench_decode.parse_arguments(["--seed", "7"]).seed == 7


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch", "1"],
        ["--heads", "8"],
        ["--grid", "quick", "--batch", "1", "--context", "512"],
        ["--grid", "unknown"],
        ["--batch", "0", "--context", "512"],
        ["--batch", "4096", "--context", "1000000"],
        ["--repeats", "1"],
    ],
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        bench_decode.parse_arguments(arguments)
    assert "error:" in capsys.readouterr().err


# Inputs


@pytest.mark.parametrize(
    "cell", [*grid.preset("issue4"), *grid.preset("issue5")], ids=grid.Cell.label
)
def test_rotation_exceeds_the_l2(cell):
    """All calls of a graph together read more than four times 50 MB."""
    size = inputs.set_bytes(cell, 1)
    calls = inputs.calls_of(cell, 1)
    assert calls * size // grid.TOKEN_BYTES * cell.token_bytes >= 4 * 50 * 10**6
    assert calls * size <= max(inputs.POOL_BYTES, size)


@pytest.mark.parametrize("q_len", [1, 3])
def test_inputs_and_exact_output(q_len):
    """The benchmark's reference agrees with an attention written out token by token."""
    cell = grid.Cell(3, 21, heads=2, q_len=q_len, page_size=4, lengths="uniform")
    pool = inputs.Pool(2 * inputs.set_bytes(cell, 5), 11, device="cpu")
    given = pool.inputs(cell, 5, calls=2)
    assert given.bytes_read == sum(given.lengths) * 1152
    assert not torch.equal(given.caches[0], given.caches[1])
    pages = given.kv_indices.tolist()
    assert sorted(pages) == list(range(given.caches[0].shape[0]))
    for request, length in enumerate(given.lengths):
        first = int(given.kv_indptr[request])
        own = pages[first : int(given.kv_indptr[request + 1])]
        assert own == given.block_table[request, : len(own)].tolist()
        exact = inputs.exact_output(given, request)
        for query in range(q_len):
            visible = length - q_len + 1 + query
            tokens = torch.stack(
                [given.caches[1][own[t // 4], t % 4] for t in range(visible)]
            ).double()
            row = given.queries[1, request * q_len + query].double()
            weights = torch.softmax(row @ tokens.T / math.sqrt(192), -1)
            torch.testing.assert_close(exact[query], weights @ tokens[:, :512])


def test_reference_requests_take_the_longest_and_stay_cheap():
    assert inputs.reference_requests([5, 9, 1]) == [1, 0, 2]
    lengths = [128 * K] * 16
    chosen = inputs.reference_requests(lengths)
    assert 1 <= len(chosen) <= 2
    assert inputs.reference_requests([10**6, 10**6])[0] == 0


@pytest.mark.parametrize("kv_cache", grid.CACHE_TOKEN_BYTES)
def test_sanitizer_case_is_a_right_reference(kv_cache):
    plan, run, expected = sanitize_cases.small_case(3, 4, 48, torch.float16, kv_cache)
    assert plan["qo_indptr"].tolist() == [0, 1, 3, 4]
    assert int(plan["kv_indptr"][-1]) == plan["kv_indices"].numel()
    assert plan["kv_len_arr"].tolist() == [130, 65, 0]
    assert torch.isfinite(expected).all()
    assert (expected[3] == 0).all()
    assert expected[0].abs().max() > 0
    cache = torch.full((1, 48, 576), torch.nan, dtype=torch.float16)
    poison = sanitize_cases.cache_arguments(cache, kv_cache)[1]
    assert poison.isnan().all(), "the tails of last pages are poisoned"
    wrapper = etap_flashinfer.BatchMLAPagedAttentionWrapper(torch.empty(16))
    wrapper.plan(**plan)
    out = wrapper.run(**run)
    torch.testing.assert_close(out.double(), expected, rtol=2.0**-10, atol=1e-5)


def test_plan_times(monkeypatch, capsys):
    """On the reference backend, whose plans are the same."""
    monkeypatch.setattr(bench_validate, "SHAPES", ((1, 100, 64), (3, 50, 1)))
    workspace = torch.empty(16, dtype=torch.uint8)
    wrapper = etap_flashinfer.BatchMLAPagedAttentionWrapper(workspace, backend="reference")
    plans = bench_validate.measure(wrapper, "cpu", 1)
    assert [(plan["batch"], plan["context"], plan["page_size"]) for plan in plans] == list(
        bench_validate.SHAPES
    )
    assert all(plan["us"] > 0 and plan["us_validated"] > 0 for plan in plans)
    assert "3 x 50, page 1:" in capsys.readouterr().out


# Evidence


def test_hash_of_the_sources(tmp_path):
    (tmp_path / "csrc" / "sub").mkdir(parents=True)
    files = {"csrc/b.cu": b"two", "csrc/a.cuh": b"one\n", "csrc/sub/c.inc": b""}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    joined = b"".join(name.encode() + b"\0" + files[name] + b"\0" for name in sorted(files))
    assert evidence.csrc_sha256(tmp_path) == hashlib.sha256(joined).hexdigest()


def test_hash_is_the_packages_own():
    from etap_flashinfer import jit

    assert evidence.csrc_sha256() == jit.csrc_sha256() == evidence.check_sources_match()


def test_evidence_is_written_whole_and_readable(tmp_path):
    content = make_evidence(make_case(), make_case(context=K))
    path = tmp_path / "h200" / "decode.json"
    evidence.write(path, content)
    assert json.loads(path.read_text()) == content
    assert list(path.parent.iterdir()) == [path]
    evidence.write(path, make_evidence())
    assert json.loads(path.read_text())["cases"] == []


@pytest.mark.parametrize("key", [*evidence.TOP_KEYS, *evidence.CASE_KEYS])
def test_schema_misses_every_key(key):
    content = make_evidence(make_case())
    assert evidence.schema_errors(content) == []
    broken = copy.deepcopy(content)
    del (broken if key in broken else broken["cases"][0])[key]
    assert any(key in error for error in evidence.schema_errors(broken))


def test_schema_knows_peers_and_types(tmp_path):
    bad_peer = make_evidence(make_case(peers={"somebody": 1.0}))
    bad_dtype = make_evidence(make_case(dtype="fp32"))
    assert evidence.schema_errors(bad_peer)
    assert evidence.schema_errors(bad_dtype)
    with pytest.raises(ValueError, match="somebody"):
        evidence.write(tmp_path / "x.json", bad_peer)
    assert not (tmp_path / "x.json").exists()


# Verdicts


def long_cells(us: float, ceiling_share: float = 0.95) -> list[dict]:
    cells = [make_case(us, context=context * K) for context in (16, 32, 64)]
    cells[-1]["gbps"] = ceiling_share * 4600.0
    return cells


def verdict(lines: list[str], name: str) -> str:
    return next(line.split()[0] for line in lines if name in line)


def test_issue2_verdicts():
    lines = report.Verdicts(long_cells(100.0), 4600.0).issue2()
    assert verdict(lines, "batch 16 at") == "MET"
    assert verdict(lines, "read ceiling") == "MET"
    assert "without flashinfer_fa2, flashinfer_fa3" in lines[0]
    assert verdict(report.Verdicts(long_cells(121.0), 4600.0).issue2(), "batch 16 at") == "MISSED"
    low = report.Verdicts(long_cells(100.0, 0.91), 4600.0).issue2()
    assert verdict(low, "read ceiling") == "MISSED"
    one_slow = long_cells(100.0)
    one_slow[0]["us"] = 120.1
    assert verdict(report.Verdicts(one_slow, 4600.0).issue2(), "batch 16 at") == "MISSED"


def test_verdicts_stay_open_without_measurements():
    for lines in (report.Verdicts([], 4600.0).issue2(), report.Verdicts([], None).issue4()):
        assert {line.split()[0] for line in lines} == {"OPEN"}
    alone = [case | {"peers": {}} for case in long_cells(100.0)]
    assert verdict(report.Verdicts(alone, 4600.0).issue2(), "batch 16 at") == "OPEN"


def test_accuracy_verdicts():
    good = report.Verdicts([make_case()], None).issue2()
    assert verdict(good, "RMSE over rounding") == "MET"
    assert verdict(good, "RMSE over FlashMLA") == "MET"
    bad = report.Verdicts([make_case(rmse=1.5e-4)], None).issue2()
    assert verdict(bad, "RMSE over rounding") == "MISSED"
    assert verdict(bad, "RMSE over FlashMLA") == "MISSED"


def test_issue4_verdicts():
    cases = [
        make_case(9.9, {"fa3": 20.9}, batch=1, context=8 * K),
        make_case(12.0, {"fa3": 15.9}, batch=16, context=K),
        *(
            make_case(100.0, {"fa3": 121.0}, lengths=name)
            for name in ("zipf", "uniform", "one_long")
        ),
        make_case(100.0, {"fa3": 116.0}, heads=32),
        make_case(100.0, {"fa3": 99.0}, heads=128),
        make_case(100.0, {"fa3": 130.0}, context=8 * K, batch=4),
        make_case(106.0, {"fa3": 130.0}, context=8 * K, batch=4, page_size=1),
    ]
    lines = report.Verdicts(cases, 4600.0).issue4()
    assert verdict(lines, "1 x 8K latency") == "MET"
    assert verdict(lines, "16 x 1K latency") == "MISSED"
    assert verdict(lines, "varied lengths") == "MET"
    assert verdict(lines, "up to 64 rows") == "MET"
    assert verdict(lines, "128 rows") == "MISSED"
    assert verdict(lines, "page 1 and 16") == "MISSED"
    assert verdict(lines, "batch x context") == "OPEN", "4 cells are not the grid"
    whole = [
        make_case(100.0, {"fa3": 131.0}, batch=cell.batch, context=cell.context)
        for cell in grid.preset("batch-context")
    ]
    assert verdict(report.Verdicts(whole, None).issue4(), "batch x context") == "MET"
    whole[5]["us"] = 132.0
    assert verdict(report.Verdicts(whole, None).issue4(), "batch x context") == "MISSED"
    assert verdict(report.Verdicts(cases[:4], None).issue4(), "varied") == "OPEN"


def test_geometric_mean():
    assert report.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


# Tables and plot


def test_text_table_has_every_case_and_dashes_for_gaps():
    cases = [make_case(), make_case(peers={"fa3": 90.0}, context=K, lengths="zipf")]
    lines = report.table(cases, 4600.0).splitlines()
    assert len(lines) == 3
    assert "FlashMLA" in lines[0]
    assert "fa2" not in lines[0]
    assert " zipf 1K " in lines[2]
    assert " - " in lines[2]
    assert " 0.90 " in lines[2]


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    cases = [make_case(context=context * K, batch=b) for context in (1, 8) for b in (1, 16)]
    report.plot(cases, 4600.0, "NVIDIA H200", tmp_path / "plots" / "decode.png")
    assert (tmp_path / "plots" / "decode.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="nothing to plot"):
        report.plot([make_case(heads=8)], None, "NVIDIA H200", tmp_path / "none.png")


def readme_with(*names: str) -> str:
    return "# Title\n\n" + "".join(
        f"<!-- table:{name} -->\nold\n<!-- /table:{name} -->\n\ntext\n" for name in names
    )


@pytest.fixture
def project(tmp_path):
    """A README and evidence measured with the present kernel sources."""
    fresh = {"csrc_sha256": evidence.csrc_sha256()}
    results = tmp_path / "results"
    evidence.write(results / "decode.json", make_evidence(make_case(), make_case(heads=8), **fresh))
    validation = make_evidence(
        make_case() | {"us": None, "gbps": None, "peers": {}},
        tests={"passed": 239, "failed": 0, "skipped": 0, "seconds": 60.0},
        sanitizer={"memcheck": {"outcome": "clean", "kernels": []}},
        read_ceiling_gbps=None,
        **fresh,
    )
    evidence.write(results / "validation.json", validation)
    readme = tmp_path / "README.md"
    readme.write_text(readme_with("batch-context", "shapes", "validation"))
    return ["--readme", str(readme), "--results", str(results)], readme, results


def test_tables_say_when_they_are_of_earlier_sources():
    found = make_evidence(csrc_sha256="0" * 64, read_ceiling_gbps=None)
    assert "**Of earlier kernel sources** (000000000000)." in readme_tables.provenance(found)
    found["csrc_sha256"] = evidence.csrc_sha256()
    assert "earlier" not in readme_tables.provenance(found)


def test_readme_tables_are_written_once_and_then_checked(project):
    arguments, readme, _ = project
    assert readme_tables.main([*arguments, "--check"]) == 1
    assert "old" in readme.read_text()
    assert readme_tables.main(arguments) == 0
    written = readme.read_text()
    assert "old" not in written
    assert "| 16 x 64K | **100.0** |" in written
    assert "239 passed, 0 failed" in written
    assert written.count("text\n") == 3
    assert readme_tables.main([*arguments, "--check"]) == 0


def test_reliability_table_takes_what_there_is(project):
    arguments, readme, results = project
    readme.write_text(readme_with("reliability"))
    assert readme_tables.main(arguments) == 0
    assert "Not measured yet" in readme.read_text()
    assert readme_tables.main([*arguments, "--check"]) == 0
    worst = {"element": 0.91, "rmse": 0.87, "lse": 0.2, "rmse_over_rounding": 58.0}
    run = {"seed": 7, "cases": 20_000, "mismatches": 0, "worst": worst}
    fresh = make_evidence(csrc_sha256=evidence.csrc_sha256(), read_ceiling_gbps=None)
    evidence.write(results / "fuzz.json", fresh | {"runs": [run]})
    assert readme_tables.main([*arguments, "--check"]) == 1
    assert readme_tables.main(arguments) == 0
    text = "| 20,000 random calls against float64 (seed 7) | 0 mismatches; largest error 0.91 of"
    assert text in readme.read_text()
    plan = {"batch": 16, "context": 65_536, "page_size": 1, "us": 40.0, "us_validated": 250.4}
    evidence.write(results / "plan_check.json", fresh | {"plans": [plan]})
    assert readme_tables.main(arguments) == 0
    written = readme.read_text()
    assert "| `plan()` of 16 x 64K, page 1 | 40 us, with `validate=True` 250 us |" in written
    assert written.count("NVIDIA H200") == 1
    tests = {"one": {"passed": 1200, "differs": 1}, "other": {"passed": 30, "failed": 1}}
    suite = {"suite": {"version": "0.6.14"}, "tests": tests, "failed": ["other[16]"]}
    evidence.write(results / "flashinfer_suite.json", fresh | suite)
    assert readme_tables.main(arguments) == 0
    row = "| FlashInfer 0.6.14's own tests of the wrapper | 1,230 passed, 1 failed, 1 differ"
    assert row in readme.read_text()


def test_stale_evidence_fails_the_check(project, capsys):
    arguments, _, results = project
    readme_tables.main(arguments)
    content = json.loads((results / "decode.json").read_text())
    evidence.write(results / "decode.json", content | {"csrc_sha256": "f" * 64})
    assert readme_tables.main([*arguments, "--check"]) == 1
    assert "decode.json is stale" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("readme", "message"),
    [
        (readme_with("nonsense"), "unknown table"),
        ("<!-- table:shapes -->\n", "no matching end"),
    ],
)
def test_broken_markers_fail(project, capsys, readme, message):
    arguments, path, _ = project
    path.write_text(readme)
    assert readme_tables.main([*arguments, "--check"]) == 1
    assert message in capsys.readouterr().err


def test_table_without_evidence_fails(project, capsys):
    arguments, path, results = project
    (results / "validation.json").unlink()
    assert readme_tables.main(arguments) == 1
    assert "needs validation.json" in capsys.readouterr().err
    path.write_text("# No tables yet\n")
    assert readme_tables.main([*arguments, "--check"]) == 0


# Validation


@pytest.mark.parametrize(
    ("status", "output", "outcome"),
    [
        (0, "case\n========= ERROR SUMMARY: 0 errors", "clean"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "clean"),
        (
            0,
            "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)",
            "errors: RACE",
        ),
        (9, "========= ERROR SUMMARY: 3 errors", "errors: ERROR SUMMARY: 3 errors"),
        (
            1,
            "1 of 2 cases right\n========= ERROR SUMMARY: 0 errors",
            "failed with status 1: 1 of 2 cases right",
        ),
        (0, "no summary at all", "failed with status 0"),
        (0, "", "failed with status 0"),
        (1, "========= Error: Device not supported.", "not run"),
    ],
)
def test_sanitizer_outcomes(status, output, outcome):
    assert validate_gpu.sanitizer_outcome(status, output).startswith(outcome)


def test_kernels_that_a_sanitizer_names():
    report = (
        "========= Error: Race reported between Write access at void "
        "etap::etap_mla_kernel<etap::EtapMlaTraits<cutlass::bfloat16_t, (int){}, "
        "(etap::KvLoader)0>>(etap::Params, CUtensorMap_st, CUtensorMap_st)+0xfb60\n"
    )
    output = report.format(8) + report.format(16) + report.format(8)
    expected = ["EtapMlaTraits<bfloat16_t, 16, 0>", "EtapMlaTraits<bfloat16_t, 8, 0>"]
    assert validate_gpu.reported_kernels(output) == expected


def test_a_sanitizer_case_says_which_variant_it_launched(monkeypatch):
    """Of the two that the wrapper loads for more than 64 rows, with the CPU in the GPU's place."""
    fake_kernel.install(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.cpu)
    workspace = torch.empty(fake_kernel.WORKSPACE_BYTES, dtype=torch.int8)
    wrapper = etap_flashinfer.BatchMLAPagedAttentionWrapper(workspace, backend="etap")
    for min_long_tiles, row_tile in ((0, 128), (10**6, 64)):
        monkeypatch.setattr(dispatch, "MIN_LONG_TILES", min_long_tiles)
        used: set = set()
        sanitize_cases.run_case(72, 64, "bf16", "same", False, 1, wrapper, used)
        assert used == {(torch.bfloat16, row_tile, "tma", "same")}
    used = set()
    sanitize_cases.run_case(16, 64, "bf16", "flashmla_656", False, 1, wrapper, used)
    assert used == {(torch.bfloat16, 32, "tma", "flashmla_656")}


@pytest.mark.parametrize("arguments", validate_gpu.SANITIZER_TOOLS.values(), ids=" ".join)
def test_sanitizer_cases_reach_every_variant(arguments, monkeypatch, capsys):
    """With the CPU in the place of the GPU; the row tile follows from the mean query length."""

    def run_case(heads, page_size, dtype, kv_cache, is_batch_invariant, seed, wrapper, used):
        row_tile = dispatch.choose_row_tile(heads, 2, kv_cache, dispatch.counts_as_long(0, heads))
        kv_loader = dispatch.choose_kv_loader(page_size)
        used.add((sanitize_cases.DTYPES[dtype], row_tile, kv_loader, kv_cache))
        return True

    monkeypatch.setattr(dispatch, "MIN_LONG_TILES", dispatch.MIN_LONG_TILES)  # put back
    monkeypatch.setattr("etap_flashinfer.BatchMLAPagedAttentionWrapper", lambda *_, **__: None)
    monkeypatch.setattr(sanitize_cases, "run_case", run_case)
    monkeypatch.setattr(sanitize_cases.torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(sanitize_cases.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr("sys.argv", ["sanitize_cases.py", *arguments])
    assert sanitize_cases.main() == 0
    assert "variants not run: none" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["sanitize_cases.py", "--heads", "4", "--page-size", "64"])
    assert sanitize_cases.main() == 1
    assert "bf16_n64_gather" in capsys.readouterr().out


def test_missing_sanitizer_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert validate_gpu.run_sanitizer("memcheck", {}, 1.0)["outcome"].startswith("not run")


def test_counts_of_a_junit_report(tmp_path):
    path = tmp_path / "junit.xml"
    path.write_text(
        '<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2" time="3.25"/>'
        "</testsuites>"
    )
    assert validate_gpu.counts_of(path) == {
        "passed": 5,
        "failed": 2,
        "skipped": 2,
        "seconds": 3.2,
    }


def test_recorded_cases_keep_to_the_schema():
    recorded = {key: make_case()[key] for key in evidence.CASE_KEYS if key not in ("us", "gbps")}
    del recorded["peers"]
    case = validate_gpu.as_case(recorded | {"test": "tests/gpu/test_x.py::test_y"})
    assert evidence.schema_errors(make_evidence(case)) == []
    assert case["us"] is None
