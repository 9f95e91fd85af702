"""The float weights of an ONNX file as a Checkpoint: `ggpass inspect` fits them as it fits those of safetensors."""

from pathlib import Path

import onnx_ir as ir
from torch import Tensor

from ggpass.errors import FormatError
from ggpass.onnx.normalize import normalize
from ggpass.onnx.reader import load
from ggpass.onnx.tensors import torch_tensor
from ggpass.onnx.weights import Weight, find_weights
from ggpass.packed.checkpoint import Checkpoint, TensorInfo

_DTYPES = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.DOUBLE: "F64",
}


class OnnxCheckpoint(Checkpoint):
    """Every floating constant of the graph; a matrix has the output channels of its use as rows, however it is stored.

    Raises:
        FormatError: not an ONNX model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        model = load(path)
        normalize(model)  # weights inside functions are weights too
        self._weights = {weight.names[0]: weight for weight in find_weights(model)}
        self.tensors = tuple(
            TensorInfo(name, _shape(weight), _DTYPES[weight.data.dtype], self.path)
            for name, weight in self._weights.items()
        )

    def read(self, name: str) -> Tensor:
        if name not in self._weights:
            raise FormatError(f"{self.path} holds no tensor {name!r}; `ggpass inspect` lists them")
        weight = self._weights[name]
        tensor = torch_tensor(weight.data)
        return tensor.t() if weight.transposed else tensor


def _shape(weight: Weight) -> tuple[int, ...]:
    shape = tuple(weight.tensor.shape)
    return shape[::-1] if weight.transposed else shape
