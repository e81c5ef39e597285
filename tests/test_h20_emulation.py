"""The pure parts of the H20 emulation, and that it can not be mistaken for anything else."""

from __future__ import annotations

import re
from pathlib import Path

import emulate_h20
import pytest
import readme_tables
import roofline
import torch
from decode_bench import emulation, emulation_report, evidence, grid, inputs, tool_modules

from etap_flashinfer import aot, jit, reference

K = 1024
CSRC = evidence.REPOSITORY / "csrc"


def case(us: float = 300.0, padded: float = 900.0, **changes) -> dict:
    """The paper's shape as the script writes it."""
    found = {
        **{"batch": 16, "context": 64 * K, "heads": 16, "q_len": 1, "page_size": 64},
        **{"dtype": "bf16", "kv_dtype": "bf16", "us": us, "gbps": 4000.0, "peers": {}},
        **{"rmse": 1.26e-4, "rmse_rounding": 1.24e-4, "padded": {"us": padded, "rmse": 1.26e-4}},
    }
    return found | changes


def row(columns: int, emulated: float) -> dict:
    h20 = emulation_report.h20_cycles(columns)
    cycles = [emulated] * 5
    return {"columns": columns, "cycles": cycles, "added": 1, "emulated": emulated, "h20": h20}


def test_names_are_never_those_of_the_package():
    for row_tile in (8, 16, 64):
        variant = emulation.variant(row_tile)
        assert variant not in jit.ALL_VARIANTS
        assert variant.short_name == f"h20_bf16_n{row_tile}_tma"
        assert variant.name not in {known.name for known in jit.ALL_VARIANTS}
        assert variant.nvcc_flags == ("-DETAP_EMULATE_H20",)
    assert {flag for known in jit.ALL_VARIANTS for flag in known.nvcc_flags} == set()


def test_the_flag_reaches_the_compiler_of_the_emulation_alone(tmp_path, monkeypatch):
    pytest.importorskip("flashinfer", reason="flashinfer is not installed")
    monkeypatch.setattr(jit._flashinfer_jit().env, "FLASHINFER_GEN_SRC_DIR", tmp_path)
    monkeypatch.setattr(jit._flashinfer_jit().cpp_ext, "get_cuda_path", lambda: "/nowhere")
    spec = jit.gen_etap_mla_module(emulation.variant(16))
    assert spec.name == emulation.variant(16).name
    assert "-DETAP_EMULATE_H20" in spec.extra_cuda_cflags
    plain = jit.gen_etap_mla_module(jit.EtapMlaVariant(torch.bfloat16, 16, "tma"))
    assert "-DETAP_EMULATE_H20" not in plain.extra_cuda_cflags


def test_manifest_lists_emulated_modules(tmp_path):
    variant = emulation.variant(16)
    (tmp_path / f"{variant.name}.so").write_bytes(b"module")
    aot._write_manifest(tmp_path, [variant], {})
    assert jit.aot_library_path(variant, tmp_path) == tmp_path / f"{variant.name}.so"
    with pytest.raises(jit.EtapJitError, match="lacks h20_bf16_n64_tma"):
        jit.aot_library_path(emulation.variant(64), tmp_path)


def test_kernels_multiply_through_the_one_wrapper():
    # A gemm() beside it would be left out of the emulation, which would then flatter the kernel.
    pattern = re.compile(r"\bgemm\s*\(")
    users = {path.name for path in CSRC.rglob("*.cuh") if pattern.search(path.read_text())}
    fp8 = {"fp8_math", "fp8_tile_math", "fp8_scores", "flashmla_scores"}
    assert users == {f"etap_mla_{name}.cuh" for name in {"wgmma", *fp8}}
    binding = (CSRC / "etap_mla_binding.cu").read_text()
    assert "static_assert(kKvCache == KvCache::kSame" in binding  # fp8 can not be emulated


def test_an_h20_instruction():
    assert [emulation_report.h20_cycles(columns) for columns in (8, 16, 32, 64)] == [
        18,
        32,
        64,
        128,
    ]


def test_calibration():
    good = [row(8, 18.1), row(16, 33.3), row(32, 72.5), row(64, 128.5)]
    assert emulation_report.calibration_errors(good) == []
    (error,) = emulation_report.calibration_errors([row(8, 18.1), row(16, 24.4)])
    assert "16 columns takes 24.4 cycles emulated, 32 on an H20" in error
    assert emulation_report.calibration_errors([row(64, 200.0)]) != []


def test_wrong_results_and_missing_emulation_are_errors():
    assert emulation_report.case_errors(case()) == []
    assert "etap: RMSE" in emulation_report.case_errors(case(rmse=2e-4))[0]
    assert "etap: RMSE" in emulation_report.case_errors(case(rmse=float("nan")))[0]
    wrong = case()["padded"] | {"rmse": 2e-4}
    assert "padded: RMSE" in emulation_report.case_errors(case(padded=wrong) | {"padded": wrong})[0]
    (error,) = emulation_report.case_errors(case(padded=290.0))  # as fast as on an H200
    assert "padded: 290.0 us, but the tensor cores of an H20 take 923" in error


def test_verdicts_by_hand():
    cases = [case(us=334.0, padded=1000.0), case(batch=32)]
    text = " ".join(emulation_report.verdicts(cases))
    assert emulation_report.tflops(cases[0], 334.0) == pytest.approx(16 * 65536 * 16 * 2176 / 334e6)
    assert "ETAP 109.3, padded to 64 rows 36.5" in text
    assert "2.78 over FlashMLA: 2.99 emulated" in text
    assert "(90 % of 4.0 TB/s): reached, 109.3" in text
    assert "not reached" in " ".join(emulation_report.verdicts([case(us=400.0)]))
    assert emulation_report.verdicts([case(heads=8)]) == ["The paper's shape was not measured."]


