"""`ggpass inspect` on an ONNX file with our operators: its weights, what computes with them, and the codes' entropy."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from ggpass.cli.console import progress, stdout
from ggpass.graph.report import wrap_name

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ggpass.onnx.coded_file import CodedFile

#: Columns that names get before they are broken at dots.
NAME_WIDTH = 56


def is_onnx_file(path: Path) -> bool:
    """Whether a path is named like an ONNX model."""
    return path.suffix.lower() == ".onnx"


def is_coded_onnx(path: Path) -> bool:
    """Whether an ONNX file computes with our operators.

    Raises:
        GgpassError: not an ONNX model, or the packages that read one are missing.
    """
    from ggpass.errors import GgpassError
    from ggpass.targets import TARGETS

    missing = TARGETS["onnx"].unavailable()
    if missing:
        raise GgpassError(f"reading {path} {missing}")
    from ggpass.onnx.coded_file import is_coded
    from ggpass.onnx.reader import load

    return is_coded(load(path))


def inspect_coded_onnx(path: Path, as_json: bool) -> None:
    """Measure and print an exported file."""
    from ggpass.onnx.coded_file import measure

    with progress() as bar:
        task = bar.add_task("reading codes", total=None)
        result = measure(path, lambda name: bar.update(task, advance=1, description=escape(f"reading {name}")))
    if as_json:
        from json import dumps

        typer.echo(dumps(result.as_dict(), indent=2, ensure_ascii=False))
    else:
        stdout().print(coded_table(result))


def coded_table(result: "CodedFile") -> "RenderableType":
    """One row for each weight, the sums as its foot, and what the file is below it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from ggpass.cli.inspect import count, size
    from ggpass.onnxruntime import library_or_reason

    codes = sum(t.size for t in result.tensors)
    table = Table(box=None, padding=(0, 2, 0, 0), show_footer=True, pad_edge=False)
    table.add_column("codes", overflow="fold", footer=f"all {len(result.tensors)} weights")
    table.add_column("shape", justify="right", footer=count(codes))
    table.add_column("computed by")
    table.add_column("entropy", justify="right", footer=f"{result.entropy:.2f}")
    for t in result.tensors:
        by = ", ".join(t.operators) + (f" ({t.uses} nodes)" if t.uses > 1 else "")
        shape = "×".join(map(str, t.shape))
        table.add_row(escape(wrap_name(t.name.removesuffix("_codes"), NAME_WIDTH)), shape, by, f"{t.entropy:.2f}")
    library = library_or_reason()
    lines = [
        f"{size(result.file_bytes)}: {size(codes)} of codes, {size(result.other_bytes)} of scales, biases and norms, "
        f"opset {result.opset}; entropy is in bits a code",
        "runs in any ONNX runtime: the operators carry their own fallback"
        if result.fallback
        else "carries no fallback: it runs with the ggpass custom-op library only",
        f"the library is {library}" if isinstance(library, Path) else f"no custom-op library here: {library}",
    ]
    return Group(table, Text(), Text("\n".join(lines)))
