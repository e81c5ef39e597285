"""The benchmark's fp8 cells, on the CPU: grid, inputs, arguments of the peers, verdicts, tables."""

from __future__ import annotations

import bench_decode
import pytest
import readme_tables
import torch
from decode_bench import evidence, grid, inputs, peers, report
from test_scripts import make_case, make_evidence, readme_with, verdict

import etap_flashinfer
from etap_flashinfer import quantization

K = 1024


def fp8_case(us: float = 100.0, peers: dict | None = None, **changes) -> dict:
    times = peers or {"flashmla": 200.0, "flashmla_fp8": 160.0, "flashinfer_fp8": 400.0}
    changes = {"kv_dtype": "fp8_e4m3", "gbps": 0.95 * 4600} | changes
    return make_case(us, times, **changes)


def grid_cases(us: float = 100.0, fp8_us: float = 160.0) -> list[dict]:
    """All plain cells of the grid issue5, FlashMLA fp8 taking ``fp8_us``."""
    return [
        fp8_case(
            us,
            {"flashmla": 200.0, "flashmla_fp8": fp8_us},
            batch=cell.batch,
            context=cell.context,
            heads=cell.heads,
        )
        for cell in grid.preset("issue5")
        if (cell.kv_cache, cell.page_size, cell.dtype) == ("fp8", 64, "bf16")
    ]


# Grid and command line


def test_issue5_holds_the_cells_of_every_bar():
    cells = set(grid.preset("issue5"))
    for batch in (1, 4, 16, 64, 128):
        for context in (1, 4, 16, 64):
            assert grid.Cell(batch, context * K, kv_cache="fp8") in cells
    for heads in (64, 128):
        for context in (16, 64):
            assert grid.Cell(16, context * K, heads=heads, kv_cache="fp8") in cells
    for context in (1, 16, 64):
        assert grid.Cell(16, context * K, kv_cache="flashmla_656") in cells
    assert {cell.kv_cache for cell in cells} == {"fp8", "flashmla_656"}


def test_cells_are_measured_by_kind():
    names = ("issue2", "issue5")
    cells = grid.measuring_order([cell for name in names for cell in grid.preset(name)])
    kinds = [(cell.dtype, cell.kv_cache) for cell in cells]
    assert list(dict.fromkeys(kinds)) == [
        ("bf16", "same"),
        ("bf16", "fp8"),
        ("bf16", "flashmla_656"),
        ("fp16", "same"),
        ("fp16", "fp8"),
    ]


def test_what_a_cell_reads():
    fp8 = grid.Cell(1, 64, kv_cache="fp8")
    assert (fp8.kv_dtype, fp8.token_bytes) == ("fp8_e4m3", 576)
    assert fp8.nominal_bytes() == grid.Cell(1, 64).nominal_bytes() == 64 * 1152
    assert "fp8 cache" in fp8.label()
    packed = grid.Cell(1, 64, kv_cache="flashmla_656")
    assert (packed.kv_dtype, packed.token_bytes) == ("flashmla_656", 656)
    with pytest.raises(ValueError, match="kv_cache must be one of"):
        grid.Cell(1, 64, kv_cache="fp4")


def test_arguments():
    options = bench_decode.parse_arguments(
        ["--batch", "1", "--context", "512", "--kv-cache", "same", "fp8", "--dtype", "fp16"]
    )
    assert options.cells == [
        grid.Cell(1, 512, dtype="fp16", kv_cache=each) for each in ("same", "fp8")
    ]
    with pytest.raises(SystemExit):
        bench_decode.parse_arguments(["--kv-cache", "fp8"])
    assert {"flashmla_fp8", "flashinfer_fp8"} <= set(peers.PEER_MAKERS)
    assert set(bench_decode.PEERS) == set(peers.PEER_MAKERS)


