"""An ONNX file as `ggpass inspect` reads it: float weights as a Checkpoint, and H = −Σ p_c log2 p_c of stored codes."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from ggpass.errors import FormatError
from ggpass.inspection.packed import StoredWeight, total
from ggpass.onnx.names import DOMAIN
from ggpass.onnx.normalize import normalize
from ggpass.onnx.reader import load
from ggpass.onnx.tensors import files_of, tensor_bytes, torch_tensor
from ggpass.onnx.weights import find_weights
from ggpass.packed.checkpoint import Checkpoint, TensorInfo
from ggpass.packed.codec.model import histogram
from ggpass.packed.dtypes import name_of


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
            TensorInfo(name, tuple((w.tensor.t() if w.transposed else w.tensor).shape), name_of(w.tensor), self.path)
            for name, w in self._weights.items()
        )

    def read(self, name: str) -> Tensor:
        if name not in self._weights:
            raise FormatError(f"{self.path} holds no tensor {name!r}; `ggpass inspect` lists them")
        weight = self._weights[name]
        tensor = torch_tensor(weight.data)
        return tensor.t() if weight.transposed else tensor


@dataclass(frozen=True)
class QuantizedTensor(StoredWeight):
    """The codes of one weight, a byte each.

    Attributes:
        operators: what computes with them, each name once.
        uses: how many nodes do; more than one for tied weights.
    """

    operators: tuple[str, ...] = ()
    uses: int = 1


@dataclass(frozen=True)
class QuantizedFile:
    """What `ggpass inspect` shows of an exported file.

    Attributes:
        opset: of the standard operators.
        file_bytes: of the model and of what lies beside it.
        fallback: whether the operators have bodies for runtimes without our library.
        other_bytes: of all tensors that are not codes: scales, biases, norms.
    """

    opset: int
    file_bytes: int
    fallback: bool
    tensors: tuple[QuantizedTensor, ...]
    other_bytes: int

    @property
    def total(self) -> StoredWeight:
        """Return all codes as one."""
        return total(self.tensors)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        tensors = [tensor.as_dict() for tensor in self.tensors]
        return {**asdict(self), "tensors": tensors, "entropy": self.total.entropy}


def is_coded(model: ir.Model) -> bool:
    """Return True if a model computes with our operators."""
    return any(node.domain == DOMAIN for node in model.graph.all_nodes())


def measure(path: Path, progress: Callable[[str], None] = lambda name: None) -> QuantizedFile:
    """Read every code of a file once.

    Raises:
        FormatError: not an ONNX model, or codes that are computed rather than stored.
    """
    model = load(path)
    users: dict[ir.Value, list[str]] = {}
    for node in model.graph.all_nodes():
        if node.domain == DOMAIN:
            codes = node.inputs[0 if node.op_type.endswith("Dequantize") else 1]
            if codes is None or codes.const_value is None:
                raise FormatError(f"{path}: the codes of {node.name!r} are no constant; export the model again")
            users.setdefault(codes, []).append(node.op_type)
    tensors = []
    for value, used in users.items():
        name, tensor = str(value.name), value.const_value
        progress(name)
        assert tensor is not None
        shape = tuple(int(size) for size in tensor.shape.numpy())
        if tensor.dtype is not ir.DataType.UINT8 or len(shape) != 2:
            raise FormatError(f"{path}: codes are (N, K) uint8, and {name!r} is {tensor.dtype.name} {shape}")
        bits = histogram(np.ascontiguousarray(tensor.numpy())).bits
        operators = tuple(dict.fromkeys(used))
        tensors.append(QuantizedTensor(name, "codes", shape, tensor.size, bits * tensor.size / 8, operators, len(used)))
    return QuantizedFile(
        opset=model.opset_imports.get("", 0),
        file_bytes=sum(file.stat().st_size for file in files_of(path, model)),
        fallback=any(domain == DOMAIN for domain, _, _ in model.functions),
        tensors=tuple(tensors),
        other_bytes=tensor_bytes(model) - sum(tensor.bytes for tensor in tensors),
    )
