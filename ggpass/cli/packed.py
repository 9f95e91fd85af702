"""`ggpass inspect` on a packed file: bits a weight, the entropy of its symbols, and how close the coder came to it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from ggpass.cli.console import progress, stdout

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ggpass.packed.measure import PackedInspection


def is_packed_file(path: Path) -> bool:
    """Whether `path` is a safetensors file, or a directory of one, that ggpass packed."""
    from ggpass.errors import FormatError
    from ggpass.packed.layout import TensorFile
    from ggpass.packed.manifest import is_packed

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    try:
        with TensorFile(files[0]) as opened:
            return is_packed(opened.layout)
    except (FormatError, IndexError):
        return False


def inspect_packed(path: Path, as_json: bool) -> None:
    """Measure and print a packed file or a directory of packed files."""
    from ggpass.packed.measure import measure

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    with progress() as bar:
        task = bar.add_task("decoding", total=None)
        result = measure(files, lambda name: bar.update(task, advance=1, description=escape(f"decoding {name}")))
    if as_json:
        from json import dumps

        stdout().print_json(dumps(result.as_dict()))
    else:
        stdout().print(packed_table(result))


def packed_table(result: "PackedInspection") -> "RenderableType":
    """One row for each coded tensor, the sums as its foot, and what is not coded below it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from ggpass.cli.inspect import count, size

    total: Any = result.total
    table = Table(box=None, padding=(0, 2, 0, 0), show_footer=True, pad_edge=False)
    table.add_column("weight", overflow="fold", footer=f"all {len(result.coded)} coded tensors")
    table.add_column("as", footer="")
    table.add_column("elements", justify="right", footer=count(total.elements))
    table.add_column("bytes", justify="right", footer=size(total.bytes))
    table.add_column("bits each", justify="right", footer=f"{total.bits:.3f}")
    table.add_column("entropy", justify="right", footer=f"{total.entropy:.3f}")
    table.add_column("efficiency", justify="right", footer=f"{total.efficiency:.2%}")
    for t in result.coded:
        figures = (f"{t.bits:.3f}", f"{t.entropy:.3f}", f"{t.efficiency:.2%}")
        table.add_row(escape(t.name), t.kind, count(t.elements), size(t.bytes), *figures)
    lines = [
        f"{size(result.file_bytes)} in all, {8 * result.file_bytes / max(1, result.elements):.3f} bits for each of "
        f"{count(result.elements)} elements; entropy is that of the stored symbols, of zero order, tensor by tensor"
    ]
    if result.plain:
        plain = sum(t.bytes for t in result.plain)
        lines.append(f"{len(result.plain)} tensors ({size(plain)}) stay as they are")
    lines += [f"{alias} equals {name} and is stored once" for alias, name in result.aliases.items()]
    text = Text("\n".join(lines))
    return Group(table, Text(), text) if result.coded else text