# Inputs


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kv_cache", grid.CACHE_TOKEN_BYTES)
def test_what_etap_is_given_is_what_the_reference_reads(kv_cache, dtype):
    """Plan and run arguments of the peer, with the plain PyTorch backend in the kernel's place."""
    cell = grid.Cell(3, 90, heads=2, q_len=2, page_size=16, dtype=dtype, kv_cache=kv_cache)
    pool = inputs.Pool(2 * inputs.set_bytes(cell, 5), 11, device="cpu")
    given = pool.inputs(cell, 5, calls=2)
    assert given.bytes_read == 3 * 90 * cell.token_bytes
    assert not torch.equal(bits(given.caches[0]), bits(given.caches[1]))
    wrapper = etap_flashinfer.BatchMLAPagedAttentionWrapper(torch.empty(16))
    wrapper.plan(*peers.plan_arguments(given), **peers.plan_options(given))
    arguments, scales = peers.run_arguments(given, 1)
    out = wrapper.run(*arguments, **scales)
    exact = torch.cat([inputs.exact_output(given, request) for request in range(3)])
    torch.testing.assert_close(out.double(), exact, rtol=2.0**-8, atol=1e-6)


def test_wide_caches_hold_the_same_values():
    cell = grid.Cell(2, 64, kv_cache="fp8")
    pool = inputs.Pool(3 * inputs.set_bytes(cell, 1), 2, device="cpu")
    given = pool.inputs(cell, 1, calls=3)
    for codes, wide in zip(given.caches, given.wide_caches, strict=True):
        assert (codes.dtype, wide.dtype) == (quantization.FP8_DTYPE, torch.bfloat16)
        assert torch.equal(codes.to(torch.bfloat16), wide)
        assert 0.9 < wide.float().std() < 1.1


def test_wide_caches_hold_the_values_of_packed_tokens():
    cell = grid.Cell(2, 64, kv_cache="flashmla_656")
    pool = inputs.Pool(3 * inputs.set_bytes(cell, 1), 2, device="cpu")
    given = pool.inputs(cell, 1, calls=3)
    for packed, wide in zip(given.caches, given.wide_caches, strict=True):
        assert packed.shape == (2, 64, 656)
        assert torch.equal(quantization.dequantize_flashmla_656(packed), wide)
        assert 0.9 < wide.float().std() < 1.1


def test_later_cells_find_fresh_data_and_room():
    small, large = grid.Cell(1, 64, kv_cache="fp8"), grid.Cell(4, 64, kv_cache="fp8")
    pool = inputs.Pool(inputs.set_bytes(large, 1), 3, device="cpu")
    pool.inputs(small, 1, calls=1)
    assert pool.inputs(large, 1, calls=1).caches[0].shape == (4, 64, 576)
    plain = pool.inputs(grid.Cell(1, 64), 1, calls=1).caches[0]
    assert plain.dtype == torch.bfloat16
    rounded = plain.to(quantization.FP8_DTYPE).to(torch.bfloat16)
    assert not torch.equal(plain, rounded)  # not what an fp8 cell left behind


# Verdicts


def test_verdicts_are_met():
    lines = report.Verdicts(grid_cases(), 4600.0).issue5()
    assert [line.split()[0] for line in lines] == ["MET"] * 7


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"peers": {"flashmla": 189.0, "flashmla_fp8": 160.0}}, "over FlashMLA bf16"),
        ({"peers": {"flashmla": 200.0, "flashmla_fp8": 149.0}}, "16 x 64K over FlashMLA fp8"),
        ({"gbps": 0.89 * 4600}, "share of the read ceiling"),
        ({"rmse": 1.9e-4}, "RMSE over rounding"),
    ],
)
def test_verdicts_on_the_longest_cell(changes, name):
    cases = grid_cases()
    index = next(
        i for i, c in enumerate(cases) if (c["batch"], c["context"], c["heads"]) == (16, 64 * K, 16)
    )
    cases[index] = fp8_case(**changes)
    assert verdict(report.Verdicts(cases, 4600.0).issue5(), name) == "MISSED"


