"""Opening an ONNX file that someone else wrote: every tensor it refers to is there, and beside it.

What other libraries raise about a model becomes an error of ours here, in `explained`.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from ggpass.errors import FormatError, GgpassError, InputError
from ggpass.onnx.tensors import MappedTensor, graphs_of, tensors_of
from ggpass.onnx.wire import read_model

#: A sparse tensor is made dense up to this size, as ONNX Runtime does; a few bytes may ask for any size.
MAX_DENSE_BYTES = 1 << 31


@contextmanager
def explained(subject: str, advice: str) -> Iterator[None]:
    """Turn any exception within into an error of ours: `{subject} (the reason); {advice}`.

    protobuf, onnx, onnx_ir, numpy and ONNX Runtime raise whatever a broken model makes of them, so no list of types is
    complete. An error of ours passes, out of any wrapping: `onnx_ir` wraps what a lazy tensor raises.

    Args:
        subject: what happened to which file.
        advice: what the user does next.

    Raises:
        InputError: the system refused a file (a full disk, a permission).
        FormatError: anything else.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, GgpassError | OSError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, GgpassError):
            raise cause from None
        if isinstance(cause, OSError) and cause.errno is not None:
            action = (
                "free some space" if cause.errno in (errno.ENOSPC, errno.EDQUOT) else "check the path and its rights"
            )
            raise InputError(f"{subject} ({cause.strerror or cause}); {action}, and try again") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FormatError(f"{subject} ({type(error).__name__}: {reason[:200]}); {advice}") from error


def load(path: str | Path) -> ir.Model:
    """Return the model of a file; its tensors stay on disk until they are read.

    Raises:
        FormatError: no such file, no ONNX model, or external data that is missing, too short or elsewhere.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path} does not exist or is no file; give a .onnx file")
    with explained(f"{path} is no ONNX model, or is damaged", "export it again"):
        proto = read_model(path)
        for graph in (proto.graph, *proto.functions):
            _make_dense(path, graph)
        model = ir.from_proto(proto)
        empty = not any(len(graph) for graph in model.graphs())
        for tensor, put in tensors_of(model):
            if isinstance(tensor, ir.ExternalTensor):
                put(MappedTensor(tensor, _file_of(path, tensor)))
            elif tensor.dtype is not ir.DataType.STRING and len(tensor.tobytes()) != tensor.nbytes:
                raise FormatError(
                    f"{path}: tensor {tensor.name!r} does not have the bytes of its shape; export it again"
                )
        for graph in graphs_of(model):
            for value in graph.initializers.values():
                if value.const_value is None:
                    raise FormatError(f"{path}: initializer {value.name!r} has no data; export the model again")
    if empty:
        raise FormatError(f"{path} holds no node; if it was cut short, download or export it again")
    return model


def _make_dense(path: Path, graph: Any) -> None:
    """Turn sparse initializers and attributes into dense ones: nothing behind this module knows sparse tensors."""
    for sparse in getattr(graph, "sparse_initializer", ()):  # a function has none
        graph.initializer.append(_dense(path, sparse))
    if isinstance(graph, onnx.GraphProto):
        del graph.sparse_initializer[:]
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        for body in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            _make_dense(path, body)
        if attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
            attribute.CopyFrom(onnx.helper.make_attribute("value", _dense(path, attribute.sparse_tensor)))


def _dense(path: Path, sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    values, indices = (onnx.numpy_helper.to_array(part) for part in (sparse.values, sparse.indices))
    name, size = sparse.values.name, int(np.prod(sparse.dims, dtype=object))
    if size * values.itemsize > MAX_DENSE_BYTES:
        raise FormatError(
            f"{path}: the sparse tensor {name!r} takes {size * values.itemsize} bytes once it is dense, more than "
            f"{MAX_DENSE_BYTES}; store it dense, in external data"
        )
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    dense.reshape(-1)[indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), dense.shape)] = values
    return onnx.numpy_helper.from_array(dense, name)


def _file_of(path: Path, tensor: ir.ExternalTensor) -> Path:
    """Return the file that holds a tensor's data, links followed.

    A model cache keeps links to files that lie together elsewhere; so a link may lead to where the model itself is.
    """
    location = Path(str(tensor.location))
    file = (path.parent / location).resolve()
    beside = any(file.is_relative_to(folder) for folder in (path.parent.resolve(), path.resolve().parent))
    if location.is_absolute() or ".." in location.parts or not beside:
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
    return file
