"""Which first weights train best: final held-out and test quality, and the loss on the way, for each initializer."""

from __future__ import annotations

import statistics
from pathlib import Path

from training.task import Task

from .compare import mean_and_error, standard_error
from .jobs import Result


def name_of(setting: dict) -> str:
    """An initializer in words."""
    return f"GG, ν = {setting['shape']:g}" if setting["init"] == "gg" else str(setting["init"])


def chosen(results: list[Result]) -> dict[str, list[Result]]:
    """The runs of each initializer at the learning rate that does best on held-out rows, best initializer first."""
    groups: dict[str, dict[float, list[Result]]] = {}
    for result in results:
        setting = result["job"]["setting"]
        groups.setdefault(name_of(setting), {}).setdefault(setting["lr"], []).append(result)
    best = {name: min(rates.values(), key=_held_out_nll) for name, rates in groups.items()}
    return dict(sorted(best.items(), key=lambda item: _held_out_nll(item[1])))


def table(results: list[Result]) -> str:
    """Held-out and test NLL, test score and early loss, mean ± standard error over the seeds."""
    lines = [
        "",
        "| first weights | lr | held-out NLL | test NLL | test score | training loss at 10 % of the steps |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in chosen(results).items():
        point = [run["points"][0] for run in runs]
        columns = [tuple(p[i] for p in point) for i in (3, 5, 4)]
        early = tuple(statistics.fmean(run["losses"][5:15]) for run in runs)
        cells = " | ".join(mean_and_error(values, digits=4) for values in (*columns, early))
        lines.append(f"| {name} | {runs[0]['job']['setting']['lr']:g} | {cells} |")
    return "\n".join(lines) + "\n"


def plot(task: Task, results: list[Result], path: Path) -> None:
    """Training loss over the steps, with the standard error over the seeds as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, runs in chosen(results).items():
        curves = list(zip(*(_smooth(run["losses"]) for run in runs)))
        mean = [statistics.fmean(values) for values in curves]
        error = [standard_error(values) for values in curves]
        share = [100 * (i + 1) / len(mean) for i in range(len(mean))]
        axes.plot(share, mean, linewidth=1.2, label=name)
        axes.fill_between(share, [m - e for m, e in zip(mean, error)], [m + e for m, e in zip(mean, error)], alpha=0.2)
    axes.set_xlabel("share of the steps (%)")
    axes.set_ylabel("training loss (nats), running mean")
    axes.set_yscale("log")
    axes.set_title(f"{task.name}: first weights, mean ± standard error of the seeds")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _smooth(losses: list[float], width: int = 5) -> list[float]:
    return [statistics.fmean(losses[max(0, i - width + 1) : i + 1]) for i in range(len(losses))]


def _held_out_nll(runs: list[Result]) -> float:
    return statistics.fmean(run["points"][0][3] for run in runs)
