"""Reports as rich tables: what a person sees in a terminal or a notebook."""

import re
from collections import Counter

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ggpass.pipeline import Change, Report, Skip


def megabytes(count: int) -> str:
    """Bytes for people, in MB (10^6) or kB (10^3)."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _pattern(text: str) -> str:
    """A name with its layer numbers left open, so that a model's equal layers make one row."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", text)


def _changes(report: Report) -> Table | None:
    """One row for each kind of change: equal layers are counted, their bytes added up."""
    if not report.changes:
        return None
    rows: dict[tuple[str, str], list[Change]] = {}
    for change in report.changes:
        rows.setdefault((_pattern(change.name), re.sub(r"(?<=\w)_\d+\b", "", change.what)), []).append(change)
    table = Table(title=f"{report.title}: changed", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("what", overflow="fold")
    table.add_column("n", justify="right")
    table.add_column("change")
    sized = any(c.bytes_before for c in report.changes)
    if sized:
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
    for (pattern, what), group in rows.items():
        row = [pattern if len(group) > 1 else group[0].name, str(len(group)), what]
        if sized:
            before, after = sum(c.bytes_before for c in group), sum(c.bytes_after for c in group)
            row += [megabytes(before) if before else "", megabytes(after) if before else ""]
        table.add_row(*row)
    return table


def _skips(report: Report) -> Table | None:
    """Matrices that stayed one by one, what lowering is not about summed up by reason."""
    if not report.skips:
        return None
    table = Table(title=f"{report.title}: left as it is", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("what", overflow="fold")
    table.add_column("reason")
    table.add_column("size", justify="right")
    small: Counter[str] = Counter()
    count: Counter[str] = Counter()
    first: dict[str, Skip] = {}
    for skip in report.skips:
        if skip.matrix:
            table.add_row(skip.name, skip.reason, megabytes(skip.bytes))
        else:
            small[skip.reason] += skip.bytes
            count[skip.reason] += 1
            first.setdefault(skip.reason, skip)
    for reason, total in small.items():
        name = first[reason].name + (f" and {count[reason] - 1} more" if count[reason] > 1 else "")
        table.add_row(name, reason, megabytes(total) if total else "")
    return table


def report_renderable(report: Report) -> RenderableType:
    """The tables of a report and its parts, its notes, and the share of weight bytes lowered."""
    parts: list[RenderableType] = []
    for each in report.flat():
        parts += [table for table in (_changes(each), _skips(each)) if table is not None]
    lines = [f"note: {note}" for each in report.flat() for note in each.notes]
    if report.bytes_before:
        lines.append(
            f"{report.lowered_share:.2%} of the bytes of matrices lowered: {megabytes(report.bytes_before)} → "
            f"{megabytes(report.bytes_after)}"
        )
    parts.append(Text("\n".join(lines) or "nothing to do"))
    return Group(*parts)


def to_text(report: Report, width: int = 120) -> str:
    """The same as plain text."""
    console = Console(width=width, no_color=True, highlight=False)
    with console.capture() as capture:
        console.print(report_renderable(report))
    return capture.get()
