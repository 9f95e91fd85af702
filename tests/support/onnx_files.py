"""Small ONNX files as other exporters write them, and what their lowered twins must compute."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ggpass.formats import RF8, quantize
from support.onnx_runs import WAYS, check, onnx

helper, numpy_helper = onnx.helper, onnx.numpy_helper
FLOAT, HALF, INT64 = 1, 10, 7


def weight(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return torch.randn(*shape).numpy().astype(dtype)


def node(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> Any:
    return helper.make_node(op, inputs, [output], name=f"node_{output}", **attributes)


def save(
    path: Path,
    nodes: list[Any],
    inputs: dict[str, tuple[int, list[Any]]],
    constants: dict[str, np.ndarray],
    output: tuple[int, int] = (FLOAT, 2),
    opset: int = 17,
    ir_version: int = 8,
    **save_options: Any,
) -> Path:
    """A model whose output is `y`, of this type and rank."""
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info(k, kind, shape) for k, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info("y", output[0], [None] * output[1])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    onnx.save(model, path, **save_options)
    return path


def rounded(w: np.ndarray, transposed: bool) -> np.ndarray:
    """The weight that RF8 makes of w, by the formats alone."""
    matrix = torch.from_numpy(w.astype(np.float32))
    matrix = matrix.t() if transposed else matrix.flatten(1)
    q = quantize(matrix, RF8)
    values = RF8.decode(q.codes) * q.scale[:, None]
    return (values.t() if transposed else values.view(w.shape)).numpy().astype(w.dtype)


def same(path: Path, expected: Path, feed: dict[str, np.ndarray], ways: Sequence[str] = ("stock", "library")) -> None:
    """The lowered file computes what the float file with rounded weights does, to float32 rounding."""
    check(path)
    tensors = {k: torch.from_numpy(v) for k, v in feed.items()}
    (want,) = WAYS["stock"](expected, tensors)
    for way in ways:
        (got,) = WAYS[way](path, tensors)
        tolerance = 1e-5 if want.dtype is torch.float32 else 4e-3
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


def operators(path: Path) -> list[str]:
    """Our operators in a file, in If and Loop bodies too."""

    def walk(graph: Any) -> list[str]:
        found = []
        for n in graph.node:
            found += [n.op_type] if n.domain == "ai.ggpass" else []
            for attribute in n.attribute:
                found += walk(attribute.g) if attribute.type == onnx.AttributeProto.GRAPH else []
        return found

    return walk(onnx.load(path).graph)
