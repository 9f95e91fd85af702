"""A lowered Program to an ONNX file that runs everywhere: export, complete, attach, save, check."""

from pathlib import Path
from typing import Any

from ggpass.graph.report import Change, Report
from ggpass.onnx.bodies import Fallback
from ggpass.onnx.check import check_file
from ggpass.onnx.from_program import from_program
from ggpass.onnx.names import Names
from ggpass.onnx.nodes import complete
from ggpass.onnx.opening import open_once
from ggpass.onnx.save import attach_functions, check_path, save
from ggpass.onnxruntime import library_or_reason
from ggpass.targets.artifact import Artifact


def export_artifact(
    artifact: Artifact,
    leaves: list[Any],
    path: str | Path,
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
    path = check_path(path)
    report = Report("ExportOnnx")
    exported = from_program(artifact.program, leaves, artifact.target.partition("-")[0], opset)
    fused = complete(exported.model, Names(exported.model))
    attach_functions(exported.model, fallback)
    written, note = save(exported.model, path, external_data, lambda file: open_once(file, path.name, fallback))
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
        report.notes.append(str(check_file(path, exported)))
    return report
