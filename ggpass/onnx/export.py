"""A lowered Program to an ONNX file that runs everywhere: export, complete, save, and compare on the example inputs."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ggpass.errors import TargetError
from ggpass.graph.report import Change, Report
from ggpass.onnx.bodies import Fallback
from ggpass.onnx.from_program import Exported, from_program
from ggpass.onnx.names import Names
from ggpass.onnx.nodes import complete
from ggpass.onnx.rounding import expected_and_bounds
from ggpass.onnx.save import save
from ggpass.onnxruntime import library_or_reason, session
from ggpass.targets.artifact import Artifact


def export_artifact(
    artifact: Artifact,
    leaves: list[Any],
    path: Path,
    *,
    opset: int,
    fallback: Fallback | None,
    external_data: bool | None,
    check: bool,
) -> Report:
    """Write what an Artifact computes, and compare the file with it; see `ggpass.export_onnx`.

    Args:
        artifact: compiled for an onnx target.
        leaves: the example inputs, flattened as they were traced.
    """
    report = Report("ExportOnnx")
    exported = from_program(artifact.program, leaves, artifact.target.partition("-")[0], opset)
    fused = complete(exported.model, Names(exported.model))
    written, note = save(exported.model, path, fallback, external_data)
    report.changes.append(Change(str(path), f"written: opset {opset}, fallback {fallback or 'none'}, {written} bytes"))
    if fused:
        report.notes.append(f"{fused} convolutions compute with their codes")
    report.notes += [note] if note else []
    library = library_or_reason()
    if not check:
        report.notes.append("not checked, as asked")
    elif fallback is None and isinstance(library, str):
        report.notes.append(f"not checked: without a fallback only the custom-op library can run it ({library})")
    else:
        how = (
            "by the fallback, without the custom-op library"
            if isinstance(library, str)
            else "with the custom-op library"
        )
        report.notes.append(f"checked in ONNX Runtime {how}: error at most {check_file(path, exported)}")
    return report


def check_file(path: Path, exported: Exported) -> str:
    """Run the file on the example inputs, compare every output with the Program's; return the largest error / bound.

    Raises:
        TargetError: ONNX Runtime cannot run it, or an output differs by more than rounding explains; names the first
            node that does.
    """
    returned: Any = exported.reference.graph.output_node().args[0]
    nodes: list[str] = [argument.name for argument in returned]
    wanted = expected_and_bounds(exported.reference, list(exported.inputs.values()), nodes)
    feed = {name: tensor.detach().cpu().numpy() for name, tensor in exported.inputs.items()}
    try:
        opened = session(path)
        names = [output.name for output in opened.get_outputs()]
        # An input that the graph does not read is no input of the file.
        feed = {i.name: feed[i.name] for i in opened.get_inputs()}
        results = opened.run(names, feed)
    except Exception as error:  # ONNX Runtime raises its own classes, all derived from Exception
        raise TargetError(
            f"ONNX Runtime cannot run {path}: {' '.join(str(error).split())}; the file is written, and wrong"
        ) from error
    worst, where = 0.0, names[0] if names else "no output"
    for name, node, result in zip(names, nodes, results):
        ratio = error_over_bound(result, *wanted[node])
        if not ratio <= 1:
            first = _first_difference(path, exported, feed)
            raise TargetError(
                f"{path} does not compute what the model does: output {name!r} is off by {ratio:.3g} times what "
                f"rounding explains, and {first}; skip the weight there (skip=), and please report the model"
            )
        if ratio > worst:
            worst, where = ratio, name
    return f"{worst:.2g} of the bound (at {where})"


def error_over_bound(result: Any, expected: Tensor, bound: Tensor) -> float:
    """max |result − expected| / bound; infinite for another shape, or NaN in one only."""
    want = expected.detach().cpu().double()
    got = torch.from_numpy(np.asarray(result)).double()
    if got.shape != want.shape:
        return float("inf")
    error = (got - want).abs()
    error[(got == want) | (got.isnan() & want.isnan())] = 0.0
    ratio = torch.where(error == 0, 0.0, error / bound.cpu()).nan_to_num(float("inf"))
    return ratio.max().item() if ratio.numel() else 0.0


def _first_difference(path: Path, exported: Exported, feed: dict[str, Any]) -> str:
    """Return the first node, in the file's order, whose result is beyond its bound while its operands' were not."""
    model = ir.load(path)
    shown = {output.name for output in model.graph.outputs}
    computed = {node.name for node in exported.reference.graph.nodes if node.op == "call_function"}
    common = [value for node in model.graph for value in node.outputs if value.name in computed]
    model.graph.outputs.extend(value for value in common if value.name not in shown)
    names = [str(value.name) for value in common]
    # External data is found relative to the file, so the copy lies beside it.
    with tempfile.NamedTemporaryFile(prefix=f".{path.stem}.", suffix=".onnx", dir=path.parent) as file:
        ir.save(model, file.name)
        results = session(file.name).run(names, feed)
    wanted = expected_and_bounds(exported.reference, list(exported.inputs.values()), names)
    for name, value, result in zip(names, common, results):
        ratio = error_over_bound(result, *wanted[name]) if name in wanted else 0.0
        producer = value.producer()
        if not ratio <= 1 and producer is not None:
            return f"the first node that is off is {producer.name!r} ({producer.op_type}), by {ratio:.3g} times"
    return "no node before it is off by itself"
