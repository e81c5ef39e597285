"""Timing by CUDA-graph replay, with the peers taking turns, and the read ceiling of the GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from . import tool_modules
from .peers import RunCall

CEILING_BYTES = 16_384 * 73_728  # 1.2 GB: the cache of 16 requests of 64K tokens
# (bytes of a stage, stages): shapes of the copy ring among which the fastest is the ceiling.
CEILING_RINGS = ((73_728, 2), (73_728, 3), (36_864, 6), (24_576, 9), (18_432, 12))


@dataclasses.dataclass
class Captured:
    """``calls`` launches of one peer in a CUDA graph; ``output`` is the last call's.

    ``run`` is kept because it owns tensors that the graph reads.
    """

    graph: torch.cuda.CUDAGraph
    calls: int
    output: torch.Tensor
    run: RunCall


def capture(run: RunCall, calls: int) -> Captured:
    """Warm up, then capture ``run(0) ... run(calls - 1)`` in one graph."""
    # torch.cuda.graph() would also collect garbage and empty the allocator's cache, which costs
    # more than all the measurements of a small cell.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for call in range(min(calls, 2)):
            run(call)
        stream.synchronize()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for call in range(calls):
                output = run(call)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the first error is the one to report
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return Captured(graph, calls, output, run)


def time_in_turns(captured: Sequence[Captured], repeats: int) -> list[float]:
    """Median microseconds a call of each graph; every repeat replays all of them in turn.

    In another order each time: at the power limit, a graph takes longer behind one that draws more.
    """
    events = [
        [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in captured
        ]
        for _ in range(repeats)
    ]
    for item in captured:
        item.graph.replay()
    chosen = random.Random(repeats)
    for turn in events:
        for index in chosen.sample(range(len(captured)), len(captured)):
            start, end = turn[index]
            start.record()
            captured[index].graph.replay()
            end.record()
    torch.cuda.synchronize()
    medians = []
    for index, item in enumerate(captured):
        milliseconds = statistics.median(
            turn[index][0].elapsed_time(turn[index][1]) for turn in events
        )
        medians.append(1000 * milliseconds / item.calls)
    return medians


def time_by_name(captured: dict[str, Captured], repeats: int) -> dict[str, float]:
    """The same, by name."""
    return dict(zip(captured, time_in_turns(list(captured.values()), repeats), strict=True))


def host_microseconds(function: Callable[[], object], repeats: int = 200) -> float:
    """Median microseconds that the calling thread spends in ``function``."""
    for _ in range(10):
        function()
    torch.cuda.synchronize()
    samples = []
    for index in range(repeats):
        start = time.perf_counter()
        function()
        samples.append(time.perf_counter() - start)
        if index % 20 == 19:
            torch.cuda.synchronize()  # a full launch queue would make the host wait
    return 1e6 * statistics.median(samples)


def measure_read_ceiling(
    data: torch.Tensor,
    report: Callable[[str], None],
    ctas: int | None = None,
    modules: pathlib.Path | None = None,
) -> float:
    """The most GB/s at which this GPU brings 1.2 GB into shared memory, launch and ramp included.

    Parameters
    ----------
    data : Tensor
        At least 2.4 GB of random data; successive launches read different parts of it.
    report : callable
        Takes one line for each shape of the copy ring.
    ctas : int, optional
        One on each SM by default.
    modules : Path, optional
        Directory of tool modules built before.
    """
    flat = data.view(torch.uint8)
    parts = [part for part in flat.split(CEILING_BYTES) if part.numel() == CEILING_BYTES][:4]
    if len(parts) < 2:
        raise ValueError(f"the read ceiling needs 2.4 GB of data, got {flat.numel() / 1e9:.1f} GB")
    ctas = ctas or torch.cuda.get_device_properties(0).multi_processor_count
    last_words = torch.empty(ctas, dtype=torch.int32, device="cuda")
    module = tool_modules.load("read_ceiling", modules)
    best = 0.0
    for stage_bytes, stages in CEILING_RINGS:

        def run(call: int, stage_bytes: int = stage_bytes, stages: int = stages) -> torch.Tensor:
            module.bulk_read(parts[call % len(parts)], stage_bytes, stages, last_words)
            return last_words

        captured = capture(run, len(parts))
        last_words.fill_(0)
        microseconds = time_in_turns([captured], 15)[0]
        _check_arrived(parts[-1], stage_bytes, last_words)
        gbps = CEILING_BYTES / microseconds / 1e3
        report(f"read ceiling, {stages} stages of {stage_bytes} B: {gbps:.0f} GB/s")
        best = max(best, gbps)
    return best


def _check_arrived(data: torch.Tensor, stage_bytes: int, last_words: torch.Tensor) -> None:
    tiles = data.numel() // stage_bytes
    ctas = last_words.numel()
    first_words = data.view(tiles, stage_bytes)[:, :4].contiguous().view(torch.int32).flatten()
    last_tiles = [cta + (tiles - 1 - cta) // ctas * ctas for cta in range(ctas)]
    if not torch.equal(first_words[torch.tensor(last_tiles, device="cuda")], last_words):
        raise RuntimeError("the read kernel did not bring the last tiles into shared memory")
