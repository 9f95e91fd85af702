"""H = −Σ p_c log2 p_c of the codes of each weight in an exported file, and what else the file holds."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ggpass.errors import FormatError
from ggpass.inspection.packed import StoredWeight, total
from ggpass.onnx.names import DOMAIN
from ggpass.onnx.reader import load
from ggpass.onnx.tensors import bytes_of, tensor_bytes
from ggpass.packed.codec.model import histogram


@dataclass(frozen=True)
class CodedTensor(StoredWeight):
    """The codes of one weight, a byte each.

    Attributes:
        operators: what computes with them, each name once.
        uses: how many nodes do; more than one for tied weights.
    """

    operators: tuple[str, ...] = ()
    uses: int = 1


@dataclass(frozen=True)
class CodedFile:
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
    tensors: tuple[CodedTensor, ...]
    other_bytes: int

    @property
    def total(self) -> StoredWeight:
        """All codes as one."""
        return total(self.tensors)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        tensors = [tensor.as_dict() for tensor in self.tensors]
        return {**asdict(self), "tensors": tensors, "entropy": self.total.entropy}


def is_coded(model: ir.Model) -> bool:
    """Whether a model computes with our operators."""
    return any(node.domain == DOMAIN for graph in model.graphs() for node in graph)


def measure(path: Path, progress: Callable[[str], None] = lambda name: None) -> CodedFile:
    """Read every code of a file once.

    Raises:
        FormatError: not an ONNX model, or codes that are computed rather than stored.
    """
    model = load(path)
    users: dict[str, list[str]] = {}
    values: dict[str, ir.Value] = {}
    for graph in model.graphs():
        for node in graph:
            if node.domain == DOMAIN:
                codes = node.inputs[0 if node.op_type.endswith("Dequantize") else 1]
                if codes is None or codes.const_value is None:
                    raise FormatError(f"{path}: the codes of {node.name!r} are no constant; export the model again")
                users.setdefault(str(codes.name), []).append(node.op_type)
                values[str(codes.name)] = codes
    tensors = []
    for name, value in values.items():
        progress(name)
        tensor = value.const_value
        assert tensor is not None
        shape = tuple(int(size) for size in tensor.shape.numpy())
        if tensor.dtype is not ir.DataType.UINT8 or len(shape) != 2:
            raise FormatError(f"{path}: codes are (N, K) uint8, and {name!r} is {tensor.dtype.name} {shape}")
        bits = histogram(np.ascontiguousarray(tensor.numpy())).bits
        used = users[name]
        operators = tuple(dict.fromkeys(used))
        tensors.append(CodedTensor(name, "codes", shape, tensor.size, bits * tensor.size / 8, operators, len(used)))
    return CodedFile(
        opset=model.opset_imports.get("", 0),
        file_bytes=bytes_of(path, model),
        fallback=any(domain == DOMAIN for domain, _, _ in model.functions),
        tensors=tuple(tensors),
        other_bytes=tensor_bytes(model) - sum(tensor.bytes for tensor in tensors),
    )
