"""Milliseconds by CUDA events, with weights that no cache holds, rounds interleaved over the peers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

DEVICE = "cuda"
#: Bytes of codes that a pass reads: several times the second-level cache of any GPU.
FOOTPRINT = 512 << 20
#: Of one buffer of the copy whose bandwidth is the measure.
COPIED = 1 << 30

Run = Callable[[], object]


def captured(run: Run) -> tuple[Run, bool]:
    """(what replays `run` as a CUDA graph, True), or `run` itself where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run, False
    return graph.replay, True


def milliseconds(run: Run, repeats: int) -> float:
    """Of one run, the mean of `repeats` in a row."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def interleaved(runs: dict[str, Run], rounds: int, seconds: float) -> dict[str, tuple[float, float]]:
    """(median, half the distance of the quartiles) of milliseconds, by name; each round runs all, one after another."""
    repeats = {}
    for name, run in runs.items():
        milliseconds(run, 1)
        repeats[name] = max(1, round(seconds * 1e3 / max(1e-3, milliseconds(run, 2))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(milliseconds(run, repeats[name]))
    return {name: (statistics.median(found), spread(found)) for name, found in times.items()}


def spread(values: Sequence[float]) -> float:
    """Half the distance of the quartiles; 0 for one value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


def copy_bandwidth(rounds: int) -> float:
    """Bytes a second, read and written together, of a device-to-device copy: the median of `rounds`."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=DEVICE).fill_(1)
    target = torch.empty_like(source)
    milliseconds(lambda: target.copy_(source), 3)
    return 2 * COPIED / (statistics.median(milliseconds(lambda: target.copy_(source), 5) for _ in range(rounds)) / 1e3)
