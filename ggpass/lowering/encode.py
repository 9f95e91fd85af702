"""encode: a float weight to codes and scales."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ggpass.errors import FormatError, WeightError
from ggpass.formats.scheme import Quantized, choose_scales, quantize
from ggpass.graph.weights import Weight
from ggpass.lowering.decide import Lowering, rows_of


def as_matrix(weight: Tensor, transposed: bool, leading: int = 1) -> Tensor:
    """Return the (N, K) view of a weight whose row n is output channel n; a convolution's other dimensions are K."""
    return weight.t() if transposed else weight.flatten(leading).flatten(0, -2)


def _refused(name: str, reason: object) -> WeightError:
    return WeightError(f"weight {name!r} cannot be lowered: {reason}, for instance skip=[{name!r}]")


def check_values(weights: Iterable[Weight], lowering: Lowering) -> None:
    """Raise WeightError if a weight has no codes; asked before the first float weight is given up."""
    if lowering.free:
        for weight in weights:
            try:
                matrix = as_matrix(weight.tensor.detach(), weight.transposed, weight.leading)
                choose_scales(matrix, lowering.format, lowering.scheme)
            except FormatError as error:
                raise _refused(weight.name, error) from error


@dataclass(frozen=True)
class Encode:
    """codes, scale = quantize(w): (N, K) uint8 and (N,) or (1,) float32; see `formats.scheme.quantize`.

    Attributes:
        lowering: the format, its scheme, and the memory of the codes.
        name: of the weight, for errors.
        transposed: whether the weight's output channels are its second dimension.
        leading: how many dimensions count its output channels.
    """

    lowering: Lowering
    name: str
    transposed: bool
    leading: int = 1

    @property
    def key(self) -> tuple[object, ...]:
        """Return what decides the result beside the weight itself."""
        return "encode", self.lowering.format.name, self.lowering.scheme, self.transposed, self.leading

    def __call__(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a weight.

        Raises:
            WeightError: NaN or infinity in the weight; the message holds its name.
        """
        lowering = self.lowering
        # Codes outlive the call: under inference_mode they would be tensors that autograd refuses later.
        with torch.inference_mode(False), torch.no_grad():
            matrix = as_matrix(weight.detach(), self.transposed, self.leading)
            out = lowering.allocate(tuple(matrix.shape), torch.uint8) if lowering.allocate else None
            try:
                quantized = quantize(matrix, lowering.format, lowering.scheme, out)
            except FormatError as error:
                raise _refused(self.name, error) from error
        return quantized.codes, quantized.scale

    def empty(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return tensors of the result's shapes and dtypes, on the weight's device."""
        rows, columns = rows_of(weight.shape, self.transposed, self.leading)
        scales = rows if self.lowering.scheme.granularity == "channel" else 1
        return weight.new_empty(rows, columns, dtype=torch.uint8), weight.new_empty(scales, dtype=torch.float32)


def encode(weight: Weight, lowering: Lowering) -> Quantized:
    """Return the codes and scales of a weight.

    Raises:
        WeightError: NaN or infinity in the weight; the message holds its name.
    """
    return Quantized(*Encode(lowering, weight.name, weight.transposed, weight.leading)(weight.tensor))


def release(weight: Weight, lowering: Lowering) -> None:
    """Give the memory of a float weight back, with `lowering.free`; its codes are in its place."""
    if lowering.free:
        weight.tensor.data = weight.tensor.data.new_empty(0)
