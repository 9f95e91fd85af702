"""Train a byte-level transformer on Jane Austen's novels to be small, and save it: bits against NLL.

    python examples/byte_lm.py [--target-bits 2] [--full]

Writes out/byte_lm.png, .md and .safetensors. The novels come from the Debian package r-cran-janeaustenr.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from training.compare import Plan, compare
from training.fetch import DataError
from training.text_task import TRAIN_BYTES, text_task


def main(
    target_bits: Annotated[list[float] | None, typer.Option(help="Bits a weight to ask for; repeatable.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of 200 steps, instead of 1, or 5 with --full.")] = None,
    full: Annotated[bool, typer.Option("--full", help="5 epochs, three targets.")] = False,
    data: Annotated[Path | None, typer.Option(help="A folder with the unpacked package, instead of fetching.")] = None,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("out"),
    seed: Annotated[int, typer.Option(help="Of the first weights and the order of the text.")] = 0,
) -> None:
    """Train with AdamW, then with BackSlash at each target; show and save what came out."""
    console = Console()
    try:
        task = text_task(data)
    except DataError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    task = replace(task, epochs=epochs or (task.epochs if full else 1))
    plan = Plan(
        title=f"Byte LM on Austen: {TRAIN_BYTES // 1000} kB of text, {task.steps} steps, seed {seed}",
        targets=tuple(target_bits or ((3.0, 2.5, 2.0) if full else (2.5, 1.5))),
        step=2.0**-5,
        finest=2,
        lr=task.lr,
        weight_decay=task.weight_decay,
    )
    compare(task, plan, "byte_lm", out, seed, console)


if __name__ == "__main__":
    typer.run(main)
