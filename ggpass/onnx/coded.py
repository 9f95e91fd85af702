"""codes, scale = quantize(weight) at the moment they are written: a constant of an ONNX graph as two lazy tensors."""

import warnings

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ggpass.lowering.decide import Lowering
from ggpass.lowering.encode import Encode
from ggpass.onnx.weights import Weight


def torch_tensor(tensor: ir.TensorProtocol) -> Tensor:
    """The data of a constant, without a copy where it is mapped from a file; read only."""
    array = tensor.numpy()
    if tensor.dtype is ir.DataType.BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    with warnings.catch_warnings():
        # torch warns that a mapped array cannot be written to; nothing here writes to a weight.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.ascontiguousarray(array))


class CodedWeight:
    """A weight that becomes codes and scales when the file is written, so that one weight at a time is in memory.

    Raises:
        WeightError: from `codes`, where the weight holds NaN or infinity.
    """

    def __init__(self, weight: Weight, lowering: Lowering) -> None:
        self.weight = weight
        self.lowering = lowering
        self.transposed = next(use.transposed for use in weight.uses)
        shape = weight.shape
        self.rows = shape[1] if self.transposed else shape[0]
        self.columns = int(np.prod(shape)) // self.rows
        self._scale: Tensor | None = None

    @property
    def scales(self) -> int:
        """How many scales there are."""
        return self.rows if self.lowering.scheme.granularity == "channel" else 1

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.rows * self.columns + 4 * self.scales

    def worth_it(self) -> bool:
        """Whether they are smaller than the weight."""
        return self.nbytes < self.weight.tensor.nbytes

    def values(self) -> tuple[ir.Value, ir.Value]:
        """The initializers codes and scale, not computed yet."""
        codes_name, scale_name = f"{self.weight.name}_codes", f"{self.weight.name}_scale"
        codes = ir.LazyTensor(
            lambda: ir.tensor(self._codes().numpy(), name=codes_name),
            dtype=ir.DataType.UINT8,
            shape=ir.Shape([self.rows, self.columns]),
            name=codes_name,
        )
        scale = ir.LazyTensor(
            lambda: ir.tensor(self._scales().numpy(), name=scale_name),
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape([self.scales]),
            name=scale_name,
        )
        return tuple(constant(tensor) for tensor in (codes, scale))  # type: ignore[return-value]

    def _codes(self) -> Tensor:
        matrix = torch_tensor(self.weight.tensor)
        codes, self._scale = Encode(self.lowering, self.weight.name, self.transposed)(matrix)
        return codes

    def _scales(self) -> Tensor:
        if self._scale is None:
            self._codes()
        assert self._scale is not None
        return self._scale


def constant(tensor: ir.TensorProtocol) -> ir.Value:
    """A value for an initializer that holds this tensor."""
    shape = ir.Shape([int(size) for size in tensor.shape.numpy()])
    return ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=shape)
