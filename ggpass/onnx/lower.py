"""Any ONNX model → the same with 8-bit weights: MatMul, Gemm, Gather and Conv with constant weights become our nodes.

1. A constant is lowered at all its uses or at none; what it feeds through Transpose, Cast and Identity counts as one.
2. MatMul(x, W) and Gemm(x, W or Wᵀ) become MatMul nodes, with a constant that is added behind as their bias.
3. Gather along rows becomes Gather. Any other operator that computes with floats gets a large constant of two or more
   dimensions from Dequantize: recurrent nets, transposed convolutions, position tables.
4. Bodies of If and Loop are part of the model, and so are functions; a constant belongs to the graph that holds it.
5. Everything else stays, and is reported with its reason and its bytes.
6. Weights are read, coded and written one at a time.
"""

from pathlib import Path

import onnx_ir as ir
import torch

from ggpass.errors import InputError
from ggpass.graph import weights as graph_weights
from ggpass.graph.report import Report, Skip
from ggpass.lowering import decide
from ggpass.lowering.decide import Lowering
from ggpass.onnx import schema
from ggpass.onnx.bodies import MIN_OPSET, Fallback
from ggpass.onnx.boundary import explained
from ggpass.onnx.lazy_codes import reason_of_values
from ggpass.onnx.names import STANDARD, Names
from ggpass.onnx.nodes import complete
from ggpass.onnx.normalize import drop_traces, normalize, with_opset
from ggpass.onnx.opening import open_once
from ggpass.onnx.reader import load
from ggpass.onnx.rewrite import Rewriter
from ggpass.onnx.save import attach_functions, check_path, save
from ggpass.onnx.tensors import bytes_of, files_of
from ggpass.onnx.weights import DECODE_BYTES, FLOATS, Kind, Weight, constants, find_weights, reason_of_other

_TORCH = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
}

#: The shared words for the kinds of a file; a weight that is decoded is as good as a matrix to multiply by.
_KINDS = {
    Kind.MATMUL: graph_weights.Kind.LINEAR,
    Kind.GEMM: graph_weights.Kind.LINEAR,
    Kind.GATHER: graph_weights.Kind.EMBEDDING,
    Kind.CONV: graph_weights.Kind.CONV,
    Kind.DECODE: graph_weights.Kind.LINEAR,
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
    with explained(f"{path_in} cannot be lowered", "check it with onnx.checker, or export it again"):
        model = load(path_in)
        sources = files_of(path_in, model)
        if path_out.resolve() in sources:
            raise InputError(f"{path_out} would overwrite the model itself; write to another file")
        before = bytes_of(path_in, model)
        report = Report("LowerOnnx")
        normalize(model)
        notes = [drop_traces(model)]
        if fallback:
            model, converted = with_opset(model, MIN_OPSET, str(path_in))
            notes.append(converted)
        lower_model(model, lowering, report)
        attach_functions(model, fallback)
        written, opened = save(
            model, path_out, external_data, lambda file: open_once(file, path_out.name, fallback, path_in), sources
        )
    report.notes += [note for note in (*notes, opened) if note]
    report.notes.append(f"{path_out.name}: {written} bytes, {written / before:.3f} of {path_in.name}")
    return report


def lower_model(model: ir.Model, lowering: Lowering, report: Report) -> None:
    """Rewrite a normalized model in place; codes are computed when it is written.

    Raises:
        WeightError: a pattern that matches nothing, or an integer weight.
    """
    schema.register()
    weights = find_weights(model)
    lowering.selection.check(name for w in weights if len(w.shape) >= 2 for name in w.names)
    names = Names(model)
    rewriter = Rewriter(model, lowering, names)
    others = _other_constants(model)
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
            report.changes.append(rewriter.lower(weight))
    report.skips += others
    complete(model, names)
    for graph in model.graphs():
        _remove_unread(graph)


def reason_to_keep(weight: Weight, lowering: Lowering) -> str:
    """Return the reason why a constant stays as it is, or ''."""
    if weight.value.is_graph_input():
        return "an input with a default, which a caller may override"
    tensor = torch.empty(weight.matrix, dtype=_TORCH[weight.tensor.dtype], device="meta")
    decodable = weight.tensor.nbytes > DECODE_BYTES
    uses = tuple(
        graph_weights.Use(
            use.node or weight.value,
            None if use.kind is None else _KINDS[use.kind],
            # A use in the other orientation is decoded, if that is worth it.
            weight.transposed if decodable or use.kind is Kind.DECODE else use.transposed,
            use.reason,
        )
        for use in weight.uses
    )
    reason = decide.reason_to_keep(graph_weights.Weight(weight.names, tensor, uses, lazy=True), lowering)
    return reason or reason_of_values(weight)


def _other_constants(model: ir.Model) -> list[Skip]:
    """Return the constants of two or more dimensions that are no floats."""
    skips = []
    for graph in model.graphs():
        for value, tensor in constants(graph):
            if len(tensor.shape) >= 2 and tensor.dtype not in FLOATS and value.uses():
                reason, matrix = reason_of_other(value, tensor)
                if reason:
                    skips.append(Skip(str(value.name), reason, tensor.nbytes, matrix=matrix))
    return skips


def _remove_unread(graph: ir.Graph) -> None:
    """Erase what passed the float weights on, and the weights themselves."""
    for node in reversed(list(graph)):
        passes_on = node.op_type in ("Transpose", "Cast", "Identity", "Constant") and node.domain in STANDARD
        if passes_on and not any(v.uses() or v.is_graph_output() for v in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            del graph.initializers[name]