def test_verdicts_on_the_grid_and_on_rows():
    name = "batch x context over FlashMLA fp8"
    assert verdict(report.Verdicts(grid_cases(fp8_us=139.0), None).issue5(), name) == "MISSED"
    cases = grid_cases()
    cases[0]["peers"]["flashmla_fp8"]["us"] = 99.0
    assert verdict(report.Verdicts(cases, None).issue5(), name) == "MISSED"
    assert verdict(report.Verdicts(grid_cases()[1:], None).issue5(), name) == "OPEN"
    cases = grid_cases(fp8_us=129.0)
    assert verdict(report.Verdicts(cases, None).issue5(), "64 rows") == "MISSED"
    assert verdict(report.Verdicts(cases, None).issue5(), "128 rows") == "MET"
    cases = [case for case in cases if case["heads"] != 128 or case["context"] != 16 * K]
    assert verdict(report.Verdicts(cases, None).issue5(), "128 rows") == "OPEN"


def test_other_types_and_pages_decide_nothing():
    """fp16 queries, small pages or another layout at 16 x 64K are not the cell of the bars."""
    others = [
        fp8_case(50.0, dtype="fp16"),
        fp8_case(50.0, page_size=16),
        fp8_case(50.0, kv_dtype="flashmla_656"),
    ]
    lines = report.Verdicts(others, 4600.0).issue5()
    assert [line.split()[0] for line in lines] == ["OPEN"] * 6 + ["MET"]
    assert {line.split()[0] for line in report.Verdicts([], 4600.0).issue5()} == {"OPEN"}


def test_fp8_cells_leave_the_other_bars_alone():
    fast = [fp8_case(1.0, rmse=1.0, lengths="zipf"), *grid_cases(1.0)]
    for lines in (report.Verdicts(fast, 4600.0).issue2(), report.Verdicts(fast, 4600.0).issue4()):
        assert {line.split()[0] for line in lines} == {"OPEN"}


# Tables and evidence


def test_accuracy_is_reported_by_type_of_cache():
    cases = [make_case(), make_case(rmse=1.3e-4), fp8_case(rmse=1.55e-4), fp8_case(rmse_rounding=0)]
    worst = report.worst_ratios(cases)
    assert worst == {"bf16": (1.3 / 1.24, 2), "fp8_e4m3": (1.55 / 1.24, 1)}
    found = make_evidence(
        *cases,
        tests={"passed": 1, "failed": 0, "skipped": 0, "seconds": 1.0},
        sanitizer={},
    )
    text = readme_tables.validation_table({"validation": found})
    assert "alone, bf16 cache | at most 1.048 over 2 cases" in text
    assert "alone, fp8_e4m3 cache | at most 1.250 over 1 cases" in text


def test_tables_keep_fp8_apart():
    cases = [make_case(), make_case(heads=8), fp8_case(), fp8_case(page_size=16)]
    found = make_evidence(*cases, fp8_case(batch=4, kv_dtype="flashmla_656"))
    assert evidence.schema_errors(found) == []
    text = report.table(found["cases"], 4600.0)
    assert " bf16 / fp8 " in text
    assert " bf16 / 656 " in text
    assert "FlashMLA fp8" in text
    plain, other, fp8 = (
        table({"decode": found})
        for table in (
            readme_tables.batch_context_table,
            readme_tables.shapes_table,
            readme_tables.fp8_table,
        )
    )
    assert "fp8" not in plain + other
    assert "656" not in plain + other
    assert "| bf16 / 656 |" in fp8
    assert fp8.count("| 16 x 64K |") == 2
    assert "| 160.0 | 400.0 |" in fp8
    without = readme_tables.render(readme_with("fp8"), {"decode": make_evidence(make_case())})
    assert "Not measured yet." in without
