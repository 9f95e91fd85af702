"""ν of each weight: one number, one for each pattern, or what the weights of a trained checkpoint have."""

import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ggpass.errors import WeightError
from ggpass.ggd.fit import fit_moments
from ggpass.packed.checkpoint import Checkpoint
from ggpass.packed.dtypes import WEIGHT_DTYPES
from ggpass.passes.gg_init.candidate import Group

#: ν of `shape="auto"` for each kind of operator, as `benchmarks/rate_at_quality.py` found: 0.7 trains the byte LM
#: faster than 1 and 2 by five standard errors of three seeds (`benchmarks/results/rate/byte-lm.md`); on the CNN the
#: three are equal within the error of five (`cnn.md`), so that convolutions keep the Gaussian.
AUTO_SHAPES = {Group.LINEAR: 0.7, Group.CONV: 2.0, Group.EMBEDDING: 0.7}

#: The shapes that weights are drawn with. Outside, a fit says that a tensor is no generalized Gaussian.
DRAWN_SHAPES = (0.2, 8.0)


def check_shape(value: float, of: str) -> float:
    """`value` as ν.

    Raises:
        WeightError: not a number in DRAWN_SHAPES.
    """
    low, high = DRAWN_SHAPES
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise WeightError(
            f"the shape ν {of} is a number from {low} to {high:g} (2 is the Gaussian), not {value!r}; shape= takes "
            "one, {pattern: ν}, 'auto' or 'like:FILE'"
        )
    return float(value)


@dataclass(frozen=True)
class CheckpointShapes:
    """ν(name) = the moment fit of the same-named tensor, else the median over the kind of operator.

    Attributes:
        label: of the checkpoint, for the report.
        by_name: ν of each matrix in it.
        medians: ν of each kind of operator; a kind that is missing there has the median of all.
    """

    label: str
    by_name: dict[str, float]
    medians: dict[Group, float]
    counts: dict[Group, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> "CheckpointShapes":
        """Fits every float matrix of a checkpoint, one at a time.

        Raises:
            FormatError: no readable safetensors.
            WeightError: no matrix in it has a shape in DRAWN_SHAPES.
        """
        checkpoint = Checkpoint(path)
        by_name: dict[str, float] = {}
        groups: dict[Group, list[float]] = {}
        for info in checkpoint.tensors:
            if len(info.shape) < 2 or info.dtype not in WEIGHT_DTYPES or info.size == 0:
                continue
            weight = checkpoint.read(info.name)
            if not bool(weight.any()):
                continue
            shape = fit_moments(weight).shape
            if DRAWN_SHAPES[0] <= shape <= DRAWN_SHAPES[1]:
                by_name[info.name] = shape
                groups.setdefault(group_of_name(info.name, len(info.shape)), []).append(shape)
        if not by_name:
            raise WeightError(f"{path} holds no float matrix with a shape ν to take; name a trained checkpoint")
        every = statistics.median(by_name.values())
        medians = {group: statistics.median(groups[group]) if group in groups else every for group in Group}
        return cls(Path(path).name, by_name, medians, {group: len(found) for group, found in groups.items()})

    def shape_of(self, names: Iterable[str], group: Group) -> tuple[float, str]:
        """(ν, where it comes from) of a weight of these names."""
        for name in names:
            if name in self.by_name:
                return self.by_name[name], f"as in {self.label}"
        kind = group.value if group in self.counts else "weight"
        return self.medians[group], f"the median {kind} in {self.label}, which has no such name"


def group_of_name(name: str, dimensions: int) -> Group:
    """Return the kind of operator behind a tensor of a checkpoint, which has names and shapes only."""
    if dimensions != 2:
        return Group.CONV
    return Group.EMBEDDING if re.search(r"embed|(^|\.)(wte|wpe|shared)\.", name) else Group.LINEAR


def is_like(shape: object) -> bool:
    """Return True if `shape` is `like:FILE`."""
    return isinstance(shape, str) and shape.startswith("like:") and len(shape) > len("like:")
