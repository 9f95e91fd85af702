"""What the examples do: train a task with AdamW and with BackSlash, measure, save the smallest good model, show all."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import nn

from ggpass.training import RateSettings, Schedule

from . import curve
from .curve import Model
from .grid_points import grid_points, uniform_grids
from .loop import train_with_bar
from .packed import on_grid, save_packed
from .task import Recipe, Task


@dataclass(frozen=True)
class Plan:
    """How an example's models are trained.

    Attributes:
        title: of the table and the plot.
        targets: bits a weight that BackSlash is asked for, one model each.
        step: Δ of its grid.
        finest: AdamW's model is rounded to 4Δ, 2√2Δ, 2Δ and so on down to Δ·2^−finest.
        lr, weight_decay: of AdamW, in all trainings alike.
        refit_every: optimizer steps between fits; None: what the length of the training asks for.
    """

    title: str
    targets: tuple[float, ...]
    step: float
    finest: float
    lr: float
    weight_decay: float
    refit_every: int | None = None

    @property
    def steps(self) -> tuple[float, ...]:
        """Δ of AdamW's points, two to an octave, the coarsest first."""
        return tuple(self.step * 2 ** (2 - i / 2) for i in range(round(2 * (2 + self.finest)) + 1))

    def recipe(self, task: Task, target: float | None) -> Recipe:
        """AdamW, or AdamW with BackSlash led to a target; in the last half of the training on the grid."""
        rate = None
        if target is not None:
            schedule = Schedule(on_grid=0.5)
            rate = RateSettings(
                target_bits=target,
                step=self.step,
                schedule=schedule,
                total_steps=task.steps,
                refit_every=self.refit_every,
            )
        return Recipe(self.weight_decay, self.lr, rate)


def compare(task: Task, plan: Plan, name: str, out: Path, seed: int, console: Console) -> None:
    """Train every model of a plan; write `NAME.png`, `NAME.md` and `NAME.safetensors` to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    models, modules = [], []
    for target in (None, *plan.targets):
        model, module = _train(task, plan, target, seed, console)
        models.append(model)
        modules.append(module)
    choices = curve.best_points(task, models)
    saved = choices.index(curve.smallest(choices))
    file = out / f"{name}.safetensors"
    float_bytes, sizes = _save(choices, modules, saved, file)
    cells = curve.rows(task, choices, sizes, float_bytes)
    notes = [
        f"Scores are those of the test set. As good: within {tolerance(task)} of AdamW's in float32 on held-out rows.",
        f"{file.name} is {cells[saved + 2][0]}; read back, it gives the same weights bit for bit.",
    ]
    (out / f"{name}.md").write_text(curve.markdown(plan.title, cells, notes), encoding="utf-8")
    console.print(_shown(plan.title, cells), "", *notes, sep="\n", highlight=False)
    try:
        curve.plot(task, plan.title, choices, sizes, out / f"{name}.png")
    except ImportError:
        console.print("no plot, since matplotlib is not installed: pip install matplotlib")
    console.print("written:", *sorted(str(path) for path in out.glob(f"{name}.*")), highlight=False, soft_wrap=True)


def _train(task: Task, plan: Plan, target: float | None, seed: int, console: Console) -> tuple[Model, nn.Module]:
    """One model with a progress bar, and its points."""
    start = time.perf_counter()
    module, _ = train_with_bar(task, plan.recipe(task, target), "AdamW" if target is None else f"{target:g} bits", seed)
    seconds = time.perf_counter() - start
    with console.status("measuring it on grids"):
        grids = uniform_grids(module, plan.steps if target is None else (plan.step,))
        points = grid_points(task, module, grids)
    name = "AdamW" if target is None else f"BackSlash, {target:g} asked"
    return Model(name, tuple(points), seconds, on_grid=target is not None), module


def tolerance(task: Task) -> str:
    """The task's tolerance in words."""
    return f"{100 * task.tolerance:g} points" if task.measure == "accuracy" else f"{100 * task.tolerance:g} %"


def _shown(title: str, cells: list[tuple[str, ...]]) -> Table:
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, heading in enumerate(cells[0]):
        shown.add_column(heading, justify="right" if index else "left")
    for row in cells[1:]:
        shown.add_row(*row)
    return shown


def _save(
    choices: Iterable[curve.Choice], modules: Iterable[nn.Module], saved: int, path: Path
) -> tuple[int, list[int]]:
    """Bytes of the float32 model and of each packed one; the chosen one stays at `path`."""
    float_bytes, sizes = 0, []
    for index, (choice, module) in enumerate(zip(choices, modules)):
        place = path if index == saved else path.with_suffix(".other.safetensors")
        float_bytes, size = save_packed(on_grid(module, choice.point.step), choice.point.step, place)
        sizes.append(size)
        if index != saved:
            place.unlink()
    return float_bytes, sizes
