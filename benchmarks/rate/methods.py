"""What each method trains with: a Recipe and, where it begins elsewhere, a model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from training.task import Recipe, Task

from ggpass.training import RateSettings, Schedule

from .jobs import Job

#: The Laplacian whose rate has slope 1 everywhere: proximal L1, θ ← soft(θ, lr·λ).
LAPLACE_SCALE = 1 / math.log(2)


def prepare(task: Task, job: Job) -> tuple[Recipe, nn.Module | None]:
    """The recipe of a job, and its model if it is not the task's own."""
    setting = job.setting
    given = {k: setting[k] for k in ("strength", "target_bits", "step", "spread") if k in setting}
    if "grid" in setting:
        given |= {"schedule": Schedule(on_grid=setting["grid"]), "total_steps": task.steps}
    rate = None
    if job.method.startswith("l1"):
        rate = RateSettings(shape=1.0, scale=LAPLACE_SCALE, **given)
    elif job.method == "paper-code":
        rate = RateSettings(mode="paper-code", **given)
    elif job.method.startswith(("backslash", "controller")):
        rate = RateSettings(**given)
    recipe = Recipe(setting.get("weight_decay"), setting.get("lr"), rate)
    return recipe, _initialized(task, job) if "init" in setting else None


def _initialized(task: Task, job: Job) -> nn.Module:
    """The task's model with the matrices of an initializer; biases, norms and tables stay the model's own."""
    import ggpass

    model = task.build(job.seed)
    name = job.setting["init"]
    if name == "gg":
        batch = next(iter(task.epoch(torch.Generator().manual_seed(0))))
        inputs: Any = batch[:, :-1] if isinstance(batch, torch.Tensor) else batch[0]
        ggpass.init_(model, (inputs,), shape=job.setting["shape"], seed=job.seed)
    elif name != "default":
        torch.manual_seed(job.seed)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and not _tied(model, module):
                _draw(module.weight, name)
    return model


def _draw(weight: nn.Parameter, name: str) -> None:
    if name == "xavier":
        nn.init.xavier_uniform_(weight)
    elif name == "kaiming":
        nn.init.kaiming_normal_(weight, nonlinearity="relu")
    elif name == "normal 0.02":
        nn.init.normal_(weight, std=0.02)
    else:
        raise ValueError(f"initializer {name!r} is unknown")


def _tied(model: nn.Module, module: nn.Module) -> bool:
    return any(isinstance(m, nn.Embedding) and m.weight is module.weight for m in model.modules())
