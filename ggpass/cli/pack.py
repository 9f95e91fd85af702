"""`ggpass pack` and `ggpass unpack`: a checkpoint at its entropy, and back."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group

from ggpass.cli.console import progress_of, say, stdout
from ggpass.cli.options import Force, Only, Skip
from ggpass.file import PackReport, pack, unpack
from ggpass.graph.tables import Column, count, left_lines, size, table, with_lines

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
    start = time.perf_counter()
    with progress_of("packing") as advance:
        report = pack(
            source,
            target,
            format,
            loss=loss,
            only=tuple(only or ()),
            skip=tuple(skip or ()),
            threads=threads,
            progress=advance,
            replace=force,
        )
    console = stdout()
    console.print(pack_table(report, target, time.perf_counter() - start, console.width))


def unpack_command(source: Source, target: Target, threads: Threads = None, force: Force = False) -> None:
    """Write a packed model as plain safetensors again: decoded values, in the original dtypes.

    Every payload is checked on the way; a damaged one is named, and no target appears.
    """
    with progress_of("unpacking") as advance:
        notes = unpack(source, target, threads=threads, progress=advance, replace=force)
    say(*(f"note: {note}" for note in notes), f"{source} unpacked to {target}")


def pack_table(report: PackReport, target: Path, seconds: float, width: int) -> Group:
    """The largest weights that were packed, and the sums below them."""
    coded = sorted((t for t in report.tensors if t.kind not in ("plain", "alias")), key=lambda t: -t.bytes_before)
    rows = []
    for tensor in coded[:10]:
        bits = f"{8 * tensor.bytes_after / max(1, tensor.elements):.3f}"
        rows.append([tensor.name, count(tensor.elements), size(tensor.bytes_before), size(tensor.bytes_after), bits])
    reasons = ((t.name, "equals another tensor" if t.kind == "alias" else t.reason) for t in report.tensors if t.reason)
    lines = [
        f"{len(coded)} of {len(report.tensors)} tensors coded, {report.payload_bits:.3f} bits a weight; "
        f"{size(report.source_bytes)} → {size(report.file_bytes)}, {report.file_bits:.3f} bits for each element of the "
        f"file, in {seconds:.1f} s: {target}",
        *left_lines(reasons),
        *(f"note: {note}" for note in report.notes),
    ]
    columns = map(Column, ("largest weights", "elements", "before", "after", "bits each"))
    return with_lines(table([*columns], rows, width) if coded else None, lines)
