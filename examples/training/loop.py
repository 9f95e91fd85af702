"""The training loop of the examples: AdamW, one-cycle learning rate, BackSlash beside it, a live progress bar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from ggpass.passes import BackSlash
from ggpass.training import Regularizer

from .task import Recipe, Task, matrices

#: Gradients are clipped to this norm, for every method alike.
LARGEST_GRADIENT = 1.0


def optimizer_for(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves biases and norms alone."""
    chosen = matrices(model)
    mine = {id(parameter) for parameter in chosen}
    others = [parameter for parameter in model.parameters() if id(parameter) not in mine]
    groups = [{"params": chosen, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def train(
    task: Task,
    recipe: Recipe,
    seed: int = 0,
    *,
    model: nn.Module | None = None,
    watch: Callable[[int, float, str], None] = lambda step, loss, status: None,
) -> tuple[nn.Module, Regularizer | None]:
    """Train a task's model from scratch, or one that is given.

    Args:
        task: what to train.
        recipe: how.
        seed: of the weights and of the order of the rows.
        model: trained in place of a fresh one.
        watch: called after each step with its number from 1, the loss, and the status of the rate.

    Returns:
        The model in eval mode, and the Regularizer if there was one.
    """
    torch.manual_seed(seed)
    model = (task.build(seed) if model is None else model).train()
    lr = task.lr if recipe.lr is None else recipe.lr
    decay = task.weight_decay if recipe.weight_decay is None else recipe.weight_decay
    optimizer = optimizer_for(model, lr, decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=task.steps, pct_start=0.3)
    regularizer = None
    if recipe.rate is not None:
        settings = {f: getattr(recipe.rate, f) for f in recipe.rate.__dataclass_fields__}
        regularizer = replace(BackSlash(**settings), total_steps=task.steps).attach(model, optimizer)
    order = torch.Generator().manual_seed(seed)
    step = 0
    for _ in range(task.epochs):
        for batch in task.epoch(order):
            loss = task.loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
            optimizer.step()
            schedule.step()
            step += 1
            watch(step, loss.detach(), regularizer.status() if regularizer else "")
    if regularizer is not None:
        regularizer.detach()
    return model.eval(), regularizer


def train_with_bar(task: Task, recipe: Recipe, label: str, seed: int = 0) -> tuple[nn.Module, Regularizer | None]:
    """`train`, with the loss and the bits per weight live in a progress bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(10),  # with what follows it fits into 80 columns
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task(label, total=task.steps, status="")

        def watch(step: int, loss: float, status: str) -> None:
            if step % 10 == 0 or step == task.steps:
                progress.update(bar, completed=step, status=f"loss {float(loss):.3f}  {status}")

        return train(task, recipe, seed, watch=watch)
