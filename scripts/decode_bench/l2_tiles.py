"""Cycles of a 64-token tile with its data in L2, for ``scripts/roofline.py --measure``.

All requests share 128 pages, 9.4 MB in bf16, so that memory has no part in it. The time of short
requests is taken off that of long ones, and with it everything that a call pays once.
"""

from __future__ import annotations

import dataclasses
import pathlib
import secrets
import statistics
import time
from typing import Any

import torch

from . import evidence, peers, timing
from .grid import Cell
from .inputs import DTYPES, Inputs, Pool, exact_output, reference_requests

PAGES, PAGE_SIZE, TILE_TOKENS = 128, 64, 64
BATCH, SHORT, LONG = 16, 32 * 1024, 64 * 1024
ROWS = (8, 16, 32, 64, 128)
CALLS, REPEATS = 16, 9
CLOCK_CYCLES = 20_000_000


def inputs_in_l2(cell: Cell, pool: Pool, seed: int) -> Inputs:
    """Inputs of a cell whose page table draws from the same few pages."""
    device = pool.elements("bf16").device
    own = pool.inputs(dataclasses.replace(cell, batch=1, context=PAGES * PAGE_SIZE), seed, calls=1)
    pages = cell.context // PAGE_SIZE
    block_table = torch.randint(PAGES, (cell.batch, pages), dtype=torch.int32, device=device)
    shape = (1, cell.batch * cell.q_len, cell.heads, own.queries.shape[-1])
    index = {"dtype": torch.int32, "device": device}
    return dataclasses.replace(
        own,
        cell=cell,
        queries=torch.randn(shape, dtype=DTYPES[cell.dtype], device=device),
        qo_indptr=torch.arange(cell.batch + 1, **index) * cell.q_len,
        kv_indptr=torch.arange(cell.batch + 1, **index) * pages,
        kv_indices=block_table.flatten(),
        kv_lens=torch.full((cell.batch,), cell.context, **index),
        block_table=block_table,
        lengths=[cell.context] * cell.batch,
    )


def tile_cycles(us_short: float, us_long: float, clock_ghz: float, sms: int) -> float:
    """Cycles that an SM takes for 64 tokens and all rows of a request."""
    tiles = BATCH * (LONG - SHORT) / TILE_TOKENS
    return (us_long - us_short) * 1e3 * clock_ghz * sms / tiles


def clock_ghz() -> float:
    """Clock of the SMs now: of a kernel that waits for a number of cycles."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.cuda._sleep(CLOCK_CYCLES)
    end.record()
    end.synchronize()
    return CLOCK_CYCLES / start.elapsed_time(end) / 1e6


def rmse(values: torch.Tensor, exact: torch.Tensor) -> float:
    return (values.double() - exact).square().mean().sqrt().item()


def measure(rows: int, kv_cache: str, pool: Pool, seed: int) -> dict[str, Any]:
    """The case of ``rows`` heads and one query token."""
    captured = []
    for context in (SHORT, LONG):
        cell = Cell(BATCH, context, heads=rows, kv_cache=kv_cache)
        inputs = inputs_in_l2(cell, pool, seed)
        (peer,) = peers.make_peers(["etap"], print)  # one each: a captured graph keeps its tensors
        run = peer.prepare(inputs)
        captured.append(timing.capture(lambda call, run=run: run(0), CALLS))
    clocks = [clock_ghz()]
    us_short, us_long = timing.time_in_turns(captured, REPEATS)
    clocks.append(clock_ghz())
    item = captured[-1]
    item.output.fill_(float("nan"))
    item.graph.replay()
    requests = reference_requests(inputs.lengths)
    exact = torch.stack([exact_output(inputs, request)[0] for request in requests])
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    clock = statistics.mean(clocks)
    return {
        **{"batch": BATCH, "context": LONG, "heads": rows, "q_len": 1, "page_size": PAGE_SIZE},
        **{"dtype": cell.dtype, "kv_dtype": cell.kv_dtype, "us": round(us_long, 3)},
        **{"gbps": round(inputs.bytes_read / us_long / 1e3, 1), "peers": {}},
        **{"rmse": rmse(item.output[requests], exact)},
        **{"rmse_rounding": rmse(exact.to(item.output.dtype), exact)},
        **{"us_short": round(us_short, 3), "context_short": SHORT, "clock_ghz": round(clock, 3)},
        **{"tile_cycles": round(tile_cycles(us_short, us_long, clock, sms), 1)},
    }


def measure_all(out: pathlib.Path | None) -> pathlib.Path:
    """Measure all rows and caches and write ``l2_tiles.json``; returns its path."""
    csrc_hash = evidence.check_sources_match()
    seed, started = secrets.randbits(31), time.monotonic()
    torch.manual_seed(seed)
    pool = Pool(PAGES * PAGE_SIZE * 1152, seed)
    head = evidence.header(csrc_hash, None) | {"command": "python scripts/roofline.py --measure"}
    path = (out or evidence.default_directory()) / "l2_tiles.json"
    cases = []
    for kv_cache in ("same", "fp8"):
        for rows in ROWS:
            case = measure(rows, kv_cache, pool, seed)
            cases.append(case)
            evidence.write(path, head | {"seed": seed, "cases": cases})
            print(
                f"{time.monotonic() - started:.0f} s: {case['kv_dtype']}, {rows} rows: "
                f"{case['tile_cycles']:.0f} cycles a tile at {case['clock_ghz']} GHz, RMSE "
                f"{case['rmse'] / case['rmse_rounding']:.3f} of rounding",
                flush=True,
            )
    print(f"written: {path}")
    return path
