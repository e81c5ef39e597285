#!/usr/bin/env python
"""Runs ETAP on an H200 made to cost what an H20 costs, beside the same work padded to 64 rows.

An EMULATION: nothing is run on an H20. That has 78 SMs, 4.0 TB/s and a quarter of the H200's tensor
rate. So the kernels get 78 CTAs, which read about as much on an H200, and each WGMMA is followed by
products with A = 0 until it takes as long as there (csrc/etap_mla_wgmma.cuh). Both are measured
first. The products add zeros: every case is compared with float64. The clock is the H200's, at most
1.98 GHz, as is the H20's. Not emulated: the H20's L2, power limit and memory latency.

"ETAP" has the row tile of its rows, 8 or 16; "padded" is the project's variant for 64 rows with the
same queries. At up to 1,024 tokens ETAP keeps P in two halves, so that N is 32 for 16 rows; such a
WGMMA is made to take 72 cycles instead of 64.

    python scripts/emulate_h20.py --build-only DIR    needs nvcc, no GPU
    python scripts/emulate_h20.py --modules DIR       needs a GPU, no nvcc

The second writes results/<gpu>/h20_emulation.json.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import secrets
import shlex
import sys
import time
from typing import Any

from decode_bench import evidence, grid

K = 1024
BATCHES = (16, 32)
CONTEXTS = (512, 1 * K, 2 * K, 4 * K, 8 * K, 16 * K, 32 * K, 64 * K)
HEADS = (16, 8)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; ``cells`` of the result lists what to measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--build-only",
        type=pathlib.Path,
        metavar="DIR",
        help="compile the modules, measure nothing",
    )
    where.add_argument(
        "--modules", type=pathlib.Path, metavar="DIR", help="what --build-only wrote"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--context", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--heads", type=int, nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--repeats", type=int, default=9, help="graph replays, default 9")
    parser.add_argument("--seed", type=int, help="default: a fresh one, printed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parallel compilations")
    parser.add_argument("--out", type=pathlib.Path, help="directory, default results/<gpu>")
    options = parser.parse_args(arguments)
    options.seed = secrets.randbits(31) if options.seed is None else options.seed
    try:
        # The largest last: a run that is cut short has lost these only.
        cells = grid.product(options.batch, options.context, options.heads)
    except ValueError as error:
        parser.error(str(error))
    options.cells = sorted(cells, key=lambda cell: (cell.nominal_bytes(), -cell.heads))
    return options


def measure_all(options: argparse.Namespace, csrc_hash: str) -> list[str]:
    """Calibrate, measure every cell, write the evidence; returns what is wrong, one line each."""
    import torch
    from decode_bench import emulation, timing
    from decode_bench import emulation_report as reported
    from decode_bench import inputs as cell_inputs

    from etap_flashinfer import jit

    if options.modules:
        os.environ[jit.AOT_DIR_ENV] = str(options.modules)
    started = time.monotonic()
    print(reported.EMULATION)
    calibration = emulation.calibrate(options.modules)
    for row in calibration:
        print(f"WGMMA, cycles: {row}")
    errors = reported.calibration_errors(calibration)
    sizes = [cell.nominal_bytes() for cell in options.cells]
    pool = cell_inputs.Pool(max(emulation.POOL_BYTES, *sizes), options.seed)
    data, report_line = pool.elements("bf16"), lambda line: print(line, flush=True)
    ceiling = timing.measure_read_ceiling(data, report_line, emulation.CTAS, options.modules)
    head = evidence.header(csrc_hash, round(ceiling, 1))
    head["emulation"] = reported.EMULATION
    head["command"] = shlex.join(["python", "scripts/emulate_h20.py", *sys.argv[1:]])
    head["seed"], head["wgmma_cycles"] = options.seed, calibration
    print(f"seed {options.seed}, ready after {time.monotonic() - started:.0f} s", flush=True)

    path = (options.out or evidence.default_directory()) / "h20_emulation.json"
    cases: list[dict[str, Any]] = []
    modules = {
        row_tile: jit.get_etap_mla_module(emulation.variant(row_tile))
        for row_tile in (*options.heads, emulation.PADDED_ROW_TILE)
    }
    for cell in options.cells:
        cases.append(
            emulation.measure(cell, pool, modules.__getitem__, options.seed, options.repeats)
        )
        evidence.write(path, {**head, "cases": cases})
        errors += reported.case_errors(cases[-1])
        print(f"{time.monotonic() - started:.0f} s: {reported.table_row(cases[-1])}", flush=True)
    torch.cuda.synchronize()
    print_report(cases)
    print(f"written: {path}")
    return errors


def print_report(cases: list[dict[str, Any]]) -> None:
    """The table and what it says of the paper's."""
    import roofline
    from decode_bench import emulation_report as reported

    print(reported.EMULATION)
    print(roofline.format_table([reported.HEAD, *map(reported.table_row, cases)]))
    print("\n".join(reported.verdicts(cases)), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 when a result is wrong or the emulation does not hold, 2 without a GPU."""
    options = parse_arguments(arguments)
    if options.build_only:
        from decode_bench import emulation

        row_tiles = sorted({*HEADS, emulation.PADDED_ROW_TILE})
        emulation.build(options.build_only, row_tiles, options.jobs)
        print(f"modules in {options.build_only}; run with --modules {options.build_only}")
        return 0
    import torch

    if not torch.cuda.is_available():
        print("emulate_h20.py needs a GPU; torch sees none", file=sys.stderr)
        return 2
    errors = measure_all(options, evidence.check_sources_match())
    for error in errors:
        print(f"ERROR: {error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
