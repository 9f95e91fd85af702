"""Any ONNX model → the same with 8-bit weights: MatMul, Gemm, Gather and Conv with constant weights become our nodes.

1. A constant is lowered at all its uses or at none; what it feeds through Transpose, Cast and Identity counts as one.
2. MatMul(x, W) and Gemm(x, W or Wᵀ) become MatMul nodes, with a constant that is added behind as their bias.
3. Gather along rows becomes Gather; a Conv that has no coded twin gets its weight from Dequantize.
4. Bodies of If and Loop are part of the model; a constant belongs to the graph that holds it.
5. Everything else stays, and is reported with its reason.
6. Weights are read, coded and written one at a time.
"""

from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter
import onnx_ir as ir
import torch

from ggpass.errors import FormatError, InputError
from ggpass.graph import weights as graph_weights
from ggpass.graph.report import Change, Report, Skip
from ggpass.lowering import decide
from ggpass.lowering.decide import Lowering
from ggpass.onnx import schema
from ggpass.onnx.bodies import MIN_OPSET, Fallback
from ggpass.onnx.coded import CodedWeight, constant
from ggpass.onnx.complete import coded_conv, complete, conv_reason, replace
from ggpass.onnx.names import DOMAIN, operator_name
from ggpass.onnx.reader import bytes_of, files_of, load
from ggpass.onnx.save import attach_functions, check_path, data_path, save
from ggpass.onnx.weights import Kind, Use, Weight, find_weights

_TORCH = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
}


_KINDS = {
    Kind.MATMUL: graph_weights.Kind.LINEAR,
    Kind.GEMM: graph_weights.Kind.LINEAR,
    Kind.GATHER: graph_weights.Kind.EMBEDDING,
    Kind.CONV: graph_weights.Kind.CONV,
}


def lower_file(
    path_in: str | Path,
    path_out: str | Path,
    lowering: Lowering,
    *,
    fallback: Fallback | None,
    external_data: bool | None,
) -> Report:
    """See `ggpass.lower_onnx`."""
    path_in, path_out = Path(path_in), check_path(path_out)
    model = load(path_in)
    taken = {file.resolve() for file in files_of(path_in, model)}
    if not taken.isdisjoint({path_out.resolve(), data_path(path_out).resolve()}):
        raise InputError(f"{path_out} would overwrite the model itself; write to another file")
    before = bytes_of(path_in, model)
    report = Report("LowerOnnx")
    model = _with_opset(model, MIN_OPSET, path_in, report) if fallback else model
    lower_model(model, lowering, report)
    attach_functions(model, fallback)
    written = save(model, path_out, external_data)
    report.notes.append(f"{path_out.name}: {written} bytes, {written / before:.3f} of {path_in.name}")
    return report


def lower_model(model: ir.Model, lowering: Lowering, report: Report) -> None:
    """Rewrite a model in place; codes are computed when it is written.

    Raises:
        WeightError: a pattern that matches nothing, or an integer weight.
    """
    schema.register()
    _drop_initializer_inputs(model)
    weights = find_weights(model)
    lowering.selection.check(name for w in weights if len(w.shape) >= 2 for name in w.names)
    coder = _Rewriter(model, lowering)
    for weight in weights:
        nbytes = weight.tensor.nbytes
        if len(weight.shape) < 2:
            reason = f"{len(weight.shape)}-D (bias, norm): stays as it is"
            report.skips.append(Skip(weight.title, reason, nbytes, matrix=False))
            continue
        reason = reason_to_keep(weight, lowering)
        if reason:
            report.skips.append(Skip(weight.title, reason, nbytes))
        else:
            report.changes.append(coder.lower(weight))
    complete(model)
    for graph in model.graphs():
        _remove_unread(graph)


def reason_to_keep(weight: Weight, lowering: Lowering) -> str:
    """Return the reason why a constant stays as it is, or ''."""
    if weight.value.is_graph_input():
        return "an input with a default, which a caller may override"
    tensor = torch.empty(weight.shape, dtype=_TORCH[weight.tensor.dtype], device="meta")
    uses = tuple(
        graph_weights.Use(
            use.node or weight.value, None if use.kind is None else _KINDS[use.kind], use.transposed, use.reason
        )
        for use in weight.uses
    )
    return decide.reason_to_keep(graph_weights.Weight(weight.names, tensor, uses, lazy=True), lowering)


