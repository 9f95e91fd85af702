"""The data of the training examples; run as a module, it fetches all of it and says what is there.

cd examples && python -m training.datasets [--data DIR]
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .fetch import DataError, DataUnavailable, console
from .glosses import CLASSES, Gloss, GlossParts, glosses, sample_glosses
from .images import Images, fashion_mnist
from .novels import NOVELS, TextParts, austen, split_text

__all__ = [
    "CLASSES",
    "NOVELS",
    "DataError",
    "DataUnavailable",
    "Gloss",
    "GlossParts",
    "Images",
    "TextParts",
    "austen",
    "fashion_mnist",
    "glosses",
    "sample_glosses",
    "split_text",
]


def summary(data: Path | None) -> Iterator[tuple[str, str]]:
    """A name and a line of figures for each data set.

    Raises:
        DataError: one cannot be had.
    """
    images = fashion_mnist(data)
    rows, height, width = images.train_images.shape
    yield "Fashion-MNIST", f"{rows:,} + {len(images.test_images):,} images of {height}×{width}, 10 classes"
    text = austen(data)
    yield "Austen's novels", f"{len(text):,} bytes in {text.count(10):,} lines, {len(NOVELS)} novels"
    pairs = glosses(data)
    yield "WordNet's glosses", f"{len(pairs):,} definitions, {len({label for _, label in pairs})} classes"


def main(
    data: Annotated[
        Path | None, typer.Option(help="A folder with the unpacked packages, instead of fetching them.")
    ] = None,
) -> None:
    """Fetch the data of all training examples, check it, and say what is there."""
    table = Table("data", "content")
    try:
        for row in summary(data):
            table.add_row(*row)
    except DataError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
