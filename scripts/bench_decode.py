#!/usr/bin/env python
"""Times ETAP MLA decode beside FlashInfer fa2 and fa3, FlashMLA and FlashAttention-3 on one GPU,
and with an fp8 cache beside the fp8 paths of FlashMLA and FlashInfer and beside FlashMLA's bf16.

All kernels run in this process, on the same fresh random inputs, in CUDA graphs of many calls of
which each reads another cache (together several times the L2), taking turns in an order that is
drawn for each repeat; the figure is the median over the repeats. Every cell is compared with
float64, and the bandwidth is set against what a plain copy kernel reads on this GPU. The JSON file
is rewritten after every cell.

    python scripts/bench_decode.py --grid issue2 --plot results/h200/decode.png
    python scripts/bench_decode.py --grid issue2 issue5
    python scripts/bench_decode.py --batch 1 16 --context 8192 65536 --heads 16 --q-len 1 2
    python scripts/bench_decode.py --batch 16 --context 65536 --kv-cache same fp8
    python scripts/bench_decode.py --grid fixed-split --peers etap --fixed-split 256 512 2048
"""

from __future__ import annotations

import argparse
import pathlib
import secrets
import shlex
import sys
import time
from typing import Any

from decode_bench import evidence, grid, report

PEERS = ("etap", *report.BF16_PEERS, *report.FP8_PEERS)
CUSTOM_OPTIONS = ("heads", "q_len", "page_size", "dtype", "kv_cache")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; ``cells`` of the result lists what to measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", choices=sorted(grid.PRESETS), nargs="+", help="default: quick")
    parser.add_argument("--batch", type=int, nargs="+", help="a grid of its own with --context")
    parser.add_argument("--context", type=int, nargs="+", help="cached tokens of a request")
    parser.add_argument("--heads", type=int, nargs="+")
    parser.add_argument("--q-len", type=int, nargs="+", help="query tokens; causal above 1")
    parser.add_argument("--page-size", type=int, nargs="+")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), nargs="+")
    parser.add_argument("--kv-cache", choices=tuple(grid.CACHE_TOKEN_BYTES), nargs="+")
    parser.add_argument("--peers", choices=PEERS, nargs="+", default=list(PEERS))
    parser.add_argument(
        "--fixed-split",
        type=int,
        nargs="*",
        default=[64, 256],
        metavar="TOKENS",
        help="time batch-invariant calls, too, with parts of these sizes (default 64 and 256), "
        "in the cells of the grid fixed-split",
    )
    parser.add_argument("--repeats", type=int, default=15, help="graph replays, default 15")
    parser.add_argument("--time-budget", type=float, help="stop cleanly after so many seconds")
    parser.add_argument("--seed", type=int, help="default: a fresh one, printed")
    parser.add_argument("--host-cost", action="store_true", help="time plan() and run() on the CPU")
    parser.add_argument("--out", type=pathlib.Path, help="default: results/<gpu>/decode.json")
    parser.add_argument("--plot", type=pathlib.Path, help="write a PNG of the plain cells")
    options = parser.parse_args(arguments)
    custom = {
        name: getattr(options, name)
        for name in CUSTOM_OPTIONS
        if getattr(options, name) is not None
    }
    if bool(options.batch) != bool(options.context):
        parser.error("--batch and --context go together")
    if custom and not options.batch:
        parser.error(f"--{next(iter(custom)).replace('_', '-')} needs --batch and --context")
    if options.batch and options.grid:
        parser.error("give either --grid or --batch and --context")
    if any(size < 1 or size % 64 for size in options.fixed_split):
        parser.error(f"--fixed-split takes multiples of 64 tokens, got {options.fixed_split}")
    if options.repeats < 3:
        parser.error("--repeats must be at least 3: the figure is a median")
    try:
        if options.batch:
            plural = {f"{name}s": values for name, values in custom.items() if name != "heads"}
            if "heads" in custom:
                plural["heads"] = custom["heads"]
            options.cells = grid.measuring_order(
                grid.product(options.batch, options.context, **plural)
            )
        else:
            names = options.grid or ["quick"]
            options.cells = grid.measuring_order([c for name in names for c in grid.preset(name)])
    except ValueError as error:
        parser.error(str(error))
    if not options.cells:
        parser.error(f"no cell is at most {grid.LARGEST_CELL_BYTES / 1e9:.0f} GB of cache")
    options.seed = secrets.randbits(31) if options.seed is None else options.seed
    return options