def test_the_projection_bounds_what_the_emulation_may_find():
    ratio = [one.us for one in roofline.projected(roofline.PRESETS["h20"])]
    assert 2.775 < emulation_report.PAPER_RATIO < 2.785 < ratio[1] / ratio[0]


class ReferenceModule:
    """The entry points of a compiled module, in plain PyTorch on the CPU."""

    def __init__(self):
        self.calls = 0

    def workspace_bytes(self, device: int) -> int:
        return 16

    def kept_bytes(self, device: int) -> int:
        return 16

    def run(self, workspace, kept, *tensors_and_options) -> None:
        *tensors, out, lse, causal, sm_scale, lse_base_e = tensors_and_options[:-3]
        assert tensors_and_options[-3:] == (1.0, 1.0, 0)  # scales, no fixed split
        assert (lse, causal, lse_base_e) == (None, False, False)
        result, _ = reference.mla_paged_attention(*tensors, causal, sm_scale)
        out.copy_(result)
        self.calls += 1


class Replayed:
    """What timing.capture returns, without a graph."""

    def __init__(self, run, calls):
        self.output = [run(call) for call in range(calls)][-1]
        self.graph, self.replay = self, lambda: [run(call) for call in range(calls)]


def test_measuring_a_cell(monkeypatch):
    monkeypatch.setattr(emulation.timing, "capture", Replayed)
    monkeypatch.setattr(emulation.timing, "time_in_turns", lambda captured, repeats: [2.0, 5.0])
    cell = grid.Cell(3, 130, heads=8)
    monkeypatch.setattr(emulation, "POOL_BYTES", 2 * cell.nominal_bytes())
    pool = inputs.Pool(3 * cell.nominal_bytes(), seed=1, device="cpu")
    modules = {8: ReferenceModule(), 64: ReferenceModule()}
    found = emulation.measure(cell, pool, modules.__getitem__, seed=1, repeats=3)
    assert evidence.schema_errors(dict.fromkeys(evidence.TOP_KEYS) | {"cases": [found]}) == []
    assert (found["us"], found["padded"]["us"]) == (2.0, 5.0)
    assert found["rmse"] == found["padded"]["rmse"] <= 1.01 * found["rmse_rounding"]
    assert found["gbps"] == pytest.approx(3 * 130 * 1152 / 2e3, abs=0.1)
    assert modules[8].calls == modules[64].calls == 2 * 16  # captured, and replayed once


def test_table_row():
    assert emulation_report.table_row(case()) == [
        *("16 x 64K", "16", "300.0", "121.7", "900.0", "40.6", "3.00")
    ]
    assert len(emulation_report.HEAD) == 7


def test_cells():
    options = emulate_h20.parse_arguments([])
    assert len(options.cells) == 32
    assert options.cells[-1].nominal_bytes() == 32 * 64 * K * grid.TOKEN_BYTES
    assert {cell.heads for cell in options.cells} == {8, 16}
    assert emulate_h20.parse_arguments(["--seed", "7", "--heads", "16"]).seed == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--build-only", "a", "--modules", "b"], "not allowed with"),
        (["--heads", "32"], "invalid choice"),
        (["--batch", "0"], "batch must be at least 1"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        emulate_h20.parse_arguments(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_no_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert emulate_h20.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_readme_tables():
    assert readme_tables.h20_emulation_table({}) == "Not measured yet.\n"
    assert readme_tables.l2_tiles_table({}) == "Not measured yet.\n"
    source = {"device": "NVIDIA H200", "versions": {"torch": "2.11"}, "date": "2026-11-21T10:00"}
    source["csrc_sha256"] = "0" * 64
    found = source | {
        "read_ceiling_gbps": 4050.0,
        "wgmma_cycles": [row(16, 33.3)],
        "cases": [case(batch=32), case(), case(heads=8)],
    }
    text = readme_tables.h20_emulation_table({"h20_emulation": found})
    assert emulation_report.EMULATION in text
    assert text.index("| 16 x 64K | 16 | 300.0 | 121.7 |") < text.index("| 32 x 64K | 16 |")
    assert "x 64K | 8 |" not in text
    assert "33 (32) at N = 16" in text
    assert "read ceiling 4050 GB/s" in text


def test_evidence_keeps_to_the_schema_and_says_what_it_is(tmp_path):
    head = dict.fromkeys(evidence.TOP_KEYS) | {"emulation": emulation_report.EMULATION}
    evidence.write(tmp_path / "h20_emulation.json", head | {"cases": [case()]})
    assert "EMULATION on an H200" in (tmp_path / "h20_emulation.json").read_text()


def test_tool_modules_change_name_with_their_sources(tmp_path, monkeypatch):
    names = {tool_modules.module_name(name) for name in tool_modules.NAMES}
    monkeypatch.setattr(tool_modules, "CSRC", tmp_path)
    (tmp_path / "etap_mla_wgmma.cuh").write_text("changed")
    assert names.isdisjoint(tool_modules.module_name(name) for name in tool_modules.NAMES)
    for name in tool_modules.NAMES:
        assert Path(tool_modules.__file__).with_name(f"{name}.cu").is_file()
    with pytest.raises(FileNotFoundError, match="etap_wgmma_cost_"):
        tool_modules.load("wgmma_cost", tmp_path)
