"""Target: where a lowered model runs, and everything that takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ggpass.targets.artifact import Artifact, Sizes
from ggpass.errors import TargetError
from ggpass.formats import Format
from ggpass.lowering.decide import Lowering
from ggpass.lowering.operators import Operators
from ggpass.passes import CleanUp, FoldBatchNorm, LowerWeights, MergeLinears
from ggpass.graph.pipeline import Pass
from ggpass.graph.report import Report
from ggpass.graph.program import Program


class Target(Protocol):
    """A device or runtime. A new one is a file in `targets/` with such a value, and a line in TARGETS."""

    @property
    def name(self) -> str:
        """The second half of a target string."""
        ...

    def unavailable(self) -> str | None:
        """Why it cannot be used here and what to do about it; None where it can."""
        ...

    def for_archs(self, archs: Sequence[str]) -> "Target":
        """The same target, building ahead of time for processors that are elsewhere.

        Raises:
            TargetError: it does not do that, or knows no such architecture.
        """
        ...

    def prepare(self, fmt: Format) -> tuple[str, ...]:
        """Load or build what it needs, once; notes for the report, a fallback taken for instance."""
        ...

    def check_tensor(self, name: str, tensor: Tensor) -> None:
        """Raise TargetError where a weight lies where it cannot be lowered; before anything is converted."""
        ...

    def lowering(self) -> Lowering:
        """Its operators and its memory; format, scheme and patterns are filled in by the caller."""
        ...

    def build(self, program: Program, report: Report, sizes: Sizes, target: str) -> Artifact:
        """The finished Artifact."""
        ...

    def finish(self, model: nn.Module, report: Report, target: str) -> None:
        """What a module needs that was lowered without a graph, attached to it."""
        ...


@dataclass(frozen=True)
class TorchTarget:
    """The base of targets that run the graph with torch and differ in their operators.

    Attributes:
        name: the second half of a target string.
        operators: what the lowered nodes call.
    """

    name: str
    operators: Operators

    def unavailable(self) -> str | None:
        return None

    def for_archs(self, archs: Sequence[str]) -> Target:
        raise TargetError(f"target {self.name} builds for this machine; leave out arch={tuple(archs)}")

    def check_tensor(self, name: str, tensor: Tensor) -> None:
        """Any place will do."""

    def prepare(self, fmt: Format) -> tuple[str, ...]:
        return ()

    def lowering(self) -> Lowering:
        return Lowering(operators=self.operators)

    def build(self, program: Program, report: Report, sizes: Sizes, target: str) -> Artifact:
        return Artifact(program, target, report, sizes)

    def finish(self, model: nn.Module, report: Report, target: str) -> None:
        """Nothing."""
