"""Where commands print: results to stdout, progress and errors to stderr, so that results can be piped."""

import os
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

#: Every command that writes a file refuses an existing one without it.
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]

#: Columns of a table that is not written to a terminal, where none are asked for by COLUMNS.
FILE_WIDTH = 160


def stdout() -> Console:
    """The console for results; wide where a file or a pipe reads it."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=FILE_WIDTH)


def stderr() -> Console:
    """The console for progress and errors."""
    return Console(stderr=True)


def progress() -> Progress:
    """A bar that names what it is at, and goes away when it is done; silent where stderr is no terminal."""
    console = stderr()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def many(number: int, noun: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