def rmse(values: list, exact: list) -> float:
    """Root of the mean squared difference over lists of tensors, in float64."""
    squares = sum(
        (v.double() - e).square().sum().item() for v, e in zip(values, exact, strict=True)
    )
    return (squares / sum(e.numel() for e in exact)) ** 0.5


def measure_cell(
    cell: grid.Cell, pool: Any, peers: list, fixed_split_peers: list, seed: int, repeats: int
) -> tuple:
    """Time and check every peer on one cell.

    Returns
    -------
    case : dict or None
        The case of the evidence file; None when ETAP itself was not measured.
    left_out : list of str
        Peers that refused the cell or failed on it, with the reason.
    """
    from decode_bench import timing

    inputs = pool.inputs(cell, seed)
    captured, left_out = capture_peers(inputs, peers)
    if "etap" not in captured:
        return None, left_out
    if cell not in grid.preset("fixed-split"):
        fixed_split_peers = []
    batch_invariant, notes = capture_peers(inputs, fixed_split_peers)
    left_out += notes
    times = timing.time_by_name(captured, repeats)
    errors, rounding = errors_of(inputs, captured | batch_invariant)
    case = {
        **cell.as_case(),
        "us": round(times["etap"], 3),
        "gbps": round(inputs.bytes_read / times["etap"] / 1e3, 1),
        "rmse": errors["etap"],
        "rmse_rounding": rounding,
        "peers": {
            name: {"us": round(times[name], 3), "rmse": errors[name]}
            for name in captured
            if name != "etap"
        },
    }
    if batch_invariant:
        # In turns of their own, so that all cells have the same peers: what a graph runs behind
        # shows in its time.
        beside = timing.time_by_name({"etap": captured["etap"], **batch_invariant}, repeats)
        case["fixed_split"] = {  # by tokens of a part
            str(peer.tokens): {
                "us": round(beside[peer.name], 3),
                "us_of_others": round(beside["etap"], 3),
                "rmse": errors[peer.name],
            }
            for peer in fixed_split_peers
            if peer.name in batch_invariant
        }
    if cell.lengths != "equal":
        case["lengths"] = cell.lengths
    return case, left_out


def capture_peers(inputs: Any, peers: list) -> tuple[dict[str, Any], list[str]]:
    """Graphs of the peers that take a cell, by name; and which do not, with the reason."""
    import torch
    from decode_bench import timing

    cell = inputs.cell
    captured: dict[str, Any] = {}
    left_out = []
    for peer in peers:
        if cell.kv_cache not in peer.kv_caches:
            continue
        reason = peer.refuses(cell)
        if reason is None:
            try:
                captured[peer.name] = timing.capture(peer.prepare(inputs), inputs.calls)
            except Exception as error:
                first_line = (str(error).strip() or "no message").splitlines()[0]
                reason = f"{type(error).__name__}: {first_line}"
        if reason is not None:
            left_out.append(f"{peer.name} at {cell.label()}: {reason}")
    torch.cuda.synchronize()
    return captured, left_out


def errors_of(inputs: Any, captured: dict[str, Any]) -> tuple[dict[str, float], float]:
    """RMSE against float64 of each peer, and that of rounding the exact result."""
    from decode_bench import inputs as cell_inputs

    cell = inputs.cell
    requests = cell_inputs.reference_requests(inputs.lengths)
    exact = [cell_inputs.exact_output(inputs, request) for request in requests]
    errors = {}
    for name, item in captured.items():
        item.output.fill_(float("nan"))  # what is compared must come from this replay
        item.graph.replay()
        by_request = item.output.reshape(cell.batch, cell.q_len, cell.heads, grid.HEAD_DIM_CKV)
        errors[name] = rmse([by_request[request] for request in requests], exact)
    rounding = rmse([e.to(cell_inputs.DTYPES[cell.dtype]) for e in exact], exact)
    return errors, rounding


def print_host_cost(pool: Any, peers: list, seed: int) -> None:
    """Median host microseconds of plan() and run() of the wrappers, outside graphs."""
    import torch
    from decode_bench import timing
    from decode_bench.peers import WrapperPeer

    inputs = pool.inputs(grid.Cell(16, 1024), seed, calls=1)
    for peer in peers:
        if isinstance(peer, WrapperPeer) and inputs.cell.kv_cache in peer.kv_caches:
            run = peer.prepare(inputs)
            run_cost = timing.host_microseconds(lambda run=run: run(0))
            plan_cost = timing.host_microseconds(lambda peer=peer: peer.plan(inputs))
            print(f"host cost, {peer.name}: plan() {plan_cost:.1f} us, run() {run_cost:.1f} us")
    torch.cuda.synchronize()


