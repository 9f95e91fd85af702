"""Report: the changes that a pass made and the reasons for the rest, as values and as tables for people."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ggpass.graph.tables import Column, size, table

if TYPE_CHECKING:  # rich takes a while to import, and most programs print no report
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

#: Names get at least this many columns, however narrow the terminal.
LEAST_ROOM = 24

CHANGE_HEADINGS = ("what", "n", "change", "before", "after")
SKIP_HEADINGS = ("what", "n", "reason", "size")


@dataclass(frozen=True)
class Change:
    """One thing that a pass changed.

    Attributes:
        name: of the weight or node.
        what: what happened to it, in a few words.
        bytes_before, bytes_after: of its weights; 0 where a change is not about bytes.
    """

    name: str
    what: str
    bytes_before: int = 0
    bytes_after: int = 0


@dataclass(frozen=True)
class Skip:
    """One thing that a pass left as it was, and why.

    Attributes:
        name: of the weight or node.
        reason: why, in words a user can act on.
        bytes: of the weight that stays; 0 where a skip is not about bytes.
        matrix: whether it counts as a matrix, the part of a model that lowering is about.
    """

    name: str
    reason: str
    bytes: int = 0
    matrix: bool = True


@dataclass
class Report:
    """What a pass, or a pipeline of them, changed and skipped.

    Attributes:
        title: of the pass.
        changes, skips: in the order they were met.
        notes: facts about the whole, a fallback that was taken for instance.
        parts: the reports of a pipeline's passes.
    """

    title: str
    changes: list[Change] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parts: list["Report"] = field(default_factory=list)

    def flat(self) -> Iterable["Report"]:
        """Yield this report and those of its parts, depth first."""
        yield self
        for part in self.parts:
            yield from part.flat()

    @property
    def bytes_before(self) -> int:
        """Return bytes of the lowered weights as they were."""
        return sum(c.bytes_before for r in self.flat() for c in r.changes)

    @property
    def bytes_after(self) -> int:
        """Return bytes of the same weights now: codes and scales."""
        return sum(c.bytes_after for r in self.flat() for c in r.changes)

    @property
    def lowered_share(self) -> float:
        """(bytes of lowered weights) / (bytes of all matrices), both as they were; 1.0 for a model without any."""
        left = sum(s.bytes for r in self.flat() for s in r.skips if s.matrix)
        return self.bytes_before / (self.bytes_before + left) if self.bytes_before + left else 1.0

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        """Yield the tables of all parts, the notes, and the share of weight bytes lowered."""
        from rich.text import Text

        width = options.max_width
        for part in self.flat():
            if part.changes:
                yield _table(f"{part.title}: changed", CHANGE_HEADINGS, _change_rows(part.changes), width)
            if part.skips:
                yield _table(f"{part.title}: left as it is", SKIP_HEADINGS, _skip_rows(part.skips), width)
        lines = [f"note: {note}" for part in self.flat() for note in part.notes]
        if self.bytes_before:
            lines.append(
                f"{self.lowered_share:.2%} of the bytes of matrices lowered: "
                f"{size(self.bytes_before)} → {size(self.bytes_after)}"
            )
        if not any(part.changes or part.skips for part in self.flat()):
            lines = lines or ["nothing to do"]
        if lines:
            yield Text("\n".join(lines))

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def _open_numbers(name: str) -> str:
    """Return a name with its layer numbers left open, so that a model's equal layers make one row."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _size(count: int) -> str:
    return size(count) if count else ""


def _change_rows(changes: Sequence[Change]) -> list[tuple[str, ...]]:
    """Return one row for each kind of change: equal layers are counted, their bytes added up."""
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


def _table(title: str, headings: Sequence[str], rows: Sequence[tuple[str, ...]], width: int) -> "Table":
    """Return the table of one part of a report, without the columns that are empty."""
    kept = [i for i in range(len(headings)) if i == 0 or any(row[i] for row in rows)]
    columns = [Column(headings[i], words=headings[i] not in ("n", "before", "after", "size")) for i in kept]
    return table(columns, [[row[i] for i in kept] for row in rows], width, title=title, least=LEAST_ROOM)
