"""Train an MLP or a CNN on Fashion-MNIST to be small, and save it: bits against accuracy, with AdamW and BackSlash.

    python examples/fashion_mnist.py [--model cnn] [--target-bits 0.5] [--full]

Writes out/fashion_mnist_MODEL.png, .md and .safetensors. The images come from the Debian package dataset-fashion-mnist.
"""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from training.compare import Plan, compare
from training.fetch import DataError
from training.image_tasks import TRAIN_ROWS, image_task


class Network(StrEnum):
    """Which one is trained."""

    mlp = "mlp"
    cnn = "cnn"


def main(
    model: Annotated[Network, typer.Option(help="784-512-512-10, or two convolutions and two linears.")] = Network.mlp,
    target_bits: Annotated[list[float] | None, typer.Option(help="Bits a weight to ask for; repeatable.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of 5, or 20 with --full.")] = None,
    full: Annotated[bool, typer.Option("--full", help="20 epochs, four targets.")] = False,
    data: Annotated[Path | None, typer.Option(help="A folder with the unpacked package, instead of fetching.")] = None,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("out"),
    seed: Annotated[int, typer.Option(help="Of the first weights and the order of the rows.")] = 0,
) -> None:
    """Train with AdamW, then with BackSlash at each target; show and save what came out."""
    console = Console()
    try:
        task = image_task(model.value, data)
    except DataError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    task = replace(task, epochs=epochs or (task.epochs if full else 5))
    plan = Plan(
        title=f"Fashion-MNIST, {model.upper()}: {TRAIN_ROWS:,} images, {task.epochs} epochs, seed {seed}",
        targets=tuple(target_bits or ((1.5, 1.0, 0.6, 0.3) if full else (0.8, 0.4))),
        step=2.0**-4,
        finest=2.5,
        lr=3e-3,
        weight_decay=0.3,
    )
    compare(task, plan, f"fashion_mnist_{model.value}", out, seed, console)


if __name__ == "__main__":
    typer.run(main)
