"""Target: where a lowered model runs. A name and operators make one; a device that takes more overrides a method."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ggpass.errors import TargetError
from ggpass.formats.base import Format
from ggpass.graph.program import Program
from ggpass.graph.report import Report
from ggpass.lowering.decide import Allocate
from ggpass.lowering.operators import DISPATCHED, Operators
from ggpass.targets.artifact import Artifact, Sizes


@dataclass(frozen=True)
class Target:
    """A device or runtime; as it stands, one that runs a lowered model with torch.

    Attributes:
        name: the second half of a target string, as `cpu` in `rf8-cpu`.
        operators: what lowered layers call.
        allocate: makes the memory of codes; torch's own if None.
    """

    name: str
    operators: Operators = DISPATCHED
    allocate: Allocate | None = None

    def unavailable(self) -> str | None:
        """Return why it cannot be used here and what to do about it; None if it can."""
        return None

    def for_archs(self, archs: Sequence[str]) -> "Target":
        """Return the same target, building ahead of time for processors that are elsewhere.

        Raises:
            TargetError: it does not do that, or knows no such architecture.
        """
        raise TargetError(f"target {self.name} builds for this machine; leave out arch={tuple(archs)}")

    def prepare(self, fmt: Format) -> tuple[str, ...]:
        """Load or build what it needs, once; return notes for the report, as on a fallback that is taken."""
        return ()

    def check_tensor(self, name: str, tensor: Tensor) -> None:
        """Raise TargetError if a weight lies where it cannot be lowered; before anything is converted."""

    def build(self, lowered: Program | nn.Module, report: Report, sizes: Sizes, target: str) -> Artifact | nn.Module:
        """Return the Artifact of a Program, or a module itself, which holds its report and sizes from then on.

        Args:
            lowered: computes with codes.
            report: what happened to each weight; the target may add notes.
            sizes: bytes before and after.
            target: the target string.
        """
        if isinstance(lowered, Program):
            return Artifact(lowered, target, report, sizes)
        lowered.__dict__.update(ggpass_report=report, ggpass_sizes=sizes)
        return lowered


#: Every target by its name; filled by `register`.
TARGETS: dict[str, Target] = {}


def register(target: Target) -> Target:
    """Add a target to those that `compile`, `load` and the command line know, and return it.

    Raises:
        TargetError: another target has that name.
    """
    if TARGETS.setdefault(target.name, target) is not target:
        raise TargetError(f"there is a target {target.name!r} already; give this one another name")
    return target