def run(options: argparse.Namespace) -> int:
    """Measure the grid; the exit status is 1 when ETAP failed on a cell, else 0."""
    import torch

    if not torch.cuda.is_available():
        print("bench_decode.py needs a GPU; torch sees none", file=sys.stderr)
        return 2
    from decode_bench import inputs as cell_inputs
    from decode_bench import peers as peer_makers
    from decode_bench import timing

    started = time.monotonic()
    csrc_hash = evidence.check_sources_match()
    path = options.out or evidence.default_directory() / "decode.json"
    left_out: list[str] = []
    peer_makers.build_modules(options.peers, options.cells, left_out.append)
    peers = peer_makers.make_peers(options.peers, left_out.append)
    fixed_splits = options.fixed_split if "etap" in options.peers else []
    fixed_split_peers = peer_makers.make_fixed_split_peers(fixed_splits)
    for line in left_out:
        print(f"left out: {line}", flush=True)
    sets = [cell_inputs.set_bytes(cell, options.seed) for cell in options.cells]
    calls = [cell_inputs.calls_of(cell, options.seed) for cell in options.cells]
    largest = max(size * count for size, count in zip(sets, calls, strict=True))
    pool = cell_inputs.Pool(max(largest, 2 * timing.CEILING_BYTES), options.seed)
    elements = pool.elements(options.cells[0].dtype)
    print(f"seed {options.seed}, ready after {time.monotonic() - started:.0f} s", flush=True)
    ceiling = round(timing.measure_read_ceiling(elements, lambda line: print(line, flush=True)), 1)
    if options.host_cost:
        print_host_cost(pool, [*peers, *fixed_split_peers], options.seed)

    cases: list[dict[str, Any]] = []
    failed = not any(peer.name == "etap" for peer in peers)
    step = evidence.progress(len(options.cells), "cells")
    for index, cell in enumerate(options.cells):
        if options.time_budget and time.monotonic() - started > options.time_budget:
            left_out.append(f"{len(options.cells) - index} cells: the time budget was spent")
            break
        try:
            case, notes = measure_cell(
                cell, pool, peers, fixed_split_peers, options.seed, options.repeats
            )
        except RuntimeError as error:  # a broken CUDA context: nothing after it can be measured
            left_out.append(f"{cell.label()} and all after it: {error}")
            failed = True
            break
        left_out += notes
        if case is None:
            failed = True
        else:
            cases.append(case)
            write_results(path, csrc_hash, ceiling, cases, left_out)
        step(f"{cell.label()}: {'failed' if case is None else str(case['us']) + ' us'}")
    print_results(cases, ceiling, left_out)
    if cases:
        write_results(path, csrc_hash, ceiling, cases, left_out)
        print(f"written: {path}")
        if options.plot:
            report.plot(cases, ceiling, torch.cuda.get_device_name(), options.plot)
    return 1 if failed else 0


def write_results(
    path: pathlib.Path,
    csrc_hash: str,
    ceiling: float,
    cases: list[dict[str, Any]],
    left_out: list[str],
) -> None:
    """Write the evidence as far as it goes."""
    command = shlex.join(["python", "scripts/bench_decode.py", *sys.argv[1:]])
    head = {**evidence.header(csrc_hash, ceiling), "command": command, "left_out": left_out}
    evidence.write(path, {**head, "cases": cases})


def print_results(cases: list[dict[str, Any]], ceiling: float, left_out: list[str]) -> None:
    """Table, what was left out, and the verdicts."""
    if cases:
        print(report.table(cases, ceiling))
    for line in left_out:
        print(f"left out: {line}")
    verdicts = report.Verdicts(cases, ceiling)
    print(f"read ceiling: {ceiling:.0f} GB/s")
    print("\n".join(["bars of the first version:", *verdicts.issue2()]))
    print("\n".join(["bars of the tuned version:", *verdicts.issue4()]))
    print("\n".join(["bars of the fp8 cache:", *verdicts.issue5()]), flush=True)


if __name__ == "__main__":
    sys.exit(run(parse_arguments()))
