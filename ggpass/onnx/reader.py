"""Opening an ONNX file that someone else wrote: every tensor it refers to is there, and inside its own directory."""

from pathlib import Path

import onnx_ir as ir

from ggpass.errors import FormatError


def load(path: str | Path) -> ir.Model:
    """The model of a file; its external tensors stay on disk until they are read.

    Raises:
        FormatError: no such file, no ONNX model, or external data that is missing, too short or elsewhere.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path} does not exist or is no file; give a .onnx file")
    try:
        model = ir.load(path)
        graphs = list(model.graphs())
    except Exception as error:  # protobuf and onnx_ir raise whatever a broken file makes of them
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FormatError(f"{path} is no ONNX model, or is damaged ({reason[:200]}); export it again") from error
    if not any(len(graph) for graph in graphs):
        raise FormatError(f"{path} holds no node; if it was cut short, download or export it again")
    for graph in graphs:
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                _check_external(path, value.const_value)
            elif value.const_value is None:
                raise FormatError(f"{path}: initializer {value.name!r} has no data; export the model again")
    return model


def files_of(path: Path, model: ir.Model) -> list[Path]:
    """The model file and the files that it keeps tensors in."""
    tensors = (v.const_value for graph in model.graphs() for v in graph.initializers.values())
    beside = {path.parent / str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return [path, *sorted(beside)]


def bytes_of(path: Path, model: ir.Model) -> int:
    """Bytes of those files together."""
    return sum(file.stat().st_size for file in files_of(path, model))


def _check_external(path: Path, tensor: ir.ExternalTensor) -> None:
    location = Path(str(tensor.location))
    file = path.parent / location
    folder = path.parent.resolve()
    if location.is_absolute() or not file.resolve().is_relative_to(folder):
        raise FormatError(
            f"{path} reads {tensor.name!r} from {str(location)!r}, outside its directory; do not trust it"
        )
    if not file.is_file():
        raise FormatError(f"{file} is missing, though {path.name} keeps {tensor.name!r} in it; download it too")
    offset, length = tensor.offset or 0, tensor.length if tensor.length is not None else tensor.nbytes
    if offset < 0 or length != tensor.nbytes or offset + length > file.stat().st_size:
        raise FormatError(
            f"{path} keeps {tensor.name!r} in bytes {offset} to {offset + length} of {location}, which do not hold a "
            f"{tensor.dtype.name} {tuple(tensor.shape.numpy())}; download both files again"
        )
