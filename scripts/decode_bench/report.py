"""What a benchmark run says: the table, the verdicts on the project's bars, and the plot."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .grid import preset

Case = dict[str, Any]
BF16_PEERS = ("flashinfer_fa2", "flashinfer_fa3", "flashmla", "fa3")
FP8_PEERS = ("flashmla_fp8", "flashinfer_fp8")
FP8_NAMES = {"fp8_e4m3": "fp8", "flashmla_656": "656"}  # of caches, by the evidence's names
PEER_TITLES = {
    "flashinfer_fa2": "FlashInfer fa2",
    "flashinfer_fa3": "FlashInfer fa3",
    "flashmla": "FlashMLA",
    "fa3": "FA3",
    "flashmla_fp8": "FlashMLA fp8",
    "flashinfer_fp8": "FlashInfer fp8",
}
K = 1024


def best_peer(case: Case) -> float | None:
    """Microseconds of the fastest peer of the case, None when none was measured."""
    times = [peer["us"] for peer in case["peers"].values() if peer["us"] is not None]
    return min(times, default=None)


def speedup(case: Case) -> float | None:
    """Best peer's time over ETAP's, None without either."""
    best = best_peer(case)
    return best / case["us"] if best is not None and case["us"] else None


def tokens(count: int) -> str:
    """512, 1K, 64K."""
    return f"{count // K}K" if count >= K and count % K == 0 else str(count)


def figure(value: float | None, digits: int = 1) -> str:
    """A number for a table, a dash for one that was not measured."""
    return "-" if value is None else f"{value:.{digits}f}"


def is_fp8(case: Case) -> bool:
    """Whether the cache is of fp8, in either layout."""
    return case["kv_dtype"] in FP8_NAMES


def types(case: Case) -> str:
    """Type of queries and output, and of the cache where it is another: bf16, bf16 / fp8."""
    dtype, kv_dtype = case["dtype"], case["kv_dtype"]
    return f"{dtype} / {FP8_NAMES[kv_dtype]}" if is_fp8(case) else dtype


def is_plain(case: Case) -> bool:
    """16 heads, one query token, bf16, page 64, equal lengths: the shape of the first bars."""
    return (
        (case["heads"], case["q_len"], case["page_size"]) == (16, 1, 64)
        and case["dtype"] == case["kv_dtype"] == "bf16"
        and "lengths" not in case
    )


def table(cases: Sequence[Case], ceiling: float | None) -> str:
    """All cases as aligned text, with the share of the read ceiling and the accuracy."""
    peers = [name for name in PEER_TITLES if any(name in case["peers"] for case in cases)]
    head = ["batch", "context", "heads", "q", "page", "dtype", "ETAP us", "GB/s", "ceiling"]
    head += [PEER_TITLES[name] for name in peers] + ["best/ETAP", "rmse/rounding"]
    rows = [head]
    for case in cases:
        share = None if not ceiling or case["gbps"] is None else 100 * case["gbps"] / ceiling
        context = tokens(case["context"])
        row = [str(case["batch"]), f"{case['lengths']} {context}" if "lengths" in case else context]
        row += [str(case[key]) for key in ("heads", "q_len", "page_size")] + [types(case)]
        row += [figure(case["us"]), figure(case["gbps"], 0)]
        row += ["-" if share is None else f"{share:.0f} %"]
        row += [figure(case["peers"].get(name, {}).get("us")) for name in peers]
        row += [figure(speedup(case), 2), figure(_ratio(case["rmse"], case["rmse_rounding"]), 3)]
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
        for row in rows
    )


def _ratio(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by


def worst_ratios(cases: Sequence[Case]) -> dict[str, tuple[float, int]]:
    """Largest RMSE over that of rounding alone, and over how many cases, by type of the cache."""
    ratios: dict[str, list[float]] = {}
    for case in cases:
        if case["rmse_rounding"]:
            ratio = case["rmse"] / case["rmse_rounding"]
            ratios.setdefault(case["kv_dtype"], []).append(ratio)
    return {name: (max(own), len(own)) for name, own in sorted(ratios.items())}


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def fixed_split_slowdowns(cases: Sequence[Case]) -> dict[str, dict[tuple[int, int], float]]:
    """Time of batch-invariant calls over that of others: by size of parts, batch and context.

    Of others, that which was measured beside them.
    """
    slowdowns: dict[str, dict[tuple[int, int], float]] = {}
    for case in cases:
        for size, found in case.get("fixed_split", {}).items():
            cells = slowdowns.setdefault(size, {})
            cells[case["batch"], case["context"]] = found["us"] / found["us_of_others"]
    return slowdowns


def _verdict(name: str, holds: bool, text: str) -> str:
    return f"{'MET' if holds else 'MISSED':7} {name}: {text}"


def _open(name: str, text: str) -> str:
    return f"{'OPEN':7} {name}: {text}"


def _at_most(name: str, ratios: Sequence[float], bar: float) -> str:
    if not ratios:
        return _open(name, "not measured")
    text = f"at most {max(ratios):.3f} over {len(ratios)} cells (bar {bar:.2f})"
    return _verdict(name, max(ratios) <= bar, text)


class Verdicts:
    """The bars of the project, each judged on the measured cases or left open."""

    def __init__(self, cases: Sequence[Case], ceiling: float | None):
        measured = [case for case in cases if case["us"] is not None]
        self.cases = [case for case in measured if not is_fp8(case)]
        # One query token, bf16, page 64: what the bars of the fp8 cache are about.
        self.fp8 = [case for case in measured if is_fp8(case)]
        self.plain_fp8 = [
            case
            for case in self.fp8
            if (case["q_len"], case["page_size"], case["dtype"]) == (1, 64, "bf16")
            and case["kv_dtype"] == "fp8_e4m3"
            and "lengths" not in case
        ]
        self.plain = [case for case in self.cases if is_plain(case)]
        self.ceiling = ceiling

    def _plain_cell(self, batch: int, context: int) -> Case | None:
        for case in self.plain:
            if (case["batch"], case["context"]) == (batch, context):
                return case
        return None

    def _speed(
        self, name: str, cases: Sequence[Case], mean: float | None, least: float, whole: int
    ) -> str:
        """Geometric mean and worst cell of best peer over ETAP; open below ``whole`` cells."""
        measured = [case for case in cases if speedup(case) is not None]
        if not measured:
            return _open(name, "no cell with a peer was measured")
        ratios = [speedup(case) for case in measured]
        worst = min(measured, key=speedup)
        text = (
            f"best peer / ETAP {geometric_mean(ratios):.3f} in geometric mean of {len(ratios)} "
            f"cells (bar {figure(mean, 2)}), worst {min(ratios):.3f} at {worst['batch']} x "
            f"{tokens(worst['context'])}, {worst['heads']} heads, q {worst['q_len']} "
            f"(bar {least:.2f}){self._absent(measured)}"
        )
        if len(ratios) < whole:
            return _open(name, f"{len(ratios)} of {whole} cells so far: {text}")
        holds = min(ratios) >= least and (mean is None or geometric_mean(ratios) >= mean)
        return _verdict(name, holds, text)

    def _absent(self, cases: Sequence[Case]) -> str:
        absent = [name for name in BF16_PEERS if not any(name in case["peers"] for case in cases)]
        return f"; without {', '.join(absent)}" if absent else ""

    def _share(self, name: str, case: Case | None, share: float) -> str:
        """Of the read ceiling, at 16 x 64K."""
        if case is None or not self.ceiling:
            return _open(name, "16 x 64K or the read ceiling was not measured")
        reached = case["gbps"] / self.ceiling
        text = f"{100 * reached:.1f} % of {self.ceiling:.0f} GB/s (bar {100 * share:.0f} %)"
        return _verdict(name, reached >= share, text)

    def _latency(self, batch: int, context: int, bar: float) -> str:
        name = f"{batch} x {tokens(context)} latency"
        case = self._plain_cell(batch, context)
        if case is None:
            return _open(name, "not measured")
        return _verdict(name, case["us"] <= bar, f"{case['us']:.1f} us (bar {bar:.1f})")

    def _pages(self) -> str:
        name = "page 1 and 16 against 64"
        by_shape = {_shape(case): case for case in self.cases}
        slower = {}
        for shape, case in by_shape.items():
            page_64 = by_shape.get(_shape({**case, "page_size": 64}))
            if case["page_size"] in (1, 16) and case["context"] >= 8 * K and page_64:
                slower[shape] = case["us"] / page_64["us"]
        if not slower:
            return _open(name, "not measured at 8K or more")
        shape = max(slower, key=slower.__getitem__)
        text = (
            f"at most {100 * (slower[shape] - 1):.1f} % slower over {len(slower)} cells (bar 5 %)"
        )
        return _verdict(name, slower[shape] <= 1.05, f"{text}, worst page {shape[4]}")

    def _accuracy(self) -> list[str]:
        rounding = [case["rmse"] / case["rmse_rounding"] for case in self.cases]
        against = [
            case["rmse"] / case["peers"]["flashmla"]["rmse"]
            for case in self.cases
            if case["peers"].get("flashmla", {}).get("rmse")
        ]
        return [
            _at_most("RMSE over rounding alone", rounding, 1.15),
            _at_most("RMSE over FlashMLA's", against, 1.02),
        ]

    def issue2(self) -> list[str]:
        """Bars of the first end-to-end version."""
        long_cells = [self._plain_cell(16, k * K) for k in (16, 32, 64)]
        measured = [case for case in long_cells if case is not None]
        name = "batch 16 at 16K, 32K, 64K"
        speed = self._speed(name, measured, None, 1.0, 3)
        share = self._share("16 x 64K share of the read ceiling", long_cells[-1], 0.92)
        return [speed, share, *self._accuracy()]

    def issue4(self) -> list[str]:
        """Bars of the tuned version."""
        shapes = {(cell.batch, cell.context) for cell in preset("batch-context")}
        of_grid = [case for case in self.plain if (case["batch"], case["context"]) in shapes]
        varied = [case for case in self.cases if "lengths" in case]
        bf16 = [case for case in self.cases if case["kv_dtype"] == "bf16"]
        other = [c for c in bf16 if (c["heads"], c["q_len"]) != (16, 1) and c["page_size"] == 64]
        few = [case for case in other if case["heads"] * case["q_len"] <= 64]
        many = [case for case in other if case["heads"] * case["q_len"] >= 128]
        long_cell = self._plain_cell(16, 64 * K)
        return [
            self._speed("batch x context, 16 heads", of_grid, 1.3, 1.0, len(shapes)),
            self._share("16 x 64K share of the read ceiling, tuned", long_cell, 0.96),
            self._latency(1, 8 * K, 10.0),
            self._latency(16, 1 * K, 11.5),
            self._speed("varied lengths", varied, None, 1.2, 3),
            self._speed("up to 64 rows", few, 1.15, 1.0, 1),
            self._speed("128 rows and more", many, 1.0, 1.0, 1),
            self._pages(),
            self._fixed_split(),
        ]

    def _fixed_split(self) -> str:
        """Of the sizes of parts, the one with the least mean."""
        name = "batch-invariant calls"
        whole = len(preset("fixed-split"))
        means = {
            size: geometric_mean(slower.values())
            for size, slower in fixed_split_slowdowns(self.plain).items()
            if len(slower) == whole
        }
        if not means:
            return _open(name, f"no size of parts was measured in all {whole} cells")
        best = min(means, key=means.__getitem__)
        figures = ", ".join(f"{mean:.3f} with {size}" for size, mean in means.items())
        text = (
            f"{means[best]:.3f} times the time of others in geometric mean of {whole} cells, with "
            f"parts of {best} tokens (bar 1.10; {figures})"
        )
        return _verdict(name, means[best] <= 1.1, text)

    def _fp8_cell(self, batch: int, context: int, heads: int = 16) -> Case | None:
        for case in self.plain_fp8:
            if (case["batch"], case["context"], case["heads"]) == (batch, context, heads):
                return case
        return None

    def _against(self, name: str, cells: Sequence[Case | None], peer: str, bar: float) -> str:
        """The worst ratio of a peer's time to ETAP's over all of the cells; open without one."""
        ratios = [_peer_ratio(case, peer) for case in cells]
        measured = [ratio for ratio in ratios if ratio is not None]
        if len(measured) < len(cells):
            return _open(name, f"{len(measured)} of {len(cells)} cells with {peer} were measured")
        return _verdict(name, min(measured) >= bar, f"{min(measured):.3f} (bar {bar:.2f})")

    def _fp8_grid(self) -> str:
        name = "fp8: batch x context over FlashMLA fp8"
        cells = [self._fp8_cell(cell.batch, cell.context) for cell in preset("fp8")]
        ratios = {}
        for case in cells:
            ratio = None if case is None else _peer_ratio(case, "flashmla_fp8")
            if case is not None and ratio is not None:
                ratios[f"{case['batch']} x {tokens(case['context'])}"] = ratio
        if len(ratios) < len(cells):
            return _open(name, f"{len(ratios)} of {len(cells)} cells were measured")
        mean, worst = geometric_mean(ratios.values()), min(ratios, key=ratios.__getitem__)
        text = (
            f"{mean:.3f} in geometric mean of {len(ratios)} cells (bar 1.40), worst "
            f"{ratios[worst]:.3f} at {worst} (bar 1.00)"
        )
        return _verdict(name, mean >= 1.4 and ratios[worst] >= 1.0, text)

    def issue5(self) -> list[str]:
        """Bars of the fp8 cache."""
        long_cell = self._fp8_cell(16, 64 * K)
        rounding = [case["rmse"] / case["rmse_rounding"] for case in self.fp8]
        rows_64, rows_128 = (
            [self._fp8_cell(16, k * K, heads) for k in (16, 64)] for heads in (64, 128)
        )
        return [
            self._against("fp8: 16 x 64K over FlashMLA bf16", [long_cell], "flashmla", 1.9),
            self._against("fp8: 16 x 64K over FlashMLA fp8", [long_cell], "flashmla_fp8", 1.5),
            self._share("fp8: 16 x 64K share of the read ceiling", long_cell, 0.9),
            self._fp8_grid(),
            self._against("fp8: 64 rows over FlashMLA fp8", rows_64, "flashmla_fp8", 1.3),
            self._against("fp8: 128 rows over FlashMLA fp8", rows_128, "flashmla_fp8", 1.0),
            _at_most("fp8: RMSE over rounding alone", rounding, 1.5),
        ]


def _peer_ratio(case: Case | None, peer: str) -> float | None:
    """A peer's time over ETAP's, None where one of them is missing."""
    microseconds = None if case is None else case["peers"].get(peer, {}).get("us")
    return None if case is None or microseconds is None else microseconds / case["us"]


def _shape(case: Case) -> tuple:
    keys = ("batch", "context", "heads", "q_len", "page_size", "dtype", "kv_dtype")
    return (*(case[key] for key in keys), case.get("lengths"))


def plot(cases: Sequence[Case], ceiling: float | None, device: str, path: pathlib.Path) -> None:
    """Time against context for each batch of the plain cells, all peers and the read ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plain = [case for case in cases if is_plain(case)]
    batches = sorted({case["batch"] for case in plain})
    if not batches:
        raise ValueError("nothing to plot: no cell of 16 heads, 1 query, bf16, page 64")
    columns = min(4, len(batches))
    rows = -(-len(batches) // columns)
    drawing, axes = pyplot.subplots(
        rows, columns, figsize=(4.2 * columns, 3.4 * rows), squeeze=False, sharex=True
    )
    for axis, batch in zip(axes.flat, batches, strict=False):
        own = sorted((c for c in plain if c["batch"] == batch), key=lambda c: c["context"])
        _plot_batch(axis, own, ceiling, f"batch {batch}")
    for axis in axes.flat[len(batches) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize=7)
    drawing.suptitle(f"MLA decode, 16 heads, 1 query token, bf16, page 64: {device}")
    drawing.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=120)
    pyplot.close(drawing)


def _plot_batch(axis: Any, cases: Sequence[Case], ceiling: float | None, title: str) -> None:
    time_of: dict[str, Callable[[Case], float | None]] = {"ETAP": lambda case: case["us"]}
    for name in BF16_PEERS:
        time_of[PEER_TITLES[name]] = lambda case, n=name: case["peers"].get(n, {}).get("us")
    for label, get in time_of.items():
        points = [(case["context"], get(case)) for case in cases if get(case) is not None]
        if points:
            style = {"linewidth": 2.2, "color": "black"} if label == "ETAP" else {"alpha": 0.8}
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label, **style)
    if ceiling:
        contexts = [case["context"] for case in cases]
        floor = [case["gbps"] * case["us"] / ceiling for case in cases]
        axis.plot(contexts, floor, linestyle=":", color="grey", label="read ceiling")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks([case["context"] for case in cases])
    axis.set_xticklabels([tokens(case["context"]) for case in cases], fontsize=7)
    axis.set_title(title, fontsize=9)
    axis.set_ylabel("microseconds", fontsize=8)
    axis.grid(True, which="major", alpha=0.3)
