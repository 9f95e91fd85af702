"""Bits against quality of an example's models, as a PNG that labels them and as a Markdown table."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .grid_points import Point
from .task import Quality, Task

#: Rounded models whose score is further below the float model's, relative to it, are outside the plot.
DEPTH = 0.06

ADAMW, BACKSLASH, SAVED = "#5a5a5a", "#b5371f", "#1f6b3a"


@dataclass(frozen=True)
class Model:
    """One trained model, on the grids it was measured on.

    Attributes:
        name: AdamW, or what BackSlash was asked for.
        points: the model as it is, then on each grid.
        seconds: of the training.
        on_grid: whether it was trained on its grid; its one point is then the model itself.
    """

    name: str
    points: tuple[Point, ...]
    seconds: float
    on_grid: bool = False

    @property
    def as_it_is(self) -> Quality:
        """Test quality of the model itself."""
        return self.points[0].test


@dataclass(frozen=True)
class Choice:
    """A model on one grid.

    Attributes:
        model, point: which, and where.
        good: whether its held-out score is within the task's tolerance of AdamW's.
    """

    model: Model
    point: Point
    good: bool


def best_points(task: Task, models: Iterable[Model]) -> list[Choice]:
    """Each model on the coarsest grid that holds the held-out score of the first one as it is, within the tolerance.

    Where no grid does, its point with the best held-out score. The test set is not looked at.
    """
    models = list(models)
    least = task.threshold(models[0].points[0].held_out.score)
    found = []
    for model in models:
        points = [point for point in model.points if point.step]
        good = [point for point in points if point.held_out.score >= least]
        point = min(good, key=lambda p: p.bits) if good else max(points, key=lambda p: p.held_out.score)
        found.append(Choice(model, point, bool(good)))
    return found


def smallest(choices: Iterable[Choice]) -> Choice:
    """The good one with the fewest bits; where none is good, the one with the best held-out score."""
    choices = list(choices)
    good = [choice for choice in choices if choice.good]
    return min(good, key=lambda c: c.point.bits) if good else max(choices, key=lambda c: c.point.held_out.score)


def grid_name(step: float) -> str:
    """A step in words: 2^-4.5."""
    return f"2^{math.log2(step):g}"


def in_words(task: Task, quality: Quality) -> str:
    """A score as people read it."""
    return f"{100 * quality.score:.2f} %" if task.measure == "accuracy" else f"{quality.nll:.3f} nats"


def rows(task: Task, choices: Iterable[Choice], sizes: Iterable[int], float_bytes: int) -> list[tuple[str, ...]]:
    """Headings, then each model at its best grid with the size of its file.

    Args:
        task: what was trained.
        choices: the models, AdamW first.
        sizes: bytes of each one's packed file.
        float_bytes: of the model in float32.
    """
    choices = list(choices)
    first = choices[0].model
    measure = "accuracy" if task.measure == "accuracy" else "NLL a byte"
    found = [
        ("training", "grid", "bits/weight", measure, "as good", "file", "of float32", "seconds"),
        ("AdamW", "float32", "32", in_words(task, first.as_it_is), "", kilobytes(float_bytes), "100 %", ""),
    ]
    for choice, size in zip(choices, sizes):
        point = choice.point
        found.append(
            (
                choice.model.name if choice.model.on_grid else f"{choice.model.name}, rounded",
                grid_name(point.step),
                f"{point.bits:.2f}",
                in_words(task, point.test),
                "yes" if choice.good else "no",
                kilobytes(size),
                f"{100 * size / float_bytes:.1f} %",
                f"{choice.model.seconds:.0f}",
            )
        )
    return found


def markdown(title: str, cells: list[tuple[str, ...]], notes: Iterable[str]) -> str:
    """A table with its title and notes, headings first."""
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([f"### {title}", "", lines[0], "|---" * len(cells[0]) + "|", *lines[1:], "", *notes]) + "\n"


def kilobytes(count: int) -> str:
    """Bytes as kB, or MB from ten of them."""
    return f"{count / 1e3:,.0f} kB" if count < 1e7 else f"{count / 1e6:.1f} MB"


def plot(task: Task, title: str, choices: Iterable[Choice], sizes: Iterable[int], path: Path) -> None:
    """Quality over bits: AdamW's model on grids of many steps, each BackSlash model on its own, the saved one marked.

    Args:
        task, choices, sizes: as in `rows`; each chosen point is labelled with the size of its file.
        title: of the plot.
        path: the PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    choices = list(choices)
    scale = 100.0 if task.measure == "accuracy" else 1.0
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    whole = scale * choices[0].model.as_it_is.score
    axes.axhline(whole, color=ADAMW, linewidth=1, linestyle=":")
    axes.annotate("AdamW in float32", (1, whole), (-4, 3), ("axes fraction", "data"), "offset points",
                  ha="right", color=ADAMW, fontsize=8)  # fmt: skip
    rounded = sorted((p.bits, scale * p.test.score) for p in choices[0].model.points if p.step)
    axes.plot(*zip(*rounded), "o-", color=ADAMW, markersize=4, linewidth=1.2, label="AdamW, then rounded")
    own = sorted((c.point.bits, scale * c.point.test.score) for c in choices if c.model.on_grid)
    if own:
        axes.plot(*zip(*own), "s-", color=BACKSLASH, markersize=5, linewidth=1.2, label="BackSlash, each on its grid")
    for choice, size in zip(choices, sizes):
        place, color = (choice.point.bits, scale * choice.point.test.score), ADAMW
        if choice.model.on_grid:
            color = BACKSLASH
        text = f"{choice.point.bits:.2f} bits, {kilobytes(size)}"
        axes.annotate(text, place, (7, -11), textcoords="offset points", color=color, fontsize=8)
    saved = smallest(choices).point
    axes.plot(saved.bits, scale * saved.test.score, "o", markersize=14, fillstyle="none", color=SAVED, label="saved")
    axes.set_xlim(0, max(5.0, *(1.3 * c.point.bits for c in choices)))
    axes.set_ylim(*limits(whole, [y for _, y in rounded], [y for _, y in own]))
    axes.set_xlabel("bits a weight (zero-order entropy, all matrices)")
    axes.set_ylabel("test accuracy (%)" if task.measure == "accuracy" else "−NLL on the test set (nats a byte)")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def limits(whole: float, rounded: list[float], own: list[float]) -> tuple[float, float]:
    """The scores that are shown: all of BackSlash's, and AdamW's as far down as DEPTH of the float model's."""
    shown = [whole, *own, *(score for score in rounded if score > whole - DEPTH * abs(whole))]
    margin = max(0.15 * (max(shown) - min(shown)), 0.002 * abs(whole))
    return min(shown) - margin, max(shown) + margin
