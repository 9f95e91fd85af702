"""Lowering, decide: which weights become codes, and into what. Graphs, modules and files all ask here."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ggpass.errors import FormatError, WeightError
from ggpass.formats.base import Format
from ggpass.formats.rf8 import RF8
from ggpass.formats.scheme import Scheme
from ggpass.graph.report import Change, Report, Skip
from ggpass.graph.weights import Selection, Weight, dtype_name
from ggpass.lowering.operators import DISPATCHED, Operators

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]

#: The dtypes whose products the kernels form exactly enough: they compute in float32.
QUANTIZED = (torch.float32, torch.bfloat16, torch.float16)


def rows_of(shape: Sequence[int], transposed: bool, leading: int = 1) -> tuple[int, int]:
    """Return (N, K) of a weight's codes: N output channels, of K elements each; `leading` dimensions count channels."""
    rows, columns = math.prod(shape[:leading]), math.prod(shape[leading:])
    return (columns, rows) if transposed else (rows, columns)


@dataclass(frozen=True)
class Lowering:
    """What to lower, and into what.

    Attributes:
        format, scheme: the codes and their scales.
        only: patterns; if there are any, a weight must match one of them.
        skip: patterns of weights to leave alone; stronger than `only`.
        operators: what computes with the codes; a target's own.
        allocate: makes the memory of the codes, so that a target can place them where its kernels like them.
        check: raises if a weight, given its name, cannot be lowered where it lies.
        free: give each float weight's memory back as soon as its codes exist (the caller's own model too).
    """

    format: Format = RF8
    scheme: Scheme = field(default_factory=Scheme)
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    operators: Operators = DISPATCHED
    allocate: Allocate | None = None
    check: Callable[[str, Tensor], None] | None = None
    free: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.scheme, Scheme):
            raise FormatError(f"scheme is a ggpass.Scheme(...), not {self.scheme!r}")
        if self.scheme.rounding not in self.format.roundings:
            known = ", ".join(sorted(self.format.roundings))
            raise FormatError(f"{self.format.name} has no rounding {self.scheme.rounding!r}; choose one of {known}")

    @property
    def selection(self) -> Selection:
        """Return the patterns as one value."""
        return Selection(self.only, self.skip)

    def bytes_of_codes(self, weight: Weight) -> int:
        """Return the bytes of a weight's codes and scales."""
        rows, columns = rows_of(weight.tensor.shape, weight.transposed, weight.leading)
        return rows * columns + 4 * (rows if self.scheme.granularity == "channel" else 1)

    def change(self, weight: Weight) -> Change:
        """Return the report's line of a weight that is about to be lowered: `384×384 float32 → rf8`, and the bytes."""
        shape = "×".join(map(str, weight.tensor.shape))
        what = f"{shape} {dtype_name(weight.tensor)} → {self.format.name}"
        return Change(weight.title, what, weight.nbytes, self.bytes_of_codes(weight))


def reason_to_keep(weight: Weight, lowering: Lowering) -> str:
    """Return the reason why a matrix stays a float matrix, or ''.

    Raises:
        WeightError: an integer weight or one without values; silence would hide a broken model.
    """
    tensor = weight.tensor
    reason = lowering.selection.reason(weight.names)
    if not reason and (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype not in QUANTIZED:
        name = dtype_name(tensor)
        reason = f"is {name}; the kernels compute in float32 (convert the model with .float() to lower it)"
    reason = reason or weight.reason_of_uses() or weight.reason_of_layout()
    if reason:
        return reason
    if not tensor.is_floating_point():
        raise WeightError(
            f"weight {weight.name!r} is {dtype_name(tensor)}, and {lowering.format.name} encodes floating-point "
            f"weights; convert it with .float(), or leave it alone with skip=[{weight.name!r}]"
        )
    reason = weight.reason_of_kind()
    if not reason and lowering.bytes_of_codes(weight) >= weight.nbytes:
        reason = "codes and scales would be no smaller"
    return reason or weight.reason_of_values()


def decide(weights: Iterable[Weight], lowering: Lowering, report: Report) -> list[Weight]:
    """Return the weights to lower, small ones first, and report every other float tensor with its reason.

    Small ones come first so that, with `lowering.free`, their memory is back before the largest needs room for codes.

    Args:
        weights: of a model, vectors and buffers too.
        lowering: what to lower.
        report: gets a Skip for each weight that stays.

    Raises:
        WeightError: an integer weight, or one without values.
        TargetError: a weight that is not on the target's device.
    """
    chosen = []
    for weight in weights:
        parameter = weight.lazy or isinstance(weight.tensor, torch.nn.Parameter)
        if not weight.is_matrix or not parameter:
            if weight.tensor.is_floating_point():
                report.skips.append(_skip_of_no_matrix(weight))
            continue
        reason = reason_to_keep(weight, lowering)
        if reason:
            report.skips.append(Skip(weight.name, reason, weight.nbytes))
            continue
        if lowering.check is not None:
            lowering.check(weight.name, weight.tensor)
        chosen.append(weight)
    return sorted(chosen, key=lambda weight: weight.tensor.numel())


def _skip_of_no_matrix(weight: Weight) -> Skip:
    if not weight.is_matrix:
        return Skip(weight.name, weight.reason_of_kind(), weight.nbytes, matrix=False)
    # A buffer that is used as weights are counts as a matrix: leaving it out would make the share look better.
    matrix = any(use.kind is not None for use in weight.uses)
    return Skip(weight.name, "a buffer, not a parameter", weight.nbytes, matrix=matrix)
