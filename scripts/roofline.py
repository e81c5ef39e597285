#!/usr/bin/env python
"""What ETAP, and a kernel that pads its rows to 64, can reach at best on a Hopper GPU.

Computed, not run: needs no GPU, except for --measure. A bound is the larger of two times and leaves
out what every kernel pays besides: launch, schedule, softmax, merge, uneven splits, copies into
shared memory. What those cost is in scripts/TUNING.md.

- Memory: 576 numbers a cached token, read once (1152 bytes in bf16, 576 in fp8 e4m3), at the GPU's
  bandwidth. Queries and outputs are left out.
- Tensor cores: WGMMAs of m64nNk16 in bf16, m64nNk32 in e4m3, which run at the same pace. A tile of
  64 tokens and N rows takes 36 for the scores and 32 for the output in bf16, half as many in fp8.
  Each costs N/2 cycles at the full rate (4096 bf16 FLOP a cycle and SM: H100, H200), four times
  that on an H20, and at least the 16 + N/4 in which shared memory delivers 2048 bytes of A and 32N
  of B at 128 a cycle (an A in registers came from there too). Measured on an H200, two or three
  warpgroups on an SM: 18.1, 20.2, 24.2, 32.2 cycles for N = 8, 16, 32, 64. One warpgroup by itself
  takes 2 more, which no kernel has to pay and the bound leaves out.

ETAP (arXiv 2506.01969) has rows on N: 8, 16, 32 or 64, and tiles of 64 beyond. A padded kernel has
them on M, always a multiple of 64; its N is large, so that N/2 alone counts. fp8 is multiplied as
e4m3, and the transposition of V that a padded kernel needs for it is left out.

SMs, rates and bandwidths are data-sheet figures. The clock is 1.98 GHz, which an H200 reaches, for
the others too. A GPU without results/<gpu>/decode.json is a PROJECTION, the H20 above all: nothing
here was run on one. --measure, on a Hopper GPU, times whole calls with the cache in L2, which says
what a 64-token tile takes when memory has no part in it, and writes results/<gpu>/l2_tiles.json.

    python scripts/roofline.py
    python scripts/roofline.py --measure
    python scripts/roofline.py --gpu h20 --clock-ghz 1.853 --rows 16 --plot roofline.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from decode_bench import report
from decode_bench.evidence import REPOSITORY
from decode_bench.grid import HEAD_DIM_CKV, TOKEN_WIDTH

TILE_TOKENS = 64
PADDED_ROWS = 64
ETAP_ROW_STEPS = (8, 16, 32, 64)
FULL_RATE = 4096  # dense bf16 FLOP a cycle and SM: m64nNk16 in N/2 cycles
FLOP_PER_TOKEN_AND_ROW = 2 * (TOKEN_WIDTH + HEAD_DIM_CKV)
# Of a cached token, by the evidence's names of caches.
TOKEN_BYTES = {
    "bf16": 2 * TOKEN_WIDTH,
    "fp16": 2 * TOKEN_WIDTH,
    "fp8_e4m3": TOKEN_WIDTH,
    "flashmla_656": 656,
}
KERNELS = ("etap", "padded")
# flashinfer_fa2 is not among them: it does not use WGMMA, so its rows are not padded to 64.
PADDED_PEERS = ("flashinfer_fa3", "flashmla", "fa3", "flashmla_fp8", "flashinfer_fp8")

PAPER = "arXiv 2506.01969, H20, batch 16, 64K, 16 heads"
PAPER_SHAPE = (16, 16, 64 * 1024)  # rows, batch, context
PAPER_TFLOPS = {"ETAP": 89.0, "FlashMLA": 32.0, "FlashInfer": 18.0, "FA3": 17.0}
H20_DATASHEET_TFLOPS = 148.0


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A Hopper GPU, as far as the bound needs it.

    Parameters
    ----------
    name : str
        For tables; results are looked up under ``results/<name>``.
    sms : int
        Streaming multiprocessors.
    clock_ghz : float
        Clock of the SMs in GHz.
    tensor_rate : float
        Dense bf16 FLOP a cycle and SM, at most 4096.
    bandwidth_tbps : float
        Memory bandwidth in TB/s (10^12 bytes a second).
    """

    name: str
    sms: int
    clock_ghz: float
    tensor_rate: float
    bandwidth_tbps: float

    def __post_init__(self) -> None:
        for field in ("sms", "clock_ghz", "tensor_rate", "bandwidth_tbps"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be above 0, got {getattr(self, field)}")
        if self.tensor_rate > FULL_RATE:
            raise ValueError(f"tensor_rate is at most {FULL_RATE}, got {self.tensor_rate}")

    @property
    def peak_tflops(self) -> float:
        """Dense bf16 TFLOP/s of all tensor cores."""
        return self.sms * self.clock_ghz * self.tensor_rate / 1e3

    @property
    def evidence(self) -> pathlib.Path | None:
        """Measured cells of this GPU; None when there are none, or a figure was overridden."""
        path = REPOSITORY / "results" / self.name / "decode.json"
        return path if self == PRESETS.get(self.name) and path.exists() else None

    @property
    def l2_tiles(self) -> dict[str, Any] | None:
        """What --measure wrote on this GPU; None when it did not, or a figure was overridden."""
        path = REPOSITORY / "results" / self.name / "l2_tiles.json"
        is_preset = self == PRESETS.get(self.name)
        return json.loads(path.read_text()) if is_preset and path.exists() else None

    @property
    def label(self) -> str:
        """Name, and whether its bounds are held against anything measured."""
        return self.name if self.evidence else f"{self.name} (PROJECTION)"

    def describe(self) -> str:
        return (
            f"{self.label}: {self.sms} SMs, {self.clock_ghz:g} GHz, {self.peak_tflops:.0f} dense "
            f"bf16 TFLOP/s, {self.bandwidth_tbps:g} TB/s"
        )


PRESETS = {
    "h200": Gpu("h200", 132, 1.98, FULL_RATE, 4.8),
    "h20": Gpu("h20", 78, 1.98, FULL_RATE / 4, 4.0),
    "h100": Gpu("h100", 132, 1.98, FULL_RATE, 3.35),
}


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least time of one call; ``flop`` counts the rows asked for, not those padded."""

    memory_us: float
    tensor_us: float
    cache_bytes: int
    flop: int

    @property
    def us(self) -> float:
        return max(self.memory_us, self.tensor_us)

    @property
    def limit(self) -> str:
        return "memory" if self.memory_us >= self.tensor_us else "tensor"

    @property
    def tflops(self) -> float:
        return self.flop / self.us / 1e6

    @property
    def gbps(self) -> float:
        return self.cache_bytes / self.us / 1e3


def tile_cycles(gpu: Gpu, kernel: str, rows: int, cache: str) -> float:
    """Cycles that an SM's tensor cores need for 64 tokens and all rows of a request.

    Parameters
    ----------
    gpu : Gpu
    kernel : str
        "etap" or "padded".
    rows : int
        Query length x heads.
    cache : str
        "bf16", "fp16", "fp8_e4m3" or "flashmla_656".
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {KERNELS}, got {kernel!r}")
    # 36 + 32 of k16, for every 64 tokens and row tile, however M and N share them.
    instructions = (TOKEN_WIDTH + HEAD_DIM_CKV) // (16 if cache in ("bf16", "fp16") else 32)
    if kernel == "padded":
        full = PADDED_ROWS / 2 * FULL_RATE / gpu.tensor_rate
        return -(-rows // PADDED_ROWS) * instructions * full
    step = next((step for step in ETAP_ROW_STEPS if rows <= step), ETAP_ROW_STEPS[-1])
    return -(-rows // step) * instructions * instruction_cycles(gpu, step)


def instruction_cycles(gpu: Gpu, columns: int) -> float:
    """Cycles of a WGMMA with N = ``columns`` and A in shared memory."""
    return max(columns / 2 * FULL_RATE / gpu.tensor_rate, 16 + columns / 4)


def bound(gpu: Gpu, kernel: str, rows: int, cache: str, batch: int, context: int) -> Bound:
    """The bound of one call with ``batch`` requests of ``context`` tokens each.

    The tiles are spread evenly over the SMs, in fractions if need be.
    """
    tokens = batch * context
    cycles = tile_cycles(gpu, kernel, rows, cache) * tokens / TILE_TOKENS / gpu.sms
    cache_bytes = tokens * TOKEN_BYTES[cache]
    return Bound(
        memory_us=cache_bytes / gpu.bandwidth_tbps / 1e6,
        tensor_us=cycles / gpu.clock_ghz / 1e3,
        cache_bytes=cache_bytes,
        flop=FLOP_PER_TOKEN_AND_ROW * rows * tokens,
    )


def format_table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
        for row in rows
    )


def bounds_table(gpu: Gpu, rows: Sequence[int], batch: int, context: int) -> str:
    """Bounds of both kernels for each cache type and number of rows."""
    head = ["cache", "rows"]
    for kernel in KERNELS:
        head += [f"{kernel} us", "TFLOP/s", "GB/s", "bound by"]
    lines = [[*head, "padded/etap"]]
    for cache in ("bf16", "fp8_e4m3"):
        for count in rows:
            line = [cache, str(count)]
            pair = [bound(gpu, kernel, count, cache, batch, context) for kernel in KERNELS]
            for one in pair:
                line += [f"{one.us:.1f}", f"{one.tflops:.0f}", f"{one.gbps:.0f}", one.limit]
            lines.append([*line, f"{pair[1].us / pair[0].us:.2f}"])
    return format_table(lines)


# The read ceiling is taken with 1.2 GB, launch and ramp included: some 5 of its 270 us.
# Calls that read ten times as much spend next to nothing on them.
CEILING_RAMP = 0.02


@dataclasses.dataclass(frozen=True)
class Check:
    """A measured time beside its bound, which a share above 1 + CEILING_RAMP would disprove."""

    cell: str
    kernel: str
    bound: Bound
    us: float

    @property
    def share(self) -> float:
        return self.bound.us / self.us

    @property
    def beats_bound(self) -> bool:
        return self.share > 1 + CEILING_RAMP


def checks(gpu: Gpu, evidence: dict[str, Any]) -> list[Check]:
    """Every measured time of ETAP and of the padded peers beside its bound.

    The bandwidth is the read ceiling measured in the same run, which is less than the data sheet's
    and so the harder test, by CEILING_RAMP too hard for long calls. Cells of varied lengths are
    left out: their tokens are not recorded.
    """
    gpu = dataclasses.replace(gpu, bandwidth_tbps=evidence["read_ceiling_gbps"] / 1e3)
    found = []
    for case in evidence["cases"]:
        if "lengths" in case:
            continue
        rows = case["heads"] * case["q_len"]
        cell = (
            f"{case['batch']} x {report.tokens(case['context'])}, {case['heads']} heads, "
            f"q {case['q_len']}, page {case['page_size']}, {case['kv_dtype']}"
        )
        times = {"etap": case["us"]}
        times |= {n: peer["us"] for n, peer in case["peers"].items() if n in PADDED_PEERS}
        for name, us in times.items():
            if us is not None:
                kernel = "etap" if name == "etap" else "padded"
                # A peer reads the cache that its own name says, whatever ETAP reads in this case.
                peer_cache = "fp8_e4m3" if name.endswith("_fp8") else "bf16"
                cache = case["kv_dtype"] if name == "etap" else peer_cache
                shape = (cache, case["batch"], case["context"])
                found.append(Check(cell, name, bound(gpu, kernel, rows, *shape), us))
    return found


def checks_text(gpu: Gpu, evidence: dict[str, Any]) -> str:
    """ETAP's cells one by one, and the closest that any kernel came to its bound."""
    found = checks(gpu, evidence)
    if not found:
        return "no measured cell of equal lengths"
    lines = [["cell", "bound us", "measured us", "share", "bound by"]]
    for one in found:
        if one.kernel == "etap":
            shown = [f"{one.bound.us:.1f}", f"{one.us:.1f}", f"{100 * one.share:.0f} %"]
            lines.append([one.cell, *shown, one.bound.limit])
    closest = max(found, key=lambda one: one.share)
    return (
        f"measured, ETAP; bandwidth: the run's read ceiling, {evidence['read_ceiling_gbps']} GB/s\n"
        f"{format_table(lines)}\n"
        f"closest to its bound of {len(found)} times, padded peers among them: {closest.kernel} at "
        f"{closest.cell}, {100 * closest.share:.0f} %; "
        f"{sum(one.beats_bound for one in found)} beat theirs"
    )


L2_HEAD = ("cache", "rows", "cycles from L2", "tensor cores", "from memory")


def l2_rows(gpu: Gpu, measured: dict[str, Any]) -> list[list[str]]:
    """Cells under ``L2_HEAD``: cycles of a tile and SM, from L2 measured, the other two bounds."""
    rows = []
    for case in measured["cases"]:
        heads, cache = case["heads"], case["kv_dtype"]
        tile_bytes = TILE_TOKENS * TOKEN_BYTES[cache]
        memory = tile_bytes * gpu.sms * gpu.clock_ghz / gpu.bandwidth_tbps / 1e3
        bounds = (tile_cycles(gpu, "etap", heads, cache), memory)
        rows.append([cache, str(heads), *(f"{c:.0f}" for c in (case["tile_cycles"], *bounds))])
    return rows


def l2_text(gpu: Gpu) -> str:
    """Measured cycles per 64-token tile, or that there are none."""
    measured = gpu.l2_tiles
    if measured is None:
        return f"{gpu.name}: cycles per 64-token tile with the data in L2 are not measured."
    return (
        f"{gpu.name}: cycles of an SM per 64 tokens and all rows, measured with the data in L2, "
        f"beside\nthe least that tensor cores and memory allow\n"
        f"{format_table([L2_HEAD, *l2_rows(gpu, measured)])}"
    )


def paper_text(h20: Gpu) -> str:
    """The paper's measured table beside the projected bounds, at two clocks."""
    at_datasheet = dataclasses.replace(
        h20, clock_ghz=H20_DATASHEET_TFLOPS * 1e3 / h20.sms / h20.tensor_rate
    )
    lines = [
        ["", "paper, TFLOP/s", *(f"PROJECTED, {g.clock_ghz:.3g} GHz" for g in (h20, at_datasheet))]
    ]
    pairs = [projected(gpu) for gpu in (h20, at_datasheet)]
    for name, measured in PAPER_TFLOPS.items():
        line = [name, f"{measured:.0f}"]
        for pair in pairs:
            tflops = pair[0 if name == "ETAP" else 1].tflops
            line.append(f"at most {tflops:.1f} ({100 * measured / tflops:.0f} % reached)")
        lines.append(line)
    measured_ratio = PAPER_TFLOPS["ETAP"] / PAPER_TFLOPS["FlashMLA"]
    ratios = [f"{pair[1].us / pair[0].us:.2f}" for pair in pairs]
    lines.append(["ETAP / FlashMLA", f"{measured_ratio:.2f}", *ratios])
    return (
        f"PROJECTION (bf16, H20) beside what the paper measured ({PAPER}).\n"
        f"Nothing here was run on an H20. {at_datasheet.clock_ghz:.2f} GHz give the data sheet's "
        f"{H20_DATASHEET_TFLOPS:.0f} TFLOP/s.\n"
        f"{format_table(lines)}"
    )


def projected(gpu: Gpu) -> tuple[Bound, Bound]:
    """Bounds of ETAP and of a padded kernel at the paper's shape, bf16."""
    rows, batch, context = PAPER_SHAPE
    etap, padded = (bound(gpu, kernel, rows, "bf16", batch, context) for kernel in KERNELS)
    return etap, padded


def plot(gpus: Sequence[Gpu], path: pathlib.Path) -> None:
    """TFLOP/s of both bounds over rows, a panel for each GPU and cache type."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = range(1, 129)
    drawing, axes = pyplot.subplots(
        len(gpus), 2, figsize=(9.6, 3.6 * len(gpus)), squeeze=False, sharex=True
    )
    for line, gpu in zip(axes, gpus, strict=True):
        for axis, cache in zip(line, ("bf16", "fp8_e4m3"), strict=True):
            for kernel, style in zip(KERNELS, ("-", "--"), strict=True):
                # Batch and context cancel out of TFLOP/s.
                values = [bound(gpu, kernel, count, cache, 1, 64).tflops for count in rows]
                axis.plot(rows, values, style, label=f"{kernel}, bound")
            if gpu.name == "h20" and cache == "bf16":
                for name, value in PAPER_TFLOPS.items():
                    label = f"{name}, measured by the paper"
                    axis.plot(PAPER_SHAPE[0], value, "o", markersize=4, label=label)
            axis.set_title(f"{gpu.label}, {cache}", fontsize=9)
            axis.set_xlabel("rows (heads x query length)", fontsize=8)
            axis.set_ylabel("TFLOP/s", fontsize=8)
            axis.legend(fontsize=7)
            axis.grid(True, alpha=0.3)
    drawing.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=120)
    pyplot.close(drawing)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; ``gpus`` of the result has the overrides in it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gpu", choices=sorted(PRESETS), nargs="+", default=["h200", "h20"], help="default both"
    )
    parser.add_argument("--sms", type=int, help="override, as the next three; with one --gpu")
    parser.add_argument("--clock-ghz", type=float)
    parser.add_argument("--tensor-rate", type=float, help="dense bf16 FLOP a cycle and SM")
    parser.add_argument("--bandwidth-tbps", type=float, help="TB/s")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=64 * 1024, help="tokens of each request")
    parser.add_argument("--plot", type=pathlib.Path, help="write a PNG; needs matplotlib")
    parser.add_argument(
        "--measure", action="store_true", help="cycles from L2, on this GPU; no more"
    )
    parser.add_argument("--out", type=pathlib.Path, help="--measure: directory, not results/<gpu>")
    options = parser.parse_args(arguments)
    names = ("sms", "clock_ghz", "tensor_rate", "bandwidth_tbps")
    changes = {n: getattr(options, n) for n in names if getattr(options, n) is not None}
    if changes and len(options.gpu) != 1:
        parser.error("an override needs exactly one --gpu")
    if min(*options.rows, options.batch, options.context) < 1:
        parser.error("--rows, --batch and --context must be at least 1")
    try:
        options.gpus = [dataclasses.replace(PRESETS[name], **changes) for name in options.gpu]
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> int:
    """Print or measure; the exit status is 1 when a measured time beats its bound."""
    options = parse_arguments(arguments)
    if options.measure:
        from decode_bench import l2_tiles

        l2_tiles.measure_all(options.out)
        return 0
    beaten = False
    for gpu in options.gpus:
        print(gpu.describe())
        print(f"bounds at batch {options.batch}, {options.context} tokens")
        print(bounds_table(gpu, options.rows, options.batch, options.context), end="\n\n")
        if gpu.evidence:
            evidence = json.loads(gpu.evidence.read_text())
            print(checks_text(gpu, evidence), end="\n\n")
            beaten |= any(one.beats_bound for one in checks(gpu, evidence))
            print(l2_text(gpu), end="\n\n")
        if gpu.name == "h20":
            print(paper_text(gpu), end="\n\n")
    if options.plot:
        plot(options.gpus, options.plot)
        print(f"written: {options.plot}")
    return 1 if beaten else 0


if __name__ == "__main__":
    sys.exit(main())
