"""Models of one node or a few, made by hand, for the tests of the custom-op library."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from ggpass.errors import GgpassError
from ggpass.formats import FORMATS
from ggpass.onnx.names import operator_name, takes_codebook
from ggpass.onnxruntime.library import library_path

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

helper, TensorProto = onnx.helper, onnx.TensorProto

#: The codebook of every format, and one that no kernel knows: gathered from the table.
CODEBOOKS = {
    **{name: torch.where(torch.isfinite(f.codebook), f.codebook, 0.0) for name, f in FORMATS.items()},
    "any": torch.randn(256, generator=torch.Generator().manual_seed(1)),
}


def library() -> str:
    """The library's path; skips with the reason where this installation has none."""
    try:
        return str(library_path())
    except GgpassError as reason:
        pytest.skip(str(reason))


def value(name: str, dtype: int, shape: Sequence[int | str | None] | None = None) -> Any:
    """A graph input or output; no shape means no rank either."""
    return helper.make_tensor_value_info(name, dtype, shape)


def initializer(name: str, array: np.ndarray) -> Any:
    """A weight in the file."""
    return onnx.numpy_helper.from_array(array, name)


def node(op: str, inputs: Sequence[str], output: str = "y", name: str = "here", **attributes: Any) -> Any:
    """A node of ours."""
    return helper.make_node(op, list(inputs), [output], domain="ai.ggpass", name=name, **attributes)


def model(nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], weights: Sequence[Any] = ()) -> Any:
    """A whole model."""
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), list(weights))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.ggpass", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session(proto: Any, threads: int = 2) -> Any:
    """A session with the library registered; `proto` is a model or a path."""
    options = ort.SessionOptions()
    options.register_custom_ops_library(library())
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are expected, and come as exceptions
    source = proto if isinstance(proto, str) else proto.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(proto: Any, threads: int = 2, **feeds: np.ndarray) -> np.ndarray:
    """The first output."""
    return session(proto, threads).run(None, feeds)[0]


class Weights:
    """Random codes of a format, a scale for each row, and the initializers and input names that a node takes."""

    def __init__(self, name: str, rows: int, columns: int, *, one_scale: bool = False, aliases: bool = False) -> None:
        self.codebook = CODEBOOKS[name]
        every = torch.arange(256, dtype=torch.uint8)
        allowed = FORMATS[name].emitted if name in FORMATS and not aliases else every
        self.codes = allowed[torch.randint(len(allowed), (rows, columns))]
        # The largest weight becomes a value between 1/2 and 3/2, so that float16 holds the products of every format.
        self.scale = (torch.rand(1 if one_scale else rows) + 0.5) / self.codebook.abs().max()
        #: Roundings of a decoded weight beyond the product with its scale: see `Decoder.unit`.
        self.extra_roundings = 2 if name in FORMATS and FORMATS[name].decoder.unit != 1 else 0
        self.operators = operator_name(name, "")
        self.names = ["codes", "scale", *(["codebook"] if takes_codebook(name) else [])]
        tensors = {"codes": self.codes, "scale": self.scale, "codebook": self.codebook}
        self.initializers = [initializer(name, tensors[name].numpy()) for name in self.names]

    @property
    def values(self) -> torch.Tensor:
        """codebook[codes], without the scale; float32."""
        return self.codebook[self.codes.long()]
