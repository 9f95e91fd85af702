"""An ONNX file without its large tensors: each is left in the file, and the model says where.

protobuf reads a file as a whole, and copies it: a model that holds its tensors would cost twice its size before the
first weight is seen. The format is simple: a message is a row of fields, and a field is a number, or a length and that
many bytes (https://protobuf.dev/programming-guides/encoding). So large tensor data is found by its place.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

import onnx

#: Tensors up to this many bytes are read with the model.
SMALL = 1024

#: Field numbers of the messages on the way to a tensor: message -> field -> the message in it.
_INSIDE = {
    "Model": {7: "Graph", 25: "Function"},
    "Function": {7: "Node"},
    "Graph": {1: "Node", 5: "Tensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph"},
}
_RAW_DATA, _FLOAT_DATA, _DOUBLE_DATA, _DATA_TYPE = 9, 4, 10, 2
#: Fields that hold the bytes of a tensor of this type as they lie in memory; raw_data does for any.
_PACKED = {_FLOAT_DATA: onnx.TensorProto.FLOAT, _DOUBLE_DATA: onnx.TensorProto.DOUBLE}
_LENGTH = 2


def read_model(path: Path) -> onnx.ModelProto:
    """Return the model of a file; tensors above SMALL bytes are external data in the file itself.

    Raises:
        ValueError, google.protobuf.message.DecodeError: the file is no model.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if size else memoryview(b"")
    return onnx.ModelProto.FromString(_without_data(view, 0, size, "Model", path.name))


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


def _bytes_field(number: int, content: bytes) -> bytes:
    def varint(value: int) -> bytes:
        out = bytearray()
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        return bytes([*out, value])

    return varint(number << 3 | _LENGTH) + varint(len(content)) + content


def _without_data(view: memoryview, at: int, end: int, message: str, name: str) -> bytes:
    """Return a message's bytes, its large tensors replaced by references to the file `name`."""
    if message == "Tensor":
        return _tensor(view, at, end, name)
    inside = _INSIDE[message]
    parts = []
    for number, kind, start, content, stop in _fields(view, at, end):
        if kind == _LENGTH and number in inside and stop - content > SMALL:
            parts.append(_bytes_field(number, _without_data(view, content, stop, inside[number], name)))
        else:
            parts.append(bytes(view[start:stop]))
    return b"".join(parts)


def _tensor(view: memoryview, at: int, end: int, name: str) -> bytes:
    fields = list(_fields(view, at, end))
    dtype = next((_varint(view, c, s)[0] for n, k, _, c, s in fields if n == _DATA_TYPE and k == 0), 0)
    parts = []
    for number, kind, start, content, stop in fields:
        holds_bytes = number == _RAW_DATA or _PACKED.get(number) == dtype
        if kind == _LENGTH and holds_bytes and stop - content > SMALL:
            reference = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
            for key, value in (("location", name), ("offset", content), ("length", stop - content)):
                reference.external_data.add(key=key, value=str(value))
            parts.append(reference.SerializeToString())
        else:
            parts.append(bytes(view[start:stop]))
    return b"".join(parts)
