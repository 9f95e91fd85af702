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

from ggpass.errors import InputError
from ggpass.graph.report import Report
from ggpass.lowering.decide import Lowering, decide
from ggpass.onnx import schema
from ggpass.onnx.bodies import MIN_OPSET, Fallback
from ggpass.onnx.names import Names
from ggpass.onnx.nodes import complete
from ggpass.onnx.normalize import drop_traces, normalize, with_opset
from ggpass.onnx.reader import explained, load
from ggpass.onnx.rewrite import Rewriter
from ggpass.onnx.save import check_path, save
from ggpass.onnx.tensors import files_of
from ggpass.onnx.weights import find_weights, other_constants


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
        if path_out.resolve() in [file.resolve() for file in sources]:
            raise InputError(f"{path_out} would overwrite the model itself; write to another file")
        before = sum(file.stat().st_size for file in sources)
        report = Report("LowerOnnx")
        normalize(model)
        notes = [drop_traces(model)]
        if fallback:
            model, converted = with_opset(model, MIN_OPSET, str(path_in))
            notes.append(converted)
        schema.register()
        weights = find_weights(model)
        lowering.selection.check(name for weight in weights if weight.is_matrix for name in weight.names)
        names, others = Names(model), other_constants(model)
        rewriter = Rewriter(model, lowering, names)
        chosen = {weight.names[0] for weight in decide(weights, lowering, report)}
        report.changes += [rewriter.lower(weight) for weight in weights if weight.names[0] in chosen]
        report.skips += others
        complete(model, names)
        written, opened = save(model, path_out, fallback, external_data, sources)
    report.notes += [note for note in (*notes, opened) if note]
    report.notes.append(f"{path_out.name}: {written} bytes, {written / before:.3f} of {path_in.name}")
    return report
