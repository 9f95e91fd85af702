"""Pass, Pipeline: a pass is a callable value that edits a Program and says what it did."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ggpass.errors import PassError
from ggpass.graph.program import Program
from ggpass.graph.report import Report


@runtime_checkable
class Pass(Protocol):
    """Anything that edits a Program in place and reports; write one as a frozen dataclass with `__call__`."""

    def __call__(self, program: Program) -> Report: ...


def pass_name(step: Callable[[Program], Report]) -> str:
    """Return the class name of a pass, or the name of a plain function."""
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
