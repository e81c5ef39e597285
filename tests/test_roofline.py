"""The roofline model: figures by hand, properties, and no measured time that beats its bound."""

from __future__ import annotations

import copy
import dataclasses
import json
import re

import pytest
import roofline
import torch
from decode_bench import grid, inputs, l2_tiles
from decode_bench.evidence import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from roofline import PRESETS, bound, tile_cycles

K = 1024
CACHES = ("bf16", "fp8_e4m3")
H200, H20 = PRESETS["h200"], PRESETS["h20"]

gpus = st.builds(
    roofline.Gpu,
    name=st.just("drawn"),
    sms=st.integers(1, 200),
    clock_ghz=st.floats(0.5, 3.0),
    tensor_rate=st.floats(64, 4096),
    bandwidth_tbps=st.floats(0.1, 10.0),
)
rows_drawn = st.integers(1, 600)
kernels, caches = st.sampled_from(roofline.KERNELS), st.sampled_from(CACHES)


@pytest.mark.parametrize(
    ("gpu", "kernel", "rows", "cache", "cycles"),
    [
        (H200, "etap", 1, "bf16", 68 * 18),  # 16 + 8/4: shared memory
        (H200, "etap", 16, "bf16", 68 * 20),
        (H200, "etap", 17, "bf16", 68 * 24),
        (H200, "etap", 64, "bf16", 68 * 32),  # both
        (H200, "etap", 65, "bf16", 2 * 68 * 32),
        (H200, "etap", 16, "fp8_e4m3", 34 * 20),
        (H200, "padded", 1, "bf16", 68 * 32),
        (H200, "padded", 65, "bf16", 2 * 68 * 32),
        (H20, "etap", 8, "bf16", 68 * 18),  # 2N is 16, shared memory still takes 18
        (H20, "etap", 16, "bf16", 68 * 32),
        (H20, "etap", 32, "fp8_e4m3", 34 * 64),
        (H20, "padded", 16, "bf16", 68 * 128),
    ],
)
def test_cycles_by_hand(gpu, kernel, rows, cache, cycles):
    assert tile_cycles(gpu, kernel, rows, cache) == cycles


@pytest.mark.parametrize(("rows", "measured"), [(8, 18.1), (16, 20.2), (32, 24.2), (64, 32.2)])
def test_no_measured_instruction_beats_the_model(rows, measured):
    modelled = tile_cycles(H200, "etap", rows, "bf16") / 68
    assert 0.98 * measured < modelled <= measured


def test_bounds_by_hand():
    etap = bound(H20, "etap", 16, "bf16", 16, 64 * K)
    assert etap.cache_bytes == 16 * 65536 * 1152
    assert etap.flop == 16 * 65536 * 16 * 2176
    assert etap.limit == "memory"
    assert etap.us == pytest.approx(1207.96 / 4.0, rel=1e-5)
    assert etap.tflops == pytest.approx(120.9, abs=0.05)
    assert etap.gbps == pytest.approx(4000)

    padded = bound(H20, "padded", 16, "bf16", 16, 64 * K)
    assert padded.limit == "tensor"
    assert padded.us == pytest.approx(16384 * 8704 / (78 * 1980), rel=1e-9)
    assert padded.tflops == pytest.approx(
        78 * 1.98 * 1.024 / 4, rel=1e-9
    )  # a quarter is not padding
    assert padded.us / etap.us == pytest.approx(3.06, abs=0.005)

    fp8 = bound(H200, "padded", 16, "fp8_e4m3", 16, 64 * K)
    assert (fp8.limit, fp8.us) == ("memory", pytest.approx(603.98 / 4.8, rel=1e-5))


@given(gpus, rows_drawn, caches)
def test_etap_is_never_worse_than_padded(gpu, rows, cache):
    etap, padded = (bound(gpu, kernel, rows, cache, 3, 1000) for kernel in roofline.KERNELS)
    assert etap.us <= padded.us


