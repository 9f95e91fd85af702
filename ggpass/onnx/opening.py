"""A written file is opened before anyone is told of success: by ONNX Runtime as it is, and with our library."""

from pathlib import Path

from ggpass.errors import FormatError, TargetError
from ggpass.onnx.bodies import Fallback
from ggpass.onnx.boundary import explained


def open_once(path: Path, name: str, fallback: Fallback | None, source: Path | None = None) -> str:
    """Open a file in every way it is meant to run; return a note if that is not possible, or ''.

    Nothing is optimized or repacked, so the memory is that of the file.

    Args:
        path: the file, complete.
        name: to call it by in errors.
        fallback: with one, ONNX Runtime alone must open it.
        source: the float model that it was made from. If ONNX Runtime cannot open that either, the operators of
            someone else are missing, and nothing can be said.

    Raises:
        TargetError: ONNX Runtime refuses the file.
    """
    from ggpass.onnxruntime import library_or_reason

    library = library_or_reason()
    ways = ([None] if fallback else []) + ([library] if isinstance(library, Path) else [])
    if not ways:
        return f"not opened: without a fallback only the custom-op library can run it ({library})"
    for way in ways:
        try:
            with explained("refused", "report the model"):
                _open(path, way)
        except FormatError as error:
            if source is not None and not _opens(source):
                return f"not opened: ONNX Runtime does not open {source.name} either"
            raise TargetError(
                f"ONNX Runtime{' with the custom-op library' if way else ''} does not open what was written as {name}: "
                f"{str(error.__cause__)[:400]}; skip the weights that it names (skip=), and please report the model"
            ) from error
    return ""


def _opens(path: Path) -> bool:
    try:
        with explained("refused", "report the model"):
            _open(path, None)
    except FormatError:
        return False
    return True


def _open(path: Path, library: Path | None) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # errors come as exceptions
    if library is not None:
        options.register_custom_ops_library(str(library))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
