"""Every corruption of a packed file is found and named; hostile headers and manifests are refused unread."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ggpass import FormatError
from ggpass.file import PackedFile, pack, unpack
from ggpass.packed.layout import LENGTH_BYTES
from ggpass.packed.manifest import CHECK_KEY, KEY, seal
from ggpass.packed.untrusted import depth_of, parse_json


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file with a payload of each kind."""
    folder = tmp_path_factory.mktemp("damage")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a.weight": torch.randn(24, 40, generator=generator),
        "b.weight": torch.randn(24, 40, generator=generator),
        "bias": torch.randn(24, generator=generator),
        "ids": torch.arange(9),
        "tied": torch.arange(9),
    }
    save_file(tensors, folder / "a.safetensors", metadata={"format": "pt"})
    pack(folder / "a.safetensors", folder / "p.safetensors", "rf8")
    return (folder / "p.safetensors").read_bytes()


def read(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    PackedFile(path).read_all()


def test_every_flipped_bit_is_found(packed: bytes, tmp_path: Path) -> None:
    """All bits of the header's length, of a sample of the header, and of the data."""
    bits = {*range(8 * LENGTH_BYTES), *range(0, 8 * len(packed), 7)}
    for bit in bits:
        damaged = bytearray(packed)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            read(tmp_path / "p.safetensors", bytes(damaged))


def test_truncation_at_any_byte_is_found(packed: bytes, tmp_path: Path) -> None:
    for length in {*range(0, len(packed), 5), len(packed) - 1}:
        with pytest.raises(FormatError):
            read(tmp_path / "p.safetensors", packed[:length])
    with pytest.raises(FormatError, match="added to"):
        read(tmp_path / "p.safetensors", packed + b"\0")


def test_the_message_names_file_and_tensor(packed: bytes, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    path.write_bytes(packed)
    with PackedFile(path) as opened:
        entry = opened.files[0].layout.entries["b.weight"]
        at = opened.files[0].layout.data_at + entry.end - 50
    damaged = bytearray(packed)
    damaged[at] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(FormatError, match=r"p\.safetensors, b\.weight: chunk 0"):
        PackedFile(path).read("b.weight")
    with pytest.raises(FormatError, match=r"b\.weight"):
        unpack(path, tmp_path / "u.safetensors")
    assert not (tmp_path / "u.safetensors").exists()
    PackedFile(path).read("a.weight")  # the others still come


def rewritten(packed: bytes, change: Any) -> bytes:
    """The file with its header and manifest changed and its checksum made right: what a hostile writer would send."""
    length = int.from_bytes(packed[:LENGTH_BYTES], "little")
    header = json.loads(packed[LENGTH_BYTES : LENGTH_BYTES + length])
    manifest = json.loads(header["__metadata__"][KEY])
    change(header, manifest)
    header["__metadata__"][KEY] = json.dumps(manifest, separators=(",", ":"))
    header["__metadata__"][CHECK_KEY] = "0" * 8
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return seal(len(text).to_bytes(8, "little") + text) + packed[LENGTH_BYTES + length :]


def _swap(header: dict[str, Any], manifest: dict[str, Any]) -> None:
    header["a.weight"], header["b.weight"] = header["b.weight"], header["a.weight"]


def setting(place: str, *path: Any) -> Any:
    """Set header or manifest at a path to the last of the arguments."""

    def change(header: dict[str, Any], manifest: dict[str, Any]) -> None:
        value: Any = header if place == "header" else manifest
        for key in path[:-2]:
            value = value[key]
        value[path[-2]] = path[-1]

    return change


HOSTILE = {
    "swapped payloads": _swap,
    "huge shape": setting("manifest", "tensors", "a.weight", "shape", [2**40, 2**40]),
    "large shape": setting("manifest", "tensors", "a.weight", "shape", [2**30, 40]),
    "other shape": setting("manifest", "tensors", "a.weight", "shape", [40, 24]),
    "negative shape": setting("manifest", "tensors", "a.weight", "shape", [-24, -40]),
    "boolean shape": setting("manifest", "tensors", "a.weight", "shape", [True, 960]),
    "float shape": setting("manifest", "tensors", "a.weight", "shape", [24.0, 40]),
    "no rows": setting("manifest", "tensors", "a.weight", "shape", []),
    "unknown version": setting("manifest", "version", 3),
    "no version": setting("manifest", "version", "1"),
    "unknown kind": setting("manifest", "tensors", "a.weight", "kind", "pickle"),
    "another kind": setting("manifest", "tensors", "a.weight", "kind", "lossless"),
    "grid without step": setting("manifest", "tensors", "a.weight", "kind", "grid"),
    "unknown format": setting("manifest", "tensors", "a.weight", "format", "rf9"),
    "another format": setting("manifest", "tensors", "a.weight", "format", "int8"),
    "another codebook": setting("manifest", "tensors", "a.weight", "codebook", "0" * 16),
    "unknown dtype": setting("manifest", "tensors", "a.weight", "dtype", "F99"),
    "odd dtype": setting("manifest", "tensors", "a.weight", "dtype", "I64"),
    "list for dtype": setting("manifest", "tensors", "a.weight", "dtype", ["F32"]),
    "negative check": setting("manifest", "tensors", "a.weight", "check", -1),
    "transposed string": setting("manifest", "tensors", "a.weight", "transposed", "yes"),
    "stack of a matrix": setting("manifest", "tensors", "a.weight", "stack", 24),
    "stack string": setting("manifest", "tensors", "a.weight", "stack", "24"),
    "negative stack": setting("manifest", "tensors", "a.weight", "stack", -24),
    "tensor too many": setting("manifest", "tensors", "ghost", {"kind": "plain", "check": 0}),
    "no tensors": setting("manifest", "tensors", []),
    "alias of nothing": setting("manifest", "aliases", {"x": "ghost"}),
    "alias of an alias": setting("manifest", "aliases", {"x": "y", "y": "x"}),
    "alias over a tensor": setting("manifest", "aliases", {"bias": "ids"}),
    "negative offset": setting("header", "bias", "data_offsets", [-8, 96]),
    "offset past the end": setting("header", "bias", "data_offsets", [0, 2**62]),
    "overlap": setting("header", "b.weight", "data_offsets", [0, 4]),
    "payload of floats": setting("header", "a.weight", "dtype", "F32"),
    "size beyond 64 bits": setting("header", "bias", "shape", [2**62, 2**62]),
    "metadata not strings": setting("header", "__metadata__", "format", 3),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_without_allocating(name: str, packed: bytes, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    path.write_bytes(rewritten(packed, HOSTILE[name]))
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            PackedFile(path).read_all()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_an_unchanged_rewrite_is_read(packed: bytes, tmp_path: Path) -> None:
    """The helper above damages nothing by itself."""
    read(tmp_path / "p.safetensors", rewritten(packed, lambda header, manifest: None))


def test_a_header_rewritten_by_another_tool_is_said(packed: bytes, tmp_path: Path) -> None:
    length = int.from_bytes(packed[:8], "little")
    text = packed[8 : 8 + length].replace(b'"pt"', b'"tf"')
    with pytest.raises(FormatError, match="another tool"):
        read(tmp_path / "p.safetensors", packed[:8] + text + packed[8 + length :])


@pytest.mark.parametrize("text", [b"[" * 200_000, b'{"a":' * 200_000, b'{"a":"' + b'\\"' * 300_000, b'"' * 300_001])
def test_deep_or_endless_json_is_refused_at_once(text: bytes, tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        parse_json(text, "this")
    with pytest.raises(FormatError):
        read(tmp_path / "p.safetensors", len(text).to_bytes(8, "little") + text)


def test_json_is_strict() -> None:
    assert depth_of(b'{"[[[[": [1, {"a\\"[": []}]}') == 4
    for text in (
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        '{"a": Infinity}',
        "",
        "{",
        '{"a": 1} x',
        '"\udcff"'.encode("utf-8", "surrogatepass"),
    ):
        with pytest.raises(FormatError):
            parse_json(text, "this")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_anyhow_never_crashes(packed: bytes, tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(packed)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        piece = data.draw(st.binary(max_size=8))
        damaged[at : at + data.draw(st.integers(0, 8))] = piece
    if bytes(damaged) != packed:
        with pytest.raises(FormatError):
            read(tmp_path / "p.safetensors", bytes(damaged))
