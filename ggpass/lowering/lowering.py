"""Lowering: which weights become codes, and how one does. The graph's and the modules' way in both end here."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ggpass.errors import FormatError, WeightError
from ggpass.formats import RF8, Format, Quantized, Scheme, quantize
from ggpass.formats.scheme import choose_scales
from ggpass.graph.weights import check_patterns, matches
from ggpass.lowering.operators import DISPATCHED, Operators

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def as_matrix(weight: Tensor, transposed: bool) -> Tensor:
    """The (N, K) view of a weight whose row n is output channel n; a convolution's other dimensions are K."""
    return weight.t() if transposed else weight.flatten(1)


@dataclass(frozen=True)
class Lowering:
    """What to lower, and into what.

    Attributes:
        format, scheme: the codes and their scales.
        only: patterns; where there are any, a weight must match one of them.
        skip: patterns of weights to leave alone; stronger than `only`.
        operators: what computes with the codes; a target's own.
        allocate: makes the memory of the codes, so that a target can place them where its kernels like them.
        aliases: every name of each of the model's matrices, by identity; a graph may know a tied one by one name only.
        free: give each float weight's memory back as soon as its codes exist (the caller's own model too).
    """

    format: Format = RF8
    scheme: Scheme = field(default_factory=Scheme)
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    operators: Operators = DISPATCHED
    allocate: Allocate | None = None
    free: bool = False
    aliases: Mapping[int, tuple[str, ...]] = field(default_factory=dict, hash=False)

    def aliases_of(self, tensor: Tensor) -> tuple[str, ...]:
        """The names that the traced model gives a tensor; none where it is not the model's own."""
        return self.aliases.get(id(tensor), ())

    def __post_init__(self) -> None:
        if not isinstance(self.scheme, Scheme):
            raise FormatError(f"scheme is a ggpass.Scheme(...), not {self.scheme!r}")
        if self.scheme.rounding not in self.format.roundings:
            known = ", ".join(sorted(self.format.roundings))
            raise FormatError(f"{self.format.name} has no rounding {self.scheme.rounding!r}; choose one of {known}")

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raise WeightError where a pattern of `only` or `skip` selects no weight: a typo would go unseen."""
        check_patterns(names, self.only, self.skip)

    def reason_to_skip(self, names: tuple[str, ...], weight: Tensor) -> str:
        """Why this weight stays as it is; empty where it can be lowered.

        Raises:
            WeightError: an integer weight or one without data, where silence would hide a broken model.
        """
        for pattern in self.skip:
            if any(matches(name, pattern) for name in names):
                return f"matches skip={pattern!r}"
        if self.only and not any(matches(name, pattern) for name in names for pattern in self.only):
            return "matches none of only=" + ", ".join(map(repr, self.only))
        dtype = str(weight.dtype).removeprefix("torch.")
        if weight.device.type == "meta":
            raise WeightError(f"weight {names[0]!r} is on the meta device and has no values; load the model first")
        if not weight.is_floating_point() and not weight.is_complex():
            raise WeightError(
                f"weight {names[0]!r} is {dtype}, and {self.format.name} encodes floating-point weights; convert it "
                f"with .float(), or leave it alone with skip=[{names[0]!r}]"
            )
        if weight.dtype not in FLOATS:
            return f"is {dtype}; the kernels compute in float32 (convert the model with .float() to lower it)"
        if weight.numel() == 0:
            return "is empty"
        return ""

    def worth_it(self, weight: Tensor, transposed: bool) -> bool:
        """Whether codes and scales together are smaller than the weight."""
        rows, columns = as_matrix(weight, transposed).shape
        scales = rows if self.scheme.granularity == "channel" else 1
        return rows * columns + 4 * scales < bytes_of(weight)

    def check_values(self, weights: Iterable[tuple[str, Tensor, bool]]) -> None:
        """Raise WeightError where a weight has no codes, before the first float weight is given up.

        Args:
            weights: name, tensor, and whether its output channels are its second dimension.
        """
        if self.free:
            for name, weight, transposed in weights:
                try:
                    choose_scales(as_matrix(weight.detach(), transposed), self.format, self.scheme)
                except FormatError as error:
                    raise WeightError(self._bad_value(name, error)) from error

    @staticmethod
    def _bad_value(name: str, reason: object) -> str:
        return f"weight {name!r} cannot be lowered: {reason}, for instance skip=[{name!r}]"

    def lower(self, name: str, weight: Tensor, transposed: bool) -> Quantized:
        """codes, scale = quantize(weight): (N, K) uint8 and (N,) or (1,) float32; see `formats.quantize`.

        Raises:
            WeightError: NaN or infinity in the weight; the message holds its name.
        """
        # Codes outlive the call: under inference_mode they would be tensors that autograd refuses later.
        with torch.inference_mode(False), torch.no_grad():
            matrix = as_matrix(weight.detach(), transposed)
            out = self.allocate(tuple(matrix.shape), torch.uint8) if self.allocate else None
            try:
                quantized = quantize(matrix, self.format, self.scheme, out)
            except FormatError as error:
                raise WeightError(self._bad_value(name, error)) from error
        if self.free:
            weight.data = weight.data.new_empty(0)
        return quantized
