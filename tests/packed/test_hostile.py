"""Small files from strangers cost little: seconds, memory and output are bounded by what the file's size justifies."""

import json
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ggpass
from ggpass import FormatError
from ggpass.file import PackedFile, load, pack, unpack
from ggpass.packed.checkpoint import Checkpoint
from ggpass.packed.convert import find_aliases
from ggpass.packed.layout import Entry, TensorFile, write_layout
from ggpass.packed.manifest import CHECK_KEY, KEY, seal

#: Seconds that a refusal may take: hundreds of times what it needs, and far less than a quadratic reader takes.
SECONDS = 10


@pytest.fixture(autouse=True)
def _ends() -> Iterator[None]:
    """An alarm ends what would wait for ever."""
    signal.alarm(3 * SECONDS)
    yield
    signal.alarm(0)


def plain(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def _every_reader(path: Path) -> list[Callable[[], object]]:
    out = path.with_name("out.safetensors")
    return [
        lambda: TensorFile(path),
        lambda: PackedFile(path).read_all(),
        lambda: load(path, into=nn.Linear(2, 2)),
        lambda: unpack(path, out),
        lambda: pack(path, out),
        lambda: Checkpoint(path).tensors and None,
    ]


def refused(path: Path, most: float = SECONDS) -> None:
    """By every reader, in an error of ours, soon, and with no output."""
    for read in _every_reader(path):
        start = time.monotonic()
        with pytest.raises(FormatError, match=path.name):
            read()
        assert time.monotonic() - start < most
    assert not path.with_name("out.safetensors").exists()


def _many(pair: str, count: int) -> bytes:
    return ("{" + ",".join(pair.replace("N", str(i)) for i in range(count)) + "}").encode()


JSON = {
    "one key again and again": b'{"k":' + b'1,"k":' * 300_000 + b"1}",
    "each key twice": _many('"N":1', 80_000)[:-1] + b"," + _many('"N":1', 80_000)[1:],
    "a key again at the end": _many('"N":1', 150_000)[:-1] + b',"0":2}',
    "a key again inside": b'{"__metadata__":' + b'{"k":"' + b'","k":"' * 200_000 + b'"}}',
    "half a character in a name": rb'{"\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    "the other half": rb'{"a":{"dtype":"U8\udc00","shape":[0],"data_offsets":[0,0]}}',
    "half a character in the metadata": rb'{"__metadata__":{"a":"x\udfff"}}',
    "an endless number": b'{"a":{"dtype":"U8","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,0]}}',
    "an endless exponent": b'{"a":{"dtype":"U8","shape":[1e99999],"data_offsets":[0,0]}}',
    "deep": b'{"a":' * 1_000_000,
}


@pytest.mark.parametrize("name", JSON)
def test_json_is_read_in_linear_time(tmp_path: Path, name: str) -> None:
    path = plain(tmp_path / "m.safetensors", JSON[name])
    for read in _every_reader(path)[:-1]:  # safetensors' own parser, behind Checkpoint, takes some of these
        start = time.monotonic()
        with pytest.raises(FormatError, match=r"m\.safetensors"):
            read()
        assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [0, 2**63 - 1], [2**40, 0, 2**40], [0] + [2**20] * 10])
def test_empty_tensors_of_any_shape_are_refused_or_read(tmp_path: Path, shape: list[int]) -> None:
    """Torch refuses an empty tensor, too, whose strides overflow."""
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    path = plain(tmp_path / "m.safetensors", header)
    with pytest.raises(FormatError, match="beyond any memory"):
        TensorFile(path)


def packed_bomb(path: Path, copies: int, size: int) -> Path:
    """A file of one constant tensor under many names."""
    save_file({"a": torch.zeros(size, 1024), "b": torch.zeros(4)}, path.with_name("in.safetensors"))
    pack(path.with_name("in.safetensors"), path, "lossless")
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    manifest = json.loads(header["__metadata__"][KEY])
    manifest["aliases"] = {f"x{i}": "a" for i in range(copies)}
    header["__metadata__"] |= {KEY: json.dumps(manifest), CHECK_KEY: "0" * 8}
    entries = {n: Entry(n, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for n, e in header.items() if n[0] != "_"}
    path.write_bytes(seal(write_layout(entries, header["__metadata__"])) + data[8 + length :])
    return path


@pytest.mark.parametrize(("copies", "size"), [(3000, 2048), (200, 8192)])
def test_a_few_bytes_do_not_unpack_to_any_amount(tmp_path: Path, copies: int, size: int) -> None:
    path = packed_bomb(tmp_path / "m.safetensors", copies, size)
    assert path.stat().st_size < 300_000
    with pytest.raises(FormatError, match="would unpack to"):
        unpack(path, tmp_path / "out.safetensors")
    assert {p.name for p in tmp_path.iterdir()} == {"in.safetensors", "m.safetensors"}
    with PackedFile(path) as opened:  # names that share one tensor cost nothing
        everything = opened.read_all()
    assert len({tensor.data_ptr() for tensor in everything.values()}) == 2


def test_what_pack_writes_unpacks(tmp_path: Path) -> None:
    """Untrained adapters, all zeros, under many names: legal, small, and no bomb."""
    tensors = {f"layer.{i}.lora_B": torch.zeros(512, 8) for i in range(100)} | {"w": torch.randn(300, 100)}
    save_file(tensors, tmp_path / "a.safetensors")
    pack(tmp_path / "a.safetensors", tmp_path / "p.safetensors", "lossless")
    unpack(tmp_path / "p.safetensors", tmp_path / "b.safetensors")
    with TensorFile(tmp_path / "b.safetensors") as back:
        assert set(back.layout.entries) == set(tensors)


def test_tensors_that_look_alike_are_compared_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal at both ends and different in the middle: as many reads as tensors, not as many as pairs."""
    count, size = 300, 5000
    base = torch.zeros(count, size)
    base[:, size // 2] = torch.arange(count)
    base[7] = base[3]
    save_file({f"t{i}": base[i].clone() for i in range(count)}, tmp_path / "a.safetensors")
    reads = [0]
    read = TensorFile.read

    def counting(self: TensorFile, *arguments: Any) -> Any:
        reads[0] += 1
        return read(self, *arguments)

    monkeypatch.setattr(TensorFile, "read", counting)
    with TensorFile(tmp_path / "a.safetensors") as file:
        aliases = find_aliases(file)
    assert len(aliases) == 1
    assert reads[0] <= 4 * count


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(tmp_path / "pipe.safetensors")
    (tmp_path / "null.safetensors").symlink_to("/dev/zero")
    for read in _every_reader(tmp_path / "null.safetensors")[:-1]:
        with pytest.raises(FormatError):
            read()


def test_names_that_no_file_can_hold_are_said(tmp_path: Path) -> None:
    model = nn.Module()
    for name in ("\ud800", "ok\udfff"):
        model.add_module(name, nn.Linear(2, 2))
        with pytest.raises(FormatError, match="half a character"):
            ggpass.save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [lambda t: t.to_sparse(), lambda t: t.to_sparse_csr(), lambda t: t.to("meta")])
def test_tensors_without_rows_of_values_are_said(tmp_path: Path, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = nn.Module()
    model.register_buffer("odd", make(torch.eye(4)))
    with pytest.raises(FormatError, match=r"^odd "):
        ggpass.save(model, tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match=r"weight has no values"):
        ggpass.save(nn.LazyLinear(3), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())
