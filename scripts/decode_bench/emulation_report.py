"""What the H20 emulation's figures say: checks, table and verdicts. Needs no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import roofline

from . import report

EMULATION = (
    "EMULATION on an H200: 78 CTAs, and after each WGMMA products with A = 0, so that it takes "
    "what it takes on an H20. Nothing was run on an H20."
)
RMSE_BOUND = 1.15  # over that of rounding the exact result, as in the GPU tests
PAPER_RATIO = roofline.PAPER_TFLOPS["ETAP"] / roofline.PAPER_TFLOPS["FlashMLA"]
WANTED_TFLOPS = 109.0  # 90 % of what 4.0 TB/s allow


def h20_cycles(columns: int) -> float:
    """Of one bf16 WGMMA of ``columns`` on an H20."""
    return roofline.instruction_cycles(roofline.PRESETS["h20"], columns)


def calibration_errors(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Instructions that do not cost what they cost on an H20, to 5 % less and 25 % more."""
    return [
        f"a WGMMA of {row['columns']} columns takes {row['emulated']} cycles emulated, "
        f"{row['h20']:g} on an H20; with 0 to 4 products with A = 0: {row['cycles']}. Correct "
        "count_zero_products() in csrc/etap_mla_wgmma.cuh"
        for row in rows
        if not 0.95 * row["h20"] <= row["emulated"] <= 1.25 * row["h20"]
    ]


def tflops(case: dict[str, Any], us: float) -> float:
    """Of the rows asked for, as the paper counts."""
    tokens = case["batch"] * case["context"]
    return roofline.FLOP_PER_TOKEN_AND_ROW * case["heads"] * tokens / us / 1e6


def case_errors(case: dict[str, Any]) -> list[str]:
    """Wrong results, and times that an H20's tensor cores rule out."""
    where = f"{case['batch']} x {report.tokens(case['context'])}, {case['heads']} heads"
    errors = []
    for kernel, measured in (("etap", case), ("padded", case["padded"])):
        if not measured["rmse"] <= RMSE_BOUND * case["rmse_rounding"]:
            errors.append(
                f"{where}, {kernel}: RMSE against float64 {measured['rmse']:.3g}, of rounding "
                f"{case['rmse_rounding']:.3g}"
            )
        shape = (case["heads"], "bf16", case["batch"], case["context"])
        least = roofline.bound(roofline.PRESETS["h20"], kernel, *shape).tensor_us
        if measured["us"] < 0.95 * least:
            errors.append(
                f"{where}, {kernel}: {measured['us']:.1f} us, but the tensor cores of an H20 take "
                f"{least:.1f}: the kernel does not multiply through etap::Multiply"
            )
    return errors


HEAD = ("batch x context", "heads", "ETAP, us", "TFLOP/s", "padded, us", "TFLOP/s", "padded / ETAP")


def table_row(case: dict[str, Any]) -> list[str]:
    """Cells under ``HEAD``."""
    padded = case["padded"]["us"]
    return [
        f"{case['batch']} x {report.tokens(case['context'])}",
        str(case["heads"]),
        f"{case['us']:.1f}",
        f"{tflops(case, case['us']):.1f}",
        f"{padded:.1f}",
        f"{tflops(case, padded):.1f}",
        f"{padded / case['us']:.2f}",
    ]


def verdicts(cases: Sequence[dict[str, Any]]) -> list[str]:
    """What the emulation says of the paper's figures, at the paper's shape."""
    rows, batch, context = roofline.PAPER_SHAPE
    for case in cases:
        if (case["heads"], case["batch"], case["context"]) == (rows, batch, context):
            own = tflops(case, case["us"])
            padded = tflops(case, case["padded"]["us"])
            paper = ", ".join(f"{name} {value:g}" for name, value in roofline.PAPER_TFLOPS.items())
            return [
                f"At 16 heads, batch 16, 64K the paper measured, in TFLOP/s on an H20: {paper}. "
                f"Emulated: ETAP {own:.1f}, padded to 64 rows {padded:.1f}.",
                f"The paper's {PAPER_RATIO:.2f} over FlashMLA: {own / padded:.2f} emulated, over "
                "this project's own kernel for 64 rows.",
                f"{WANTED_TFLOPS:g} TFLOP/s (90 % of 4.0 TB/s): "
                f"{'reached' if own >= WANTED_TFLOPS else 'not reached'}, {own:.1f}.",
            ]
    return ["The paper's shape was not measured."]
