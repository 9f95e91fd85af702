"""Program → ONNX: the lowered graph through torch.onnx.export, its ggpass operators as nodes of `ai.ggpass`."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ggpass.errors import TargetError, TraceError
from ggpass.graph.program import Program
from ggpass.onnx import schema
from ggpass.onnx.names import DOMAIN, VERSION, operator_name, takes_codebook
from ggpass.onnx.normalize import drop_metadata


@dataclass(frozen=True)
class Exported:
    """A Program as ONNX, and what the file must compute.

    Attributes:
        model: without functions yet; values carry the names of `reference`'s nodes.
        reference: the graph it was made from: flat inputs, a flat tuple of outputs.
        inputs: the example inputs by name.
    """

    model: ir.Model
    reference: fx.GraphModule
    inputs: dict[str, Tensor]


def from_program(program: Program, leaves: list[Any], format_name: str, opset: int) -> Exported:
    """Return the ONNX model of a lowered Program.

    Args:
        program: lowered with `ops.DISPATCHED`.
        leaves: the example inputs it was traced with, flattened.
        format_name: of the codes.
        opset: of the standard operators.

    Raises:
        TargetError: a dtype that ONNX Runtime does not compute with.
        TraceError: torch.onnx cannot export it; says what broke.
    """
    _check_dtypes(program)
    schema.register()
    flat, inputs = flatten(program, leaves)
    sizes = tuple(_dynamic(node) for node in flat.graph.nodes if node.op == "placeholder")
    try:
        with torch.no_grad(), _quiet():
            exported = torch.export.export(flat, tuple(inputs.values()), dynamic_shapes=sizes)
            result = torch.onnx.export(
                exported,
                tuple(inputs.values()),
                dynamo=True,
                opset_version=opset,
                input_names=list(inputs),
                output_names=output_names(program, inputs),
                custom_translation_table=translations(format_name),
                verbose=False,
            )
    except Exception as error:  # torch.onnx raises whatever its passes and the operators' translations raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise TraceError(
            f"torch.onnx could not export the lowered graph: {type(error).__name__}: {reason.strip()}; try another "
            "opset=, or leave the weights at that place float with skip="
        ) from error
    assert result is not None  # dynamo=True returns a program
    drop_metadata(result.model)  # kilobytes of file paths of the exporting machine
    result.model.metadata_props.clear()
    return Exported(result.model, exported.module(check_guards=False), inputs)


def flatten(program: Program, leaves: list[Any]) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """f(args, kwargs) → f'(tensor, …) = (tensor, …): the same graph without its pytrees, and its inputs by name.

    Inputs that are no tensors were baked in by the trace, and outputs that are none are no outputs of an ONNX file.
    """
    graph = fx.Graph()  # with fx's plain code generator, which knows no pytrees
    returned = graph.graph_copy(program.graph, {})
    inputs: dict[str, Tensor] = {}
    for node, leaf in zip([n for n in graph.nodes if n.op == "placeholder"], leaves):
        if isinstance(leaf, Tensor):
            inputs[str(node.target)] = leaf
        else:
            graph.erase_node(node)
    graph.output(tuple(leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, fx.Node)))
    return fx.GraphModule(program.graph_module, graph), inputs


def output_names(program: Program, taken: dict[str, Tensor]) -> list[str]:
    """Return a name for each tensor that the model returns: its key where it has one, as `last_hidden_state`."""
    output = next(n for n in program.graph.nodes if n.op == "output")
    spec = getattr(program.graph_module, "_out_spec", None)
    leaves = pytree.tree_leaves(output.args[0])
    names = list(_names(spec, "")) if spec is not None else [str(i) for i in range(len(leaves))]
    chosen: list[str] = []
    for name, leaf in zip(names, leaves):
        if isinstance(leaf, fx.Node):
            name = name if name and not name[0].isdigit() else f"output_{name}".rstrip("_")
            chosen.append(f"{name}_output" if name in taken else name)
    return chosen


def _names(spec: pytree.TreeSpec, prefix: str) -> Iterator[str]:
    if not spec.children():
        # A leaf has no type; an empty container has one, and no leaves.
        if spec.type is None:
            yield prefix
        return
    keys = spec.context if isinstance(spec.context, list | tuple) else getattr(spec.context, "_fields", ())
    if len(keys) != len(spec.children()) or not all(isinstance(key, str) for key in keys):
        keys = range(len(spec.children()))
    for key, child in zip(keys, spec.children()):
        yield from _names(child, f"{prefix}_{key}" if prefix else str(key))


def _dynamic(node: fx.Node) -> dict[int, Any]:
    """Return the open dimensions of an input, as the first trace left them."""
    return {i: torch.export.Dim.AUTO for i, size in enumerate(node.meta["val"].shape) if not isinstance(size, int)}


def _check_dtypes(program: Program) -> None:
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dtype is torch.bfloat16:
            raise TargetError(
                f"{node.name} is bfloat16, and ONNX Runtime has no bfloat16 arithmetic on the CPU; export the model in "
                "float32 or float16 (model.float(), model.half()): the codes take 8 bits either way"
            )


def translations(format_name: str) -> dict[Callable[..., Any], Callable[..., Any]]:
    """ggpass operator → the ONNX node that computes it, for torch.onnx's custom_translation_table."""
    domain = onnxscript.values.Opset(DOMAIN, VERSION)
    ggpass, whole = torch.ops.ggpass, takes_codebook(format_name)
    matmul, gather, dequantize = (
        getattr(domain, operator_name(format_name, name)) for name in ("MatMul", "Gather", "Dequantize")
    )

    def coded(codes: Any, scale: Any, codebook: Any) -> tuple[Any, ...]:
        return (codes, scale, codebook) if whole else (codes, scale)

    def linear(x: Any, codes: Any, scale: Any, codebook: Any, bias: Any = None) -> Any:
        return matmul(x, *coded(codes, scale, codebook), bias)

    def embedding(ids: Any, codes: Any, scale: Any, codebook: Any, dtype: int) -> Any:
        return gather(ids, *coded(codes, scale, codebook), to=int(dtype))

    def decode(codes: Any, scale: Any, codebook: Any, dtype: int) -> Any:
        return dequantize(*coded(codes, scale, codebook), to=int(dtype))

    return {ggpass.linear.default: linear, ggpass.embedding.default: embedding, ggpass.dequantize.default: decode}


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx warns of every operator library that is not installed; errors still come through."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
