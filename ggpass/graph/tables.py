"""Plain tables for a terminal: dotted names, figures beside them, sums below, and lines of words."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        title: its heading; may have several lines.
        foot: its last cell, below those of the rows.
        words: True if it holds words, which may be wrapped, and not figures.
    """

    title: str
    foot: str = ""
    words: bool = False


def count(number: int) -> str:
    """Return a count for people: 384, 22.69 M, 1.24 G."""
    for unit, factor in (("G", 10**9), ("M", 10**6)):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return str(number)


def size(number: int) -> str:
    """Return bytes for people, in kB, MB and GB (powers of 1000)."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number} B"


def shape_text(shape: Sequence[int]) -> str:
    """`48×32`."""
    return "×".join(map(str, shape))


def wrap_name(name: str, width: int) -> str:
    """Return a dotted name in lines of at most `width`, broken after dots if that is possible."""
    lines = [""]
    for part in name.replace(".", ".\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    width: int,
    *,
    title: str | None = None,
    gap: int = 2,
    least: int = 16,
    suffix: str = "",
) -> "Table":
    """Return a table whose first column holds dotted names and gets the room that the others leave.

    Args:
        columns: the first is that of the names.
        rows: the texts of each row.
        width: of the terminal.
        title: above the table.
        gap: spaces between two columns.
        least: the room that names get, however narrow the terminal.
        suffix: an ending that all names lose if one of them has no room.
    """
    from rich.cells import cell_len
    from rich.markup import escape
    from rich.table import Table

    lengths = (
        max(cell_len(line) for text in (c.title, c.foot, *(row[i] for row in rows)) for line in text.split("\n"))
        for i, c in enumerate(columns)
        if i
    )
    room = max(least, width - sum(length + gap for length in lengths))
    names = [row[0] for row in rows]
    if any(len(name) > room for name in names):
        names = [name.removesuffix(suffix) for name in names]
    shown = Table(
        title=title,
        title_justify="left",
        box=None,
        padding=(0, gap, 0, 0),
        pad_edge=False,
        show_footer=any(c.foot for c in columns),
    )
    shown.add_column(columns[0].title, overflow="fold", footer=columns[0].foot)
    for column in columns[1:]:
        justify, fixed = ("left", False) if column.words else ("right", True)
        shown.add_column(column.title, column.foot, justify=justify, no_wrap=fixed)  # type: ignore[arg-type]
    for name, row in zip(names, rows):
        parts = name.replace(" + ", " +\n").split("\n")
        shown.add_row(escape("\n".join(wrap_name(part, room) for part in parts)), *map(escape, row[1:]))
    return shown


def with_lines(shown: "Table | None", lines: Sequence[str]) -> "Group":
    """A table, if there is one, and lines of words below it."""
    from rich.console import Group
    from rich.text import Text

    text = Text("\n".join(lines))
    return Group(text) if shown is None else Group(shown, Text(), text)


def left_lines(reasons: Iterable[tuple[str, str]]) -> list[str]:
    """Return `left: NAME and n more: REASON` for each reason among (name, reason)."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons:
        groups.setdefault(reason, []).append(name)
    more = {reason: f" and {len(names) - 1} more" if len(names) > 1 else "" for reason, names in groups.items()}
    return [f"left: {names[0]}{more[reason]}: {reason}" for reason, names in groups.items()]
