"""Writing a model: fallback functions attached, large tensors streamed to a file beside it, nothing half-done seen."""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnx_ir as ir

from ggpass.errors import GgpassError, InputError
from ggpass.onnx.bodies import Fallback, functions
from ggpass.onnx.names import DOMAIN, VERSION

#: Above it tensors go to a file of their own: ONNX Runtime maps that into memory, and copies what is in the model.
EXTERNAL_BYTES = 64 << 20
#: Mapped tensors start at a page; smaller ones are packed.
PAGE = 4096
#: Tensors up to this many bytes stay in the model file: shapes, scalars, short biases.
SMALL = 1024


def attach_functions(model: ir.Model, fallback: Fallback | None) -> None:
    """Give the model the bodies of the `ai.ggpass` operators in it, or none, and every one its version.

    The version stands in an attribute because ONNX Runtime shows a library no domain's version: so an older library
    can say what it lacks, in any language.

    Raises:
        InputError: an opset that the bodies cannot be written in.
    """
    nodes = [node for graph in model.graphs() for node in graph if node.domain == DOMAIN]
    if not nodes:
        return
    for node in nodes:
        node.attributes.add(ir.AttrInt64("op_version", VERSION))
    used = {node.op_type for node in nodes}
    model.opset_imports[DOMAIN] = VERSION
    if fallback is None:
        return
    # Functions exist since IR version 8.
    model.ir_version = max(model.ir_version, 8)
    for proto in functions(used, model.opset_imports[""], fallback):
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function


def tensor_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, without reading them."""
    values = (v.const_value for graph in model.graphs() for v in graph.initializers.values())
    return sum(tensor.nbytes for tensor in values if tensor is not None)


def save(model: ir.Model, path: Path, external_data: bool | None) -> int:
    """Write `path`, and `path.data` beside it where tensors are kept apart; the bytes of both.

    Tensors are written one at a time, so a model may be larger than memory. Each file appears by a rename, the model's
    last.

    Args:
        model: as it shall be on disk.
        path: ends in .onnx.
        external_data: whether tensors go to a file of their own; None: above EXTERNAL_BYTES.

    Raises:
        InputError: `path` is not named .onnx, its directory is missing, or the model needs a file of its own.
    """
    size = tensor_bytes(model)
    if external_data is None:
        external_data = size > EXTERNAL_BYTES
    if not external_data and size >= 2**31 - (1 << 20):
        raise InputError(
            f"{size} bytes of tensors exceed the 2 GB of a single ONNX file; leave out external_data=False"
        )
    model.metadata_props["ggpass.version"] = _ggpass_version()
    data = data_path(path)
    # ONNX names the data file relative to the model's, so the model is written in its own directory.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.onnx")
    try:
        ir.save(
            model,
            temporary,
            external_data=data.name if external_data else None,
            size_threshold_bytes=SMALL,
            alignment=PAGE,
            align_threshold=4 * PAGE,
        )
        if external_data:
            data.chmod(temporary.stat().st_mode)  # onnx_ir leaves it to its owner alone
        os.replace(temporary, path)
    except Exception as error:
        # onnx_ir wraps what a lazy tensor raises; the user is told of the weight, not of the wrapping.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, GgpassError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None
    finally:
        temporary.unlink(missing_ok=True)
    if not external_data:
        return path.stat().st_size
    return path.stat().st_size + data.stat().st_size


def data_path(path: Path) -> Path:
    """Where the tensors of `path` go if they are kept apart."""
    return path.with_name(f"{path.name}.data")


def check_path(path: str | Path) -> Path:
    """A path that a model can be written to.

    Raises:
        InputError: not named .onnx, or in a directory that does not exist.
    """
    path = Path(path)
    if path.suffix.lower() != ".onnx" or not path.parent.is_dir():
        raise InputError(f"an ONNX model is written to a .onnx file in a directory that exists, not {str(path)!r}")
    return path


def _ggpass_version() -> str:
    try:
        return version("ggpass")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