class _Rewriter:
    """Puts coded nodes in the place of float ones."""

    def __init__(self, model: ir.Model, lowering: Lowering) -> None:
        self.model = model
        self.lowering = lowering
        self.codebook: ir.Value | None = None

    def lower(self, weight: Weight) -> Change:
        """Codes for one weight, at all its uses."""
        coded = CodedWeight(weight, self.lowering)
        graph = weight.value.graph
        if graph is None:
            raise FormatError(f"constant {weight.name!r} belongs to no graph; export the model again")
        operands = list(coded.values())
        for value in operands:
            graph.register_initializer(value)
        if self.lowering.format.name != "rf8":
            operands.append(self._codebook())
        for use in weight.uses:
            self._rewrite(use, operands, weight)
        shape = "×".join(map(str, weight.shape))
        what = f"{shape} {weight.tensor.dtype.name.lower()} → {self.lowering.format.name}"
        return Change(weight.title, what, weight.tensor.nbytes, coded.nbytes)

    def _operator(self, operation: str) -> str:
        return operator_name(self.lowering.format.name, operation)

    def _codebook(self) -> ir.Value:
        if self.codebook is None:
            name = f"ggpass_{self.lowering.format.name}_codebook"
            self.codebook = constant(ir.tensor(self.lowering.format.codebook.numpy(), name=name))
            self.model.graph.register_initializer(self.codebook)
        return self.codebook

    def _rewrite(self, use: Use, operands: list[ir.Value], weight: Weight) -> None:
        node, kind = use.node, use.kind
        assert node is not None
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        if kind is Kind.GATHER:
            to = ir.AttrInt64("to", int(use.dtype))
            new = ir.Node(DOMAIN, self._operator("Gather"), [node.inputs[1], *operands], [to], name=node.name)
            replace(graph, node, new)
        elif kind is Kind.CONV:
            self._convolution(graph, node, operands, weight, use.dtype)
        else:
            self._matmul(graph, node, operands, weight.shape[1 if use.transposed else 0])

    def _convolution(
        self, graph: ir.Graph, node: ir.Node, operands: list[ir.Value], weight: Weight, dtype: ir.DataType
    ) -> None:
        kernel = list(weight.shape[2:])
        if not conv_reason(node, kernel):
            replace(graph, node, coded_conv(node, self._operator("Conv"), operands, kernel))
            return
        to = ir.AttrInt64("to", int(dtype))
        decode = ir.Node(DOMAIN, self._operator("Dequantize"), operands, [to], name=f"{node.name}_dequantize")
        decode.outputs[0].name = f"{node.outputs[0].name}_flat_weight"
        shape = constant(ir.tensor(np.array(weight.shape, np.int64), name=f"{node.outputs[0].name}_weight_shape"))
        graph.register_initializer(shape)
        whole = ir.Node("", "Reshape", [decode.outputs[0], shape], name=f"{node.name}_reshape")
        whole.outputs[0].name = f"{node.outputs[0].name}_weight"
        graph.insert_before(node, [decode, whole])
        node.replace_input_with(1, whole.outputs[0])

    def _matmul(self, graph: ir.Graph, node: ir.Node, operands: list[ir.Value], channels: int) -> None:
        """MatMul, MatMul and Add, or Gemm: one node, and an Add where what is added is no bias."""
        added = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        last = node
        if node.op_type == "MatMul":
            add = _only_user(node)
            if add is not None and add.op_type == "Add" and add.graph is graph:
                other = next((v for v in add.inputs if v is not node.outputs[0]), None)
                if _is_bias(other, channels):
                    added, last = other, add
        bias = added if _is_bias(added, channels) else None
        inputs = [node.inputs[0], *operands, *([bias] if bias is not None else [])]
        new = ir.Node(DOMAIN, self._operator("MatMul"), inputs, name=node.name)
        if added is not None and bias is None:
            new.outputs[0].name = f"{node.outputs[0].name}_product"
            graph.insert_before(node, new)
            new = ir.Node("", "Add", [new.outputs[0], added], name=f"{node.name}_add")
        replace(graph, last, new)
        if last is not node:
            graph.remove(node, safe=True)


def _only_user(node: ir.Node) -> ir.Node | None:
    """The node that alone reads the result; None where others do, or the graph returns it."""
    users = list(node.outputs[0].uses())
    return users[0].node if len(users) == 1 and not node.outputs[0].is_graph_output() else None


def _is_bias(value: ir.Value | None, channels: int) -> bool:
    """Whether a value is a constant with one number for each output channel."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return tensor is not None and tuple(tensor.shape.numpy()) == (channels,)


def _drop_initializer_inputs(model: ir.Model) -> None:
    """Before IR version 4 every initializer was listed as an input; later that means that a caller may override it."""
    if model.ir_version < 4:
        graph = model.graph
        kept = [value for value in graph.inputs if value.name not in graph.initializers]
        graph.inputs.clear()
        graph.inputs.extend(kept)


def _remove_unread(graph: ir.Graph) -> None:
    """Erase what passed the float weights on, and the weights themselves."""
    for node in reversed(list(graph)):
        passes_on = node.op_type in ("Transpose", "Cast", "Identity", "Constant") and node.domain in ("", "ai.onnx")
        if passes_on and not any(v.uses() or v.is_graph_output() for v in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            del graph.initializers[name]


def _with_opset(model: ir.Model, least: int, path: Path, report: Report) -> ir.Model:
    """The model in at least that opset.

    Raises:
        FormatError: onnx's converter cannot do it.
    """
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    if opset >= least:
        return model
    try:
        converted = onnx.version_converter.convert_version(onnx.load(path), least)
    except Exception as error:  # the converter raises RuntimeError and others, one for each operator
        raise FormatError(
            f"{path} has opset {opset}, the fallback needs {least}, and onnx cannot convert it "
            f"({' '.join(str(error).split())[:200]}); export it with a newer opset, or give fallback=None"
        ) from error
    report.notes.append(f"converted from opset {opset} to {least}, which the fallback needs")
    return ir.serde.deserialize_model(converted)
