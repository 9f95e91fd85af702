"""codes, scale = quantize(weight) at the moment they are written: a constant of an ONNX graph as two lazy tensors."""

import warnings

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ggpass.formats.scheme import row_blocks
from ggpass.lowering.decide import Lowering, rows_of
from ggpass.lowering.encode import Encode
from ggpass.onnx.names import Names
from ggpass.onnx.tensors import constant
from ggpass.onnx.weights import Weight


def torch_tensor(tensor: ir.TensorProtocol) -> Tensor:
    """The data of a constant, without a copy if it is mapped from a file; read only."""
    array = tensor.numpy()
    if tensor.dtype is ir.DataType.BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    with warnings.catch_warnings():
        # torch warns that a mapped array cannot be written to; nothing here writes to a weight.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.ascontiguousarray(array))


class LazyCodes:
    """A weight that becomes codes and scales when the file is written, so that one weight at a time is in memory.

    Attributes:
        weight: the constant.
        rows, columns: the shape of the codes.

    Raises:
        WeightError: when it is written, if the weight holds NaN or infinity.
    """

    def __init__(self, weight: Weight, lowering: Lowering) -> None:
        self.weight = weight
        self.lowering = lowering
        self.rows, self.columns = rows_of(weight.matrix, weight.transposed)
        self.scales = self.rows if lowering.scheme.granularity == "channel" else 1
        self._scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.rows * self.columns + 4 * self.scales

    def values(self, names: Names) -> list[ir.Value]:
        """The initializers codes and scale, not computed yet."""
        codes_name, scale_name = names.new(f"{self.weight.name}_codes"), names.new(f"{self.weight.name}_scale")
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
        return [constant(codes), constant(scale)]

    def _codes(self) -> Tensor:
        matrix = torch_tensor(self.weight.tensor).reshape(self.weight.matrix)
        codes, self._scale = Encode(self.lowering, self.weight.name, self.weight.transposed)(matrix)
        return codes

    def _scales(self) -> Tensor:
        if self._scale is None:
            self._codes()
        assert self._scale is not None
        return self._scale


def reason_of_values(weight: Weight) -> str:
    """Return the reason why a weight's values should have no codes, or ''. NaN is left for the encoder to refuse.

    Infinity stands for a mask or padding. A constant under Add or Mul with few values is a grid or a mask too, such as
    positions of anchors: a relative error in them moves the result, and they are small beside weights.
    """
    matrix = torch_tensor(weight.tensor).reshape(weight.matrix)
    blocks = row_blocks(*matrix.shape)
    for start in blocks:
        infinite = matrix[start : start + blocks.step].isinf()
        if infinite.any():
            row, column = (int(i) for i in infinite.nonzero()[0])
            return (
                f"holds {matrix[start + row, column].item()} (row {start + row}), which has no code: a mask or padding"
            )
    some = matrix.flatten()[: blocks.step * matrix.shape[1]]
    if not weight.learned and 4 * len(some.unique()) < some.numel():
        return "holds few values for its size: a grid or a mask, not weights"
    return ""
