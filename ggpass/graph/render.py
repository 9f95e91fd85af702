"""Reports as rich tables: what a person sees in a terminal or a notebook."""

import re
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from ggpass.graph.pipeline import Change, Report, Skip
from ggpass.graph.tables import Column, size, table

#: Names get at least this many columns, however narrow the terminal.
LEAST_ROOM = 24

CHANGE_HEADINGS = ("what", "n", "change", "before", "after")
SKIP_HEADINGS = ("what", "n", "reason", "size")


def _open_numbers(name: str) -> str:
    """A name with its layer numbers left open, so that a model's equal layers make one row."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _size(count: int) -> str:
    return size(count) if count else ""


def _change_rows(changes: Sequence[Change]) -> list[tuple[str, ...]]:
    """One row for each kind of change: equal layers are counted, their bytes added up."""
    groups: dict[tuple[str, str], list[Change]] = {}
    for change in changes:
        groups.setdefault((_open_numbers(change.name), re.sub(r"(?<=\w)_\d+\b", "", change.what)), []).append(change)
    return [
        (
            pattern if len(group) > 1 else group[0].name,
            str(len(group)),
            what,
            _size(sum(c.bytes_before for c in group)),
            _size(sum(c.bytes_after for c in group)),
        )
        for (pattern, what), group in groups.items()
    ]


def _skip_rows(skips: Sequence[Skip]) -> list[tuple[str, ...]]:
    """Matrices by their kind of layer, what lowering is not about summed up by reason."""
    groups: dict[tuple[str, str], list[Skip]] = {}
    for skip in skips:
        groups.setdefault((_open_numbers(skip.name) if skip.matrix else "", skip.reason), []).append(skip)
    rows: list[tuple[str, ...]] = []
    for (pattern, reason), group in groups.items():
        name = pattern if pattern and len(group) > 1 else group[0].name
        if not pattern and len(group) > 1:
            name += " …"
        rows.append((name, str(len(group)), reason, _size(sum(s.bytes for s in group))))
    return rows


def _table(title: str, headings: Sequence[str], rows: Sequence[tuple[str, ...]], width: int) -> Table:
    """The table of one part of a report, without the columns that are empty."""
    kept = [i for i in range(len(headings)) if i == 0 or any(row[i] for row in rows)]
    columns = [Column(headings[i], words=headings[i] not in ("n", "before", "after", "size")) for i in kept]
    return table(columns, [[row[i] for i in kept] for row in rows], width, title=title, least=LEAST_ROOM)


class ReportView:
    """A report as rich shows it: the tables of its parts, its notes, and the share of weight bytes lowered."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        for part in self.report.flat():
            if part.changes:
                yield _table(f"{part.title}: changed", CHANGE_HEADINGS, _change_rows(part.changes), width)
            if part.skips:
                yield _table(f"{part.title}: left as it is", SKIP_HEADINGS, _skip_rows(part.skips), width)
        lines = [f"note: {note}" for part in self.report.flat() for note in part.notes]
        if self.report.bytes_before:
            lines.append(
                f"{self.report.lowered_share:.2%} of the bytes of matrices lowered: "
                f"{size(self.report.bytes_before)} → {size(self.report.bytes_after)}"
            )
        if not any(part.changes or part.skips for part in self.report.flat()):
            lines = lines or ["nothing to do"]
        if lines:
            yield Text("\n".join(lines))


def to_text(report: Report, width: int = 120) -> str:
    """The same as plain text."""
    console = Console(width=width, no_color=True, highlight=False)
    with console.capture() as capture:
        console.print(ReportView(report))
    return capture.get()
