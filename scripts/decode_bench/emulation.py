"""The parts of ``scripts/emulate_h20.py`` that compile and measure."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import check_ptxas
import torch

from etap_flashinfer import aot, execution, jit

from . import emulation_report, timing, tool_modules
from .grid import HEAD_DIM_CKV, Cell
from .inputs import SM_SCALE, Inputs, Pool, calls_of, exact_output, reference_requests, split_token
from .peers import RunCall

CTAS = 78
COLUMNS = (8, 16, 32, 64)  # N of the WGMMAs that are calibrated
PADDED_ROW_TILE = 64
POOL_BYTES = 2 * timing.CEILING_BYTES  # 2.4 GB
FEWEST_CALLS = 16  # in a graph, so that its launch does not show


@dataclasses.dataclass(frozen=True)
class EmulatedVariant(jit.EtapMlaVariant):
    """A variant whose WGMMAs and grid are those of an H20; never loaded by the package."""

    @property
    def short_name(self) -> str:
        return f"h20_{super().short_name}"

    @property
    def nvcc_flags(self) -> tuple[str, ...]:
        return ("-DETAP_EMULATE_H20",)


def variant(row_tile: int) -> EmulatedVariant:
    return EmulatedVariant(torch.bfloat16, row_tile, "tma")


def build(directory: pathlib.Path, row_tiles: Sequence[int], jobs: int) -> None:
    """Compile all modules into a directory; needs nvcc, but no GPU.

    Raises
    ------
    RuntimeError
        If ptxas spills or serialises WGMMAs in one of them: it would emulate something slower.
    """
    for name in tool_modules.NAMES:
        tool_modules.build(name, directory)
    variants = [variant(row_tile) for row_tile in row_tiles]
    aot.build_all(variants, directory, jobs, verbose=False)
    reports = check_ptxas.check_variants(variants, jobs, nvdisasm=None)
    problems = [
        f"{one.variant.short_name}: {problem}" for one in reports for problem in one.problems
    ]
    if problems:
        raise RuntimeError("\n".join(problems))


def calibrate(modules: pathlib.Path | None) -> list[dict[str, Any]]:
    """Cycles of a WGMMA with 0 to 4 products with A = 0 behind it, and how many the kernels add."""
    module = tool_modules.load("wgmma_cost", modules)
    cycles = torch.empty(CTAS, dtype=torch.int64, device="cuda")
    rows = []
    for columns in COLUMNS:
        by_products = []
        for products in range(5):
            for _ in range(2):  # the first call loads the code
                count = module.wgmma_cycles(columns, products, cycles)
            by_products.append(round(cycles.double().median().item() / count, 2))
        added = module.zero_products(columns)
        row = {"columns": columns, "cycles": by_products, "added": added}
        rows.append(
            row | {"emulated": by_products[added], "h20": emulation_report.h20_cycles(columns)}
        )
    return rows


def launcher(module: Any, inputs: Inputs) -> RunCall:
    """``run(call)`` on the module itself: the package would choose another row tile."""
    device = inputs.queries.device
    workspace = torch.empty(module.workspace_bytes(0), dtype=torch.uint8, device=device)
    kept = execution.make_kept_memory(module.kept_bytes(0), device)
    out = torch.empty(*inputs.queries.shape[1:3], HEAD_DIM_CKV, dtype=torch.bfloat16, device=device)
    index = (inputs.qo_indptr, inputs.kv_indptr, inputs.kv_indices, inputs.kv_lens)

    def run(call: int) -> torch.Tensor:
        number = call % inputs.calls
        tensors = (*split_token(inputs.queries[number]), *split_token(inputs.caches[number]))
        causal, lse_base_e, scales, fixed_split_tiles = False, False, (1.0, 1.0), 0
        scalars = (causal, SM_SCALE, lse_base_e, *scales, fixed_split_tiles)
        module.run(workspace, kept, *tensors, *index, out, None, *scalars)
        return out

    return run


def rmse(values: torch.Tensor, exact: torch.Tensor) -> float:
    return (values.double() - exact).square().mean().sqrt().item()


def measure(
    cell: Cell, pool: Pool, load: Callable[[int], Any], seed: int, repeats: int
) -> dict[str, Any]:
    """The case of one cell: ETAP at N = rows and padded to 64 rows, timed and compared."""
    sets = max(1, min(calls_of(cell, seed), POOL_BYTES // cell.nominal_bytes()))
    inputs = pool.inputs(cell, seed, sets)
    calls = sets * -(-FEWEST_CALLS // sets)
    captured = [
        timing.capture(launcher(load(row_tile), inputs), calls)
        for row_tile in (cell.heads, PADDED_ROW_TILE)
    ]
    times = timing.time_in_turns(captured, repeats)
    requests = reference_requests(inputs.lengths)
    exact = torch.stack([exact_output(inputs, request)[0] for request in requests])
    errors = []
    for item in captured:
        item.output.fill_(float("nan"))  # what is compared must come from this replay
        item.graph.replay()
        errors.append(rmse(item.output[requests], exact))
    return {
        **cell.as_case(),
        "us": round(times[0], 3),
        "gbps": round(inputs.bytes_read / times[0] / 1e3, 1),
        "rmse": errors[0],
        "rmse_rounding": rmse(exact.to(torch.bfloat16), exact),
        "peers": {},
        "padded": {"us": round(times[1], 3), "rmse": errors[1]},
    }
