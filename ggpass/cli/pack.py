"""`ggpass pack` and `ggpass unpack`: a checkpoint at its entropy, and back."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ggpass.cli.console import progress, stdout
from ggpass.cli.options import Force, Only, Skip

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress, TaskID

    from ggpass.file import PackReport

SOURCE_HELP = "A .safetensors file, a .safetensors.index.json, or a model directory."
Source = Annotated[Path, typer.Argument(metavar="SOURCE", help=SOURCE_HELP)]
Target = Annotated[Path, typer.Argument(metavar="TARGET", help="The new file or directory.")]
Threads = Annotated[int | None, typer.Option(min=1, help="How many threads; all of the machine's if left out.")]
FORMAT_HELP = (
    "A format (`ggpass targets` lists them), `lossless`, `grid`, or `grid:STEP` with a step such as 0.01 or sigma/8."
)
LOSS_HELP = "`grid` without a step: the relative squared error each weight may have; the coarsest step is found."


def pack_command(
    source: Source,
    target: Target,
    format: Annotated[str, typer.Option("--format", "-f", metavar="FORMAT", help=FORMAT_HELP)] = "rf8",
    loss: Annotated[float | None, typer.Option(help=LOSS_HELP)] = None,
    only: Only = None,
    skip: Skip = None,
    threads: Threads = None,
    force: Force = False,
) -> None:
    """Store a model's weights at their entropy, in one valid .safetensors file for each of its own.

    A directory comes out as a directory: its shards packed, its configuration and tokenizer copied, pickles left out.
    The target appears only when it is whole. After an interruption, the same command goes on where it stopped.
    """
    from ggpass.file import pack

    start = time.perf_counter()
    with progress() as bar:
        report = pack(
            source,
            target,
            format,
            loss=loss,
            only=tuple(only or ()),
            skip=tuple(skip or ()),
            threads=threads,
            progress=_Bar(bar, "packing"),
            replace=force,
        )
    stdout().print(pack_table(report, target, time.perf_counter() - start))


def unpack_command(source: Source, target: Target, threads: Threads = None, force: Force = False) -> None:
    """Write a packed model as plain safetensors again: decoded values, in the original dtypes.

    Every payload is checked on the way; a damaged one is named, and no target appears.
    """
    from ggpass.file import unpack

    with progress() as bar:
        notes = unpack(source, target, threads=threads, progress=_Bar(bar, "unpacking"), replace=force)
    for note in notes:
        stdout().print(escape(f"note: {note}"))
    stdout().print(escape(f"{source} unpacked to {target}"), highlight=False)


class _Bar:
    """One progress bar for each file, in megabytes."""

    def __init__(self, bar: "Progress", verb: str) -> None:
        self.bar, self.verb = bar, verb
        self.task: TaskID | None = None

    def __call__(self, name: str, done: int, total: int) -> None:
        if self.task is None or done == 0:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.task = self.bar.add_task(self.verb, total=total // 10**6)
        text = f"{self.verb} {name}" if name else self.verb
        self.bar.update(self.task, completed=done // 10**6, description=escape(text))


def pack_table(report: "PackReport", target: Path, seconds: float) -> "RenderableType":
    """What was packed, by shape of weight, and the sums below it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from ggpass.graph.tables import count, size

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("largest weights", overflow="fold")
    for title in ("elements", "before", "after", "bits each"):
        table.add_column(title, justify="right", no_wrap=True)
    coded = sorted((t for t in report.tensors if t.kind not in ("plain", "alias")), key=lambda t: -t.bytes_before)
    for tensor in coded[:10]:
        bits = f"{8 * tensor.bytes_after / max(1, tensor.elements):.3f}"
        row = (count(tensor.elements), size(tensor.bytes_before), size(tensor.bytes_after), bits)
        table.add_row(escape(tensor.name), *row)
    lines = [
        f"{len(coded)} of {len(report.tensors)} tensors coded, {report.payload_bits:.3f} bits a weight; "
        f"{size(report.source_bytes)} → {size(report.file_bytes)}, {report.file_bits:.3f} bits for each element of the "
        f"file, in {seconds:.1f} s: {target}"
    ]
    reasons: dict[str, list[str]] = {}
    for tensor in report.tensors:
        if tensor.reason:
            reasons.setdefault("equals another tensor" if tensor.kind == "alias" else tensor.reason, []).append(
                tensor.name
            )
    lines += [
        f"left: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in reasons.items()
    ]
    lines += [f"note: {note}" for note in report.notes]
    text = Text("\n".join(lines))
    return Group(table, Text(), text) if coded else text
