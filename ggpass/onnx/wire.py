"""An ONNX file without its large tensors: each is left in the file, and the model says where.

protobuf reads a file as a whole, and copies it: a model that holds its tensors would cost twice its size before the
first weight is seen. The format is simple: a message is a row of fields, and a field is a number, or a length and that
many bytes (https://protobuf.dev/programming-guides/encoding). So large tensor data is found by its place.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

#: Tensors up to this many bytes are read with the model.
SMALL = 1024

#: The messages on the way to a tensor. Sparse ones are not among them: they are made dense when they are read.
_INSIDE = ("GraphProto", "FunctionProto", "NodeProto", "AttributeProto", "TensorProto")
#: Fields that hold the bytes of a tensor of this type as they lie in memory; raw_data does for any.
_PACKED = {"float_data": onnx.TensorProto.FLOAT, "double_data": onnx.TensorProto.DOUBLE}
_LENGTH = 2


def read_model(path: Path) -> onnx.ModelProto:
    """Return the model of a file; tensors above SMALL bytes are external data in the file itself.

    Raises:
        ValueError, google.protobuf.message.DecodeError: the file is no model.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if size else memoryview(b"")
    model = onnx.ModelProto()
    _parse(model, view, 0, size, path.name)
    return model


def _varint(view: memoryview, at: int, end: int) -> tuple[int, int]:
    """Return the number at a place, and where it ends."""
    value = shift = 0
    while at < end and shift < 64:
        byte = view[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("a number is cut short")


def _fields(view: memoryview, at: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield number, wire type, and where the field, its content and its end lie, for each field of a message."""
    while at < end:
        start = at
        key, at = _varint(view, at, end)
        kind = key & 7
        if kind == _LENGTH:
            length, at = _varint(view, at, end)
            content, at = at, at + length
        elif kind == 0:
            content, (_, at) = at, _varint(view, at, end)
        elif kind in (1, 5):
            content, at = at, at + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"field {key >> 3} has no wire type {kind}")
        if at > end:
            raise ValueError("a field is longer than its message")
        yield key >> 3, kind, start, content, at


def _parse(message: Any, view: memoryview, at: int, end: int, name: str) -> None:
    """Parse a message, its large tensors replaced by references to the file `name`."""
    for number, kind, start, content, stop in _fields(view, at, end):
        field = message.DESCRIPTOR.fields_by_number.get(number)
        large = field is not None and kind == _LENGTH and stop - content > SMALL
        if large and field.message_type is not None and field.message_type.name in _INSIDE:
            inner = getattr(message, field.name)
            if hasattr(inner, "add"):
                inner = inner.add()
            inner.SetInParent()
            _parse(inner, view, content, stop, name)
        elif (
            large
            and isinstance(message, onnx.TensorProto)
            and (field.name == "raw_data" or _PACKED.get(field.name) == message.data_type)
        ):
            message.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", name), ("offset", content), ("length", stop - content)):
                message.external_data.add(key=key, value=str(value))
        else:
            message.MergeFromString(bytes(view[start:stop]))