@given(gpus, rows_drawn, kernels, caches)
def test_more_rows_are_never_faster(gpu, rows, kernel, cache):
    few, more = (bound(gpu, kernel, count, cache, 3, 1000) for count in (rows, rows + 1))
    assert few.us <= more.us


@given(gpus, rows_drawn, kernels, caches, st.floats(1.0, 4.0))
def test_a_better_gpu_is_never_slower(gpu, rows, kernel, cache, factor):
    before = bound(gpu, kernel, rows, cache, 3, 1000)
    for field in ("sms", "clock_ghz", "tensor_rate", "bandwidth_tbps"):
        value = getattr(gpu, field) * factor
        if field == "sms":
            value = int(value)
        elif field == "tensor_rate":
            value = min(value, roofline.FULL_RATE)
        better = dataclasses.replace(gpu, **{field: value})
        assert bound(better, kernel, rows, cache, 3, 1000).us <= before.us


@given(gpus, rows_drawn, kernels)
def test_the_bound_is_within_the_gpu(gpu, rows, kernel):
    one = bound(gpu, kernel, rows, "bf16", 3, 1000)
    assert one.tflops <= gpu.peak_tflops * (1 + 1e-12)
    assert one.gbps <= gpu.bandwidth_tbps * 1e3 * (1 + 1e-12)
    assert one.us >= bound(gpu, kernel, rows, "fp8_e4m3", 3, 1000).us


def test_datasheet_rates():
    at_1830 = dataclasses.replace(H200, clock_ghz=1.83)
    assert at_1830.peak_tflops == pytest.approx(989.4, abs=0.1)  # NVIDIA's figure for H100, H200
    assert roofline.H20_DATASHEET_TFLOPS < H20.peak_tflops < 1.1 * roofline.H20_DATASHEET_TFLOPS


def measured_evidence() -> dict:
    return json.loads((REPOSITORY / "results" / "h200" / "decode.json").read_text())


def test_no_measured_cell_beats_its_bound():
    evidence = measured_evidence()
    found = roofline.checks(H200, evidence)
    equal = [case for case in evidence["cases"] if "lengths" not in case]
    assert equal
    assert sum(one.kernel == "etap" for one in found) == len(equal)
    assert [one for one in found if one.beats_bound] == []


def test_a_cell_that_beats_its_bound_is_seen(monkeypatch, tmp_path, capsys):
    evidence = measured_evidence()
    case = copy.deepcopy(next(case for case in evidence["cases"] if case["context"] == 64 * K))
    case["us"] = 0.5 * case["us"] * case["gbps"] / evidence["read_ceiling_gbps"]
    (tmp_path / "results" / "h200").mkdir(parents=True)
    path = tmp_path / "results" / "h200" / "decode.json"
    path.write_text(json.dumps({**evidence, "cases": [case, {**case, "lengths": "zipf"}]}))
    monkeypatch.setattr(roofline, "REPOSITORY", tmp_path)
    assert roofline.main(["--gpu", "h200"]) == 1
    assert "; 1 beat theirs" in capsys.readouterr().out


