"""Fashion-MNIST, 10,000 training images: an MLP and a CNN."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .images import fashion_mnist
from .task import Quality, Split, Task, rows

#: Mean and deviation of the training pixels, from 0 to 1.
MEAN, DEVIATION = 0.286, 0.353

#: Rows of the training file that are trained on; its last ten thousand are held out.
TRAIN_ROWS = 10_000
BATCH = 128


def mlp(seed: int) -> nn.Module:
    """784-512-512-10, 669,706 parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def cnn(seed: int) -> nn.Module:
    """Two strided convolutions of 16 and 32 channels and two linear layers, 206,986 parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (1, 28)),
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 49, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def image_task(name: str, data: Path | str | None = None) -> Task:
    """`mlp` or `cnn` on Fashion-MNIST.

    Raises:
        DataError: the images cannot be had.
    """
    images = fashion_mnist(data)
    pixels = [(p.float() / 255 - MEAN) / DEVIATION for p in (images.train_images, images.test_images)]
    splits: dict[Split, tuple[Tensor, Tensor]] = {
        "held_out": (pixels[0][-10_000:], images.train_labels[-10_000:]),
        "test": (pixels[1], images.test_labels),
    }
    inputs, labels = pixels[0][:TRAIN_ROWS].clone(), images.train_labels[:TRAIN_ROWS]

    @torch.no_grad()
    def quality(model: nn.Module, split: Split) -> Quality:
        x, y = splits[split]
        logits = torch.cat([model(part) for part in x.split(1000)])
        return Quality((logits.argmax(1) == y).double().mean().item(), F.cross_entropy(logits, y).item())

    return Task(
        name=name,
        build={"mlp": mlp, "cnn": cnn}[name],
        epoch=lambda generator: ((inputs[i], labels[i]) for i in rows(TRAIN_ROWS, BATCH, generator)),
        loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        quality=quality,
        epochs=20,
        batches=TRAIN_ROWS // BATCH,
        lr=1e-3,
        weight_decay=0.01,
    )
