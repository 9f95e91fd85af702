"""Where commands print: results to stdout, progress and errors to stderr, so that results can be piped."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

#: Columns of a table that is not written to a terminal, where none are asked for by COLUMNS.
FILE_WIDTH = 160


def stdout() -> Console:
    """Return the console for results; wide where a file or a pipe reads it."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=FILE_WIDTH)


def say(*lines: str) -> None:
    """Print lines as they are: no markup, no colors of numbers."""
    for line in lines:
        stdout().print(line, highlight=False, markup=False)


def echo_json(data: Any) -> None:
    """Print plain data as JSON."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def stderr() -> Console:
    """Return the console for progress and errors."""
    return Console(stderr=True)


#: How a Python argument that an error advises is given here.
_ARGUMENTS = (
    (re.compile(r"\b(only|skip)=\[(.*?)\]"), r"--\1 \2"),
    (re.compile(r"\(skip=\)"), "(--skip)"),
    (re.compile(r"\bfallback=None\b"), "--fallback none"),
    (re.compile(r"\bexternal_data=False\b"), "--single-file"),
)


def as_options(message: str) -> str:
    """Return an error's text with options of the command line in place of Python's arguments: `--skip 'w'`."""
    for argument, option in _ARGUMENTS:
        message = argument.sub(option, message)
    return message


def progress() -> Progress:
    """Return a bar that names what it is at, and goes away when it is done; silent where stderr is no terminal."""
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


@contextlib.contextmanager
def progress_of(*verbs: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar, and yield how to move it: by a tensor's name, the bytes done and the bytes in all; 0 starts again.

    Args:
        verbs: say what happens to a tensor; several follow each other, in equal parts of the bytes.
    """
    with progress() as bar:
        task = bar.add_task(verbs[0], total=None)

        def advance(name: str, done: int, total: int) -> None:
            if done == 0:
                bar.reset(task)
            verb = verbs[len(verbs) * done // (total + 1)]
            bar.update(task, completed=done, total=total, description=escape(f"{verb} {name}".rstrip()))

        yield advance


def many(number: int, noun: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