def test_fp8_peers_have_the_bound_of_an_fp8_cache():
    evidence = measured_evidence()
    case = {**evidence["cases"][0], "kv_dtype": "fp8_e4m3", "us": 99.0}
    case["peers"] = {n: {"us": 99.0} for n in ("flashmla", "flashmla_fp8", "flashinfer_fa2")}
    found = roofline.checks(H200, {**evidence, "cases": [case]})
    sizes = {one.kernel: one.bound.cache_bytes // case["batch"] // case["context"] for one in found}
    assert sizes == {"etap": 576, "flashmla": 1152, "flashmla_fp8": 576}


def test_what_is_printed(capsys):
    assert roofline.main([]) == 0
    text = capsys.readouterr().out
    assert "h20 (PROJECTION): 78 SMs" in text
    assert "h200: 132 SMs" in text
    ratio = re.search(r"ETAP / FlashMLA +(\S+) +(\S+) +(\S+)", text)
    assert ratio is not None
    assert ratio.groups() == ("2.78", "3.06", "3.27")
    for name, tflops in (("ETAP", 89), ("FlashMLA", 32), ("FlashInfer", 18), ("FA3", 17)):
        assert re.search(rf"^ *{name} +{tflops} +at most", text, re.MULTILINE)


def l2_evidence(**changes) -> dict:
    case = {"heads": 16, "kv_dtype": "bf16", "tile_cycles": 1810.4} | changes
    return {"cases": [case]}


def test_cycles_from_l2_are_shown_beside_the_bounds(monkeypatch, tmp_path):
    monkeypatch.setattr(roofline, "REPOSITORY", tmp_path)
    assert "with the data in L2 are not measured" in roofline.l2_text(H200)
    directory = tmp_path / "results" / "h200"
    directory.mkdir(parents=True)
    (directory / "l2_tiles.json").write_text(json.dumps(l2_evidence()))
    assert re.search(r"bf16 +16 +1810 +1360 +4014$", roofline.l2_text(H200))
    assert "are not measured" in roofline.l2_text(H20)
    assert "are not measured" in roofline.l2_text(dataclasses.replace(H200, sms=66))


def test_cycles_from_l2_by_hand():
    # 8,192 tiles over 132 SMs in 62.06 us more: 62.06 tiles on each, so 1 us a tile.
    tiles = l2_tiles.BATCH * (l2_tiles.LONG - l2_tiles.SHORT) / 64 / 132
    assert l2_tiles.tile_cycles(10.0, 10.0 + tiles, 1.98, 132) == pytest.approx(1980)


def test_inputs_in_l2(monkeypatch):
    monkeypatch.setattr(l2_tiles, "PAGES", 4)
    pool = inputs.Pool(4 * 64 * 1152, seed=1, device="cpu")
    cell = grid.Cell(3, 640, heads=8)
    found = l2_tiles.inputs_in_l2(cell, pool, seed=1)
    assert found.caches[0].shape == (4, 64, 576)
    assert found.kv_indices.numel() == 3 * 10 == found.block_table.numel()
    assert set(found.kv_indices.tolist()) <= {0, 1, 2, 3}
    assert found.kv_indptr.tolist() == [0, 10, 20, 30]
    assert found.bytes_read == 3 * 640 * 1152
    exact = inputs.exact_output(found, 2)
    tokens = found.caches[0][found.kv_indices[20:].long()].flatten(0, 1).double()
    scores = found.queries[0, 2].double() @ tokens.T * 192**-0.5
    assert torch.allclose(exact[0], scores.softmax(-1) @ tokens[:, :512])


def test_readme_has_the_printed_ratios():
    readme = " ".join((REPOSITORY / "README.md").read_text().split())
    at_boost = [one.us for one in roofline.projected(H20)]
    on_h200 = [one.us for one in roofline.projected(H200)]
    assert f"{at_boost[1] / at_boost[0]:.2f} times as long on an H20" in readme
    assert f"{on_h200[1] / on_h200[0]:.2f} times on an H200" in readme


def test_overridden_figures_are_a_projection(capsys):
    assert roofline.main(["--gpu", "h200", "--sms", "66", "--rows", "16"]) == 0
    text = capsys.readouterr().out
    assert "h200 (PROJECTION): 66 SMs" in text
    assert "measured, ETAP" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sms", "66"], "exactly one --gpu"),
        (["--gpu", "h20", "--sms", "0"], "sms must be above 0, got 0"),
        (["--gpu", "h20", "--bandwidth-tbps", "nan"], "bandwidth_tbps must be above 0"),
        (["--gpu", "h20", "--tensor-rate", "8192"], "at most 4096, got 8192"),
        (["--rows", "0"], "must be at least 1"),
        (["--gpu", "b200"], "invalid choice"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        roofline.parse_arguments(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_bad_values():
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        tile_cycles(H20, "etap", 0, "bf16")
    with pytest.raises(ValueError, match="'fa4'"):
        tile_cycles(H20, "fa4", 16, "bf16")


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plots" / "roofline.png"
    roofline.plot([H200, H20], path)
    assert path.stat().st_size > 10_000
