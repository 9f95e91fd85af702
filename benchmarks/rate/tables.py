"""The tables and plots of one task."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from training.task import Task

from . import initializers
from .compare import (
    Setting,
    fewest_bits,
    frontier,
    mean_and_error,
    of_common_seeds,
    settings_of,
    thresholds,
    tuned_adamw,
)
from .jobs import Result
from .plans import METHODS, Plan


def write(task: Task, plan: Plan, runs: dict[str, list[Result]], folder: Path) -> None:
    """Write `TASK.md`, `TASK.png` and, where initializers were compared, `TASK-init.png`; show the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings_of(of_common_seeds(runs["curves"]))
    text = _table(task, plan, settings) + _controlled(runs["control"])
    if runs["init"]:
        text += initializers.table(runs["init"])
        initializers.plot(task, runs["init"], folder / f"{task.name}-init.png")
    (folder / f"{task.name}.md").write_text(text, encoding="utf-8")
    _plot(task, plan, settings, runs["control"], folder / f"{task.name}.png")
    Console().print(text, markup=False, soft_wrap=True)


def _table(task: Task, plan: Plan, settings: list[Setting]) -> str:
    adamw, least = tuned_adamw(settings), thresholds(task, settings)
    scale, digits = (100.0, 2) if task.measure == "accuracy" else (1.0, 4)
    lines = [
        f"### {task.name}: {_seeds(adamw)}, {task.epochs} epochs",
        "",
        f"Tuned AdamW ({_words(adamw)}): {task.measure} {mean_and_error(adamw.test, scale, digits)} on the test set, "
        f"{mean_and_error(adamw.held_out, scale, digits)} on held-out rows. Equal means at least "
        f"{scale * least['test']:.{digits}f} and {scale * least['held_out']:.{digits}f}. {_counted(plan)}",
        "",
        f"| method | bits a weight | against AdamW | against L1 | test {task.measure} | setting | "
        "chosen on held-out rows: bits, test |",
        "|---|---|---|---|---|---|---|",
    ]
    bits: dict[str, float] = {}
    for method in plan.settings:
        if not any(setting.method == method for setting in settings):
            continue  # not run yet
        best = fewest_bits(settings, method, least["test"], "test")
        blind = fewest_bits(settings, method, least["held_out"], "held_out")
        second = "none"
        if blind is not None:
            second = f"{mean_and_error(blind.bits)}, {mean_and_error(blind.test, scale, digits)}"
        if best is None:
            lines.append(f"| {METHODS[method]} | none reaches it | | | | | {second} |")
            continue
        bits[method] = statistics.fmean(best.bits)
        less = [_less(bits[method], bits.get(rival)) if rival != method else "" for rival in ("adamw", "l1")]
        lines.append(
            f"| {METHODS[method]} | {mean_and_error(best.bits)} | {less[0]} | {less[1]} | "
            f"{mean_and_error(best.test, scale, digits)} | {_words(best)} | {second} |"
        )
    return "\n".join(lines) + "\n"


def _counted(plan: Plan) -> str:
    """How bits are counted, and on which grids."""
    counted = "All matrices share a table" if plan.tables == "one" else "Each matrix has a table of its own"
    grids = ["one grid for all"] if 0.0 in plan.spreads else []
    if any(plan.spreads):
        grids.append("one for each by its gradients (spread)")
    return f"{counted}; {', or '.join(grids)}."


def _seeds(setting: Setting) -> str:
    return f"{len(setting.test)} seed{'s' if len(setting.test) > 1 else ''}"


def _less(bits: float, rival: float | None) -> str:
    return "" if rival is None else f"{100 * (bits / rival - 1):+.0f} %"


def _words(setting: Setting) -> str:
    parts: dict[str, Any] = {k: v for k, v in setting.setting.items() if k not in ("step", "spread")}
    text = ", ".join(f"{name} {value:g}" for name, value in parts.items())
    spread = f", spread {setting.spread:g}" if setting.spread else ""
    return text + (f", Δ 2^{math.log2(setting.step):g}" if setting.step else "") + spread


def _controlled(control: list[Result]) -> str:
    if not control:
        return ""
    lines = ["", "| asked bits | reached | off by | test score at that grid |", "|---|---|---|---|"]
    for result in control:
        asked, reached = result["job"]["setting"]["target_bits"], result["rate"]["bits"]
        step = result["job"]["setting"]["step"]
        score = next((f"{point[4]:.4f}" for point in result["points"] if point[0] == step), "")
        lines.append(f"| {asked:g} | {reached:.3f} | {100 * (reached / asked - 1):+.1f} % | {score} |")
    return "\n".join(lines) + "\n"


def _plot(task: Task, plan: Plan, settings: list[Setting], control: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scale = 100 if task.measure == "accuracy" else 1
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for method, marker in zip(plan.settings, "osDv^P"):
        points = frontier(settings, method)
        if points:
            bits, score, error = zip(*points)
            axes.errorbar(
                bits,
                [scale * s for s in score],
                [scale * e for e in error],
                marker=marker,
                markersize=4,
                capsize=2,
                linewidth=1.2,
                label=METHODS[method],
            )
    least = thresholds(task, settings)["test"]
    below = 0.02 if task.measure == "accuracy" else 0.1
    scores = [(run["rate"]["bits"], p[4]) for run in control for p in run["points"] if p[0]]
    led = [(bits, scale * score) for bits, score in scores if score > least - below]
    if led:
        axes.plot(*zip(*led), "k*", markersize=8, label="BackSlash led to a target (one seed)")
    axes.axhline(scale * least, color="0.4", linestyle="--", linewidth=1, label="equal to tuned AdamW")
    best = max(statistics.fmean(s.test) for s in settings)
    axes.set_ylim(scale * (least - below), scale * (best + below / 3))
    shown = [bits for method in plan.settings for bits, score, _ in frontier(settings, method) if score > least - below]
    axes.set_xlim(0, max(shown, default=8) + 0.2)
    axes.set_xlabel("bits a weight (zero-order entropy, all matrices)")
    axes.set_ylabel(f"test {task.measure}" + (" (%)" if scale == 100 else " (nats a byte)"))
    axes.set_title(f"{task.name}: mean ± standard error of {_seeds(tuned_adamw(settings))}")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
