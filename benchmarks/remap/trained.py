"""Trained examples: bits and score before a remap, after it, and after fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from training.grid_points import STEPS
from training.loop import train
from training.task import Recipe, Task

import ggpass
from ggpass.passes import DeepShapePull
from ggpass.training import entropy_bits

from .ways import CONTROL, OWN_ALL, PUBLISHED, PUBLISHED_ALL, Way, mean_shape, weights_of

Row = dict[str, Any]


@dataclass(frozen=True)
class Pull:
    """No remap: quantiles are drawn to the compensated target while the model is fine-tuned.

    Attributes:
        strength: in loss per squared unit of weight.
    """

    strength: float

    @property
    def name(self) -> str:
        """For the table."""
        return f"pull in training, s = {self.strength:g}"


PULLS = (Pull(1e3), Pull(1e4), Pull(1e5))

WAYS: dict[str, tuple[Way, ...]] = {
    "mlp": (CONTROL, PUBLISHED, PUBLISHED_ALL, OWN_ALL),
    "cnn": (CONTROL, PUBLISHED, PUBLISHED_ALL, OWN_ALL),
    "byte-lm": (CONTROL, PUBLISHED, PUBLISHED_ALL, OWN_ALL),
    "minilm-classifier": (CONTROL, PUBLISHED, OWN_ALL),
}


def task_of(name: str) -> Task:
    """A task with AdamW's settings; the classifier is scored on fewer rows than in its example."""
    if name == "byte-lm":
        from training.text_task import text_task

        return text_task()
    if name == "minilm-classifier":
        from minilm import model_folder
        from training.gloss_task import gloss_task

        return gloss_task(model_folder(), held_out=600, test=1000)
    from training.image_tasks import image_task

    return image_task(name)


def ways_of(name: str) -> tuple[Way | Pull, ...]:
    """What is compared on a task."""
    return (*WAYS[name], *PULLS) if name == "mlp" else WAYS[name]


def measure(name: str, way: Way | Pull, folder: Path, seed: int = 0) -> Row:
    """Remap one task's AdamW model, which is trained once and kept in `folder`, and fine-tune it."""
    task = task_of(name)
    model = trained(task, folder / f"{name}-{seed}.safetensors", seed)
    before = kept_before(task, model, folder / f"{name}-{seed}-before.json")
    row: Row = {"way": way.name, "before": before}
    through = model
    if isinstance(way, Way):
        row["shape"] = way.apply(model)
        row["after"] = on_own_grid(task, model, before["held_out"]) if way.options is not None else before
    else:
        row["shape"] = mean_shape(model), 0.8 * mean_shape(model)
        inputs = next(iter(task.epoch(torch.Generator().manual_seed(0))))[0]
        through = ggpass.prepare(model, inputs, passes=[DeepShapePull(strength=way.strength)])
    fine_tune(task, through, model, seed)
    return {**row, "tuned_shape": mean_shape(model), "tuned": on_own_grid(task, model, before["held_out"])}


def kept_before(task: Task, model: nn.Module, path: Path) -> Row:
    """The trained model on its own grid: measured once for all ways, and kept beside it."""
    if not path.exists():
        path.write_text(json.dumps(on_own_grid(task, model, task.quality(model, "held_out").score)), encoding="utf-8")
    row: Row = json.loads(path.read_text(encoding="utf-8"))
    return row


def trained(task: Task, path: Path, seed: int) -> nn.Module:
    """The task's model trained with AdamW, or as a former run left it."""
    from safetensors.torch import load_model, save_model

    if path.exists():
        model = task.build(seed)
        load_model(model, path)
        return model.eval()
    model = train(task, Recipe(), seed)[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, str(path))
    return model


def fine_tune(task: Task, through: nn.Module, model: nn.Module, seed: int) -> nn.Module:
    """A fifth of the epochs at a tenth of the learning rate.

    Args:
        through: what is called: the model, or its training graph.
    """
    train(replace(task, epochs=max(1, task.epochs // 5)), Recipe(lr=task.lr / 10), seed + 1, model=through)
    return model.eval()


def on_own_grid(task: Task, model: nn.Module, reference: float) -> Row:
    """The model as it is, and on the coarsest grid that costs no more than the task's tolerance.

    Args:
        reference: held-out score of the model before the remap, for the second grid: the coarsest that is as good as
            that model.

    Returns:
        test: score as it is; step, bits, grid_test: on its own grid; equal_bits: on the second, None where none is.
    """
    weights = weights_of(model)
    kept = [weight.detach().clone() for weight in weights]
    own = task.quality(model, "held_out").score
    row: Row = {"held_out": own, "test": task.quality(model, "test").score, "equal_bits": None}
    steps = [step for step in sorted(STEPS, reverse=True) if 0.2 < entropy_bits(kept, step) < 8]

    @cache
    def score(step: float) -> float:
        _put(weights, [(weight / step).round_().mul_(step) for weight in kept])
        return task.quality(model, "held_out").score

    step = coarsest(steps, lambda step: score(step) >= task.threshold(own))
    if step is not None:
        row |= {"step": step, "bits": entropy_bits(kept, step)}
        _put(weights, [(weight / step).round_().mul_(step) for weight in kept])
        row["grid_test"] = task.quality(model, "test").score
    equal = coarsest(steps, lambda step: score(step) >= task.threshold(reference))
    if equal is not None:
        row["equal_bits"] = entropy_bits(kept, equal)
    _put(weights, kept)
    return row


def coarsest(steps: list[float], acceptable: Callable[[float], bool]) -> float | None:
    """The largest acceptable step, by bisection: taken to hold below some step and to fail above it.

    Args:
        steps: descending.
        acceptable: whether a step loses no more than it may.
    """
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if acceptable(steps[middle]) else (middle + 1, high)
    return steps[low] if low < len(steps) else None


@torch.no_grad()
def _put(weights: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    for weight, value in zip(weights, values):
        weight.copy_(value)
