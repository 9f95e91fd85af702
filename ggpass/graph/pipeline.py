"""Pass, Report, Pipeline: a pass is a callable value that edits a Program and says what it did."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ggpass.errors import PassError
from ggpass.graph.program import Program

if TYPE_CHECKING:
    from rich.console import RenderableType


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
        """This report and those of its parts, depth first."""
        yield self
        for part in self.parts:
            yield from part.flat()

    @property
    def bytes_before(self) -> int:
        """Bytes of the lowered weights as they were."""
        return sum(c.bytes_before for r in self.flat() for c in r.changes)

    @property
    def bytes_after(self) -> int:
        """Bytes of the same weights now: codes and scales."""
        return sum(c.bytes_after for r in self.flat() for c in r.changes)

    @property
    def lowered_share(self) -> float:
        """(bytes of lowered weights) / (bytes of all matrices), both as they were; 1.0 for a model without any."""
        left = sum(s.bytes for r in self.flat() for s in r.skips if s.matrix)
        return self.bytes_before / (self.bytes_before + left) if self.bytes_before + left else 1.0

    def __rich__(self) -> "RenderableType":
        from ggpass.graph.render import ReportView

        return ReportView(self)

    def __str__(self) -> str:
        from ggpass.graph.render import to_text

        return to_text(self)


@runtime_checkable
class Pass(Protocol):
    """Anything that edits a Program in place and reports; write one as a frozen dataclass with `__call__`."""

    def __call__(self, program: Program) -> Report: ...


def pass_name(step: Callable[[Program], Report]) -> str:
    """The class name of a pass, or the name of a plain function."""
    return getattr(step, "__name__", type(step).__name__)


@dataclass(frozen=True)
class Pipeline:
    """A sequence of passes, itself a pass; the Program is checked after each one.

    Raises:
        PassError: a pass left an illegal Program, or did not return a Report; the message names the pass.
    """

    passes: tuple[Pass, ...]
    title: str = "Pipeline"

    def __call__(self, program: Program) -> Report:
        report = Report(self.title)
        for step in self.passes:
            part = step(program)
            if not isinstance(part, Report):
                raise PassError(
                    f"pass {pass_name(step)} returned {type(part).__name__}; a pass returns a ggpass.Report"
                )
            try:
                program.check()
            except PassError as error:
                raise PassError(
                    f"pass {pass_name(step)} left a Program that is not legal: {error}; leave the pass out of "
                    "`passes=`, or mend it"
                ) from error
            report.parts.append(part)
        return report
