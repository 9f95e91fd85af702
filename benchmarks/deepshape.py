"""DeepShape at its published defaults, and scale-compensated: bits and quality before, after, and after fine-tuning.

    python benchmarks/deepshape.py [--part mlp] [--out out/deepshape]

Writes deepshape.md and deepshape.png. What a former run measured is read from `--out` and not measured again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent / "examples")]

from remap import embeddings, tables, trained  # noqa: E402

Row = dict[str, Any]

PARTS = ("embeddings", *trained.WAYS)


def ways_of(part: str) -> tuple[Any, ...]:
    """What is compared in a part."""
    return embeddings.WAYS if part == "embeddings" else trained.ways_of(part)


def file_of(part: str, number: int, folder: Path, seed: int) -> Path:
    """Where a row is kept."""
    return folder / f"{part}-{seed}-{number}.json"


def measure(part: str, number: int, folder: Path, seed: int) -> None:
    """Measure one row and keep it."""
    way = ways_of(part)[number]
    row = embeddings.measure(way) if part == "embeddings" else trained.measure(part, way, folder, seed)
    file = file_of(part, number, folder, seed)
    beside = file.with_suffix(".tmp")
    beside.write_text(json.dumps(row, indent=1), encoding="utf-8")
    beside.replace(file)


def measured(folder: Path, seed: int) -> dict[str, list[Row]]:
    """All rows that are there, by part."""
    found: dict[str, list[Row]] = {}
    for part in PARTS:
        files = [file_of(part, number, folder, seed) for number in range(len(ways_of(part)))]
        rows = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
        if rows:
            found[part] = rows
    return found


def main(
    part: Annotated[list[str] | None, typer.Option(help="embeddings, or a task; all if left out.")] = None,
    out: Annotated[Path, typer.Option(help="Results, table and plot.")] = Path("out/deepshape"),
    seed: Annotated[int, typer.Option(help="Of weights and row order.")] = 0,
) -> None:
    """Measure what is missing, then write the table and the plot."""
    out.mkdir(parents=True, exist_ok=True)
    missing = [
        (name, number)
        for name in part or PARTS
        for number in range(len(ways_of(name)))
        if not file_of(name, number, out, seed).exists()
    ]
    for name, number in track(missing, "measuring"):
        measure(name, number, out, seed)
    tables.write(measured(out, seed), out, seed)


if __name__ == "__main__":
    typer.run(main)
