"""min bits subject to mean score ≥ threshold: what each method needs at the quality of tuned AdamW."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from training.task import Task

from .jobs import Result


@dataclass(frozen=True)
class Setting:
    """One method's setting on one grid, over the seeds.

    Attributes:
        method, setting: as in the jobs.
        step: Δ; 0 for the weights as they are.
        spread: γ of the grids of the matrices; 0: one for all.
        bits, held_out, test: one value a seed.
    """

    method: str
    setting: dict[str, Any]
    step: float
    bits: tuple[float, ...]
    held_out: tuple[float, ...]
    test: tuple[float, ...]
    spread: float = 0.0


def of_common_seeds(results: list[Result]) -> list[Result]:
    """The results of those seeds that every setting was run with; a run that was cut short has fewer."""
    seeds: dict[str, set[int]] = {}
    for result in results:
        job = result["job"]
        seeds.setdefault(f"{job['method']} {sorted(job['setting'].items())}", set()).add(job["seed"])
    common = set.intersection(*seeds.values()) if seeds else set()
    return [result for result in results if result["job"]["seed"] in common]


def settings_of(results: Iterable[Result]) -> list[Setting]:
    """Every (method, setting, Δ, γ) for which all seeds have a point."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        job = result["job"]
        groups.setdefault(f"{job['method']} {sorted(job['setting'].items())}", []).append(result)
    found = []
    for group in groups.values():
        by_grid: dict[tuple[float, float], list[list[float]]] = {}
        for result in group:
            for point in result["points"]:
                by_grid.setdefault((point[0], point[6] if len(point) > 6 else 0.0), []).append(point)
        job = group[0]["job"]
        for (step, spread), points in by_grid.items():
            if len(points) == len(group):
                columns = list(zip(*points))
                found.append(Setting(job["method"], job["setting"], step, columns[1], columns[2], columns[4], spread))
    return found


def tuned_adamw(settings: Iterable[Setting]) -> Setting:
    """AdamW's setting with the best mean held-out score, weights as they are."""
    return max((s for s in settings if s.method == "adamw" and s.step == 0), key=lambda s: statistics.fmean(s.held_out))


def fewest_bits(settings: Iterable[Setting], method: str, threshold: float, split: str) -> Setting | None:
    """The method's setting with the fewest mean bits whose mean score on a split is at least a threshold."""
    able = [s for s in settings if s.method == method and s.step and statistics.fmean(getattr(s, split)) >= threshold]
    return min(able, key=lambda s: statistics.fmean(s.bits), default=None)


def frontier(settings: Iterable[Setting], method: str, split: str = "test") -> list[tuple[float, float, float]]:
    """(mean bits, mean score, standard error of the score) that no other setting of the method beats in both."""
    points = [
        (statistics.fmean(s.bits), statistics.fmean(getattr(s, split)), standard_error(getattr(s, split)))
        for s in settings
        if s.method == method and s.step
    ]
    points.sort(key=lambda point: (point[0], -point[1]))
    best, kept = -math.inf, []
    for point in points:
        if point[1] > best:
            best = point[1]
            kept.append(point)
    return kept


def standard_error(values: tuple[float, ...]) -> float:
    """s/√n; 0 for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def mean_and_error(values: tuple[float, ...], scale: float = 1.0, digits: int = 2) -> str:
    """`1.23 ± 0.04`, or the value alone where there is one seed."""
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {scale * standard_error(values):.{digits}f}"


def thresholds(task: Task, settings: Iterable[Setting]) -> dict[str, float]:
    """The least mean scores that count as equal to tuned AdamW's, on both splits."""
    best = tuned_adamw(settings)
    return {split: task.threshold(statistics.fmean(getattr(best, split))) for split in ("held_out", "test")}
