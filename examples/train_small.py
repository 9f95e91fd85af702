"""Train a classifier to be small, on Fashion-MNIST: beside the optimizer, in a training graph, and under torch.compile.

python examples/train_small.py

The same network and optimizer each time, and a loop that knows nothing of rates. The bits are the zero-order entropy of
its matrices on a uniform grid of step 2^-6, which is what an ideal coder with one table needs.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from training.datasets import DataUnavailable, fashion_mnist

import ggpass
from ggpass.passes import BackSlash
from ggpass.training import entropy_bits

EPOCHS, BATCH, TRAINING, STEP = 4, 100, 6000, 2.0**-6

#: λ of the coupled form, in loss per bit of one weight.
COUPLED = BackSlash(mode="coupled", strength=5e-6, step=STEP)

console = Console()


@dataclass
class Way:
    """How a model is trained: given the model and its optimizer, what is called in the place of the model."""

    name: str
    set_up: Callable[[nn.Module, torch.optim.Optimizer, Tensor], nn.Module]


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> nn.Module:
    """AdamW alone."""
    return model


def beside(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> nn.Module:
    """The proximal step after each step of the optimizer, towards a target; no graph."""
    BackSlash(target_bits=2.0, step=STEP, total_steps=EPOCHS * TRAINING // BATCH).attach(model, optimizer)
    return model


def prepared(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> nn.Module:
    """The rate's gradient joins at the nodes of a training graph, at a constant strength."""
    train = ggpass.prepare(model, x, passes=COUPLED)
    train.attach(optimizer)
    return train


def compiled(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> nn.Module:
    """The same under torch.compile. aot_eager saves this example a minute of C++; leave `inner` out for inductor."""
    return torch.compile(model, backend="ggpass", options={"train": COUPLED, "inner": "aot_eager"})  # type: ignore[return-value]


def train(way: Way, images: Tensor, labels: Tensor) -> nn.Module:
    """A plain loop of AdamW with a one-cycle schedule; returns the trained model itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=EPOCHS * TRAINING // BATCH)
    forward = way.set_up(model, optimizer, images[:BATCH])
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAINING).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(forward(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main() -> None:
    """Train each way and print what came out."""
    try:
        data = fashion_mnist()
    except DataUnavailable as error:
        console.print(f"not run, since its data is not here: {error}", markup=False)
        return
    images, test = (part.float() / 255 for part in (data.train_images[:TRAINING], data.test_images))
    table = Table(title=f"784-128-10, {TRAINING} images, {EPOCHS} epochs, one seed", title_justify="left", box=None)
    for heading in ("way", "test accuracy", "the same, on the grid", "bits a weight", "zeros", "seconds"):
        table.add_column(heading)
    for way in (Way("AdamW", plain), Way("attach", beside), Way("prepare", prepared), Way("torch.compile", compiled)):
        start = time.perf_counter()
        model = train(way, images, data.train_labels[:TRAINING])
        seconds = time.perf_counter() - start
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        scores = [accuracy(model, test, data.test_labels)]
        bits = entropy_bits(matrices, STEP)
        with torch.no_grad():
            for matrix in matrices:
                matrix.copy_((matrix / STEP).round() * STEP)
        scores.append(accuracy(model, test, data.test_labels))
        zeros = sum(int((m == 0).sum()) for m in matrices) / sum(m.numel() for m in matrices)
        table.add_row(way.name, *(f"{s:.3f}" for s in scores), f"{bits:.2f}", f"{zeros:.0%}", f"{seconds:.1f}")
    console.print(table)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images whose class comes first."""
    return float((model(images).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main()
