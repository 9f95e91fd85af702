"""Directories: shards that are not as their index says are refused, links are followed, shards load as one file."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.staging import left_in
from torch import nn

import ggpass
from ggpass import FormatError, GgpassError
from ggpass.file import PackedFile, load, pack, unpack
from ggpass.packed.checkpoint import Checkpoint

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(70, 48), nn.Linear(48, 64), nn.Linear(64, 32)).eval()


def sharded(folder: Path, model: nn.Module) -> Path:
    folder.mkdir()
    state = model.state_dict()
    names = [*state]
    weight_map = {name: SHARDS[i >= 2] for i, name in enumerate(names)}
    for shard in SHARDS:
        save_file({n: state[n].clone() for n in names if weight_map[n] == shard}, folder / shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("path", ["", INDEX])
def test_a_packed_directory_loads_as_codes(tmp_path: Path, path: str) -> None:
    source, packed = sharded(tmp_path / "in", net()), tmp_path / "packed"
    pack(source, packed, "rf8")
    ids = torch.arange(12).view(2, 6)
    expected = ggpass.compile(net(), target="rf8-reference")
    with torch.device("meta"):
        empty = net()
    for into in (net(), empty):
        loaded = ggpass.load(packed / path, into=into, target="reference")
        assert torch.equal(loaded(ids), expected(ids))
    with PackedFile(packed / path) as opened:
        assert set(opened.names) == set(net().state_dict())
        assert opened.size == sum((packed / shard).stat().st_size for shard in SHARDS)
        everything = opened.read_all(threads=2)
    unpack(packed, tmp_path / "back")
    back = load_file(tmp_path / "back" / SHARDS[0]) | load_file(tmp_path / "back" / SHARDS[1])
    assert all(torch.equal(everything[name], tensor) for name, tensor in back.items())


def _edit(index: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


def _other_version(folder: Path) -> None:
    """The second shard of a model with other layers."""
    target = folder / SHARDS[1]
    state = {f"other.{i}": torch.randn(30, 40) for i in range(3)}
    if "packed" in folder.name:
        save_file(state, folder.parent / "other.safetensors")
        target.unlink()
        pack(folder.parent / "other.safetensors", target, "rf8")
        (folder.parent / "other.safetensors").unlink()
    else:
        save_file(state, target)


def _pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _link(path: Path, to: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(to)


WRONG: dict[str, Callable[[Path], object]] = {
    "a missing shard": lambda f: (f / SHARDS[1]).unlink(),
    "a shard of another version": _other_version,
    "a weight_map of lists": lambda f: _edit(f / INDEX, lambda c: c.update(weight_map={"a": ["x.safetensors"]})),
    "a weight_map that is a list": lambda f: _edit(f / INDEX, lambda c: c.update(weight_map=[SHARDS[0]])),
    "a weight_map of numbers": lambda f: _edit(f / INDEX, lambda c: c.update(weight_map={"a": 3})),
    "no weight_map": lambda f: _edit(f / INDEX, lambda c: c.pop("weight_map")),
    "a shard above": lambda f: _edit(f / INDEX, lambda c: c["weight_map"].update(a="../x.safetensors")),
    "an absolute shard": lambda f: _edit(f / INDEX, lambda c: c["weight_map"].update(a="/etc/x.safetensors")),
    "a shard that is a pickle": lambda f: _edit(f / INDEX, lambda c: c["weight_map"].update(a="x.bin")),
    "a tensor too many": lambda f: _edit(f / INDEX, lambda c: c["weight_map"].update(ghost=SHARDS[0])),
    "a list for an index": lambda f: (f / INDEX).write_text("[]"),
    "half an index": lambda f: (f / INDEX).write_text((f / INDEX).read_text()[:50]),
    "a deep index": lambda f: (f / INDEX).write_text('{"weight_map":' * 5000),
    "an index of latin letters": lambda f: (f / INDEX).write_bytes(b'{"weight_map": {"\xe4": "a.safetensors"}}'),
    "a link to nothing": lambda f: _link(f / SHARDS[1], "blobs/gone"),
    "a link to itself": lambda f: _link(f / SHARDS[1], SHARDS[1]),
    "a pipe for a shard": lambda f: _pipe(f / SHARDS[1]),
    "a pipe for an index": lambda f: _pipe(f / INDEX),
    "a directory for a shard": lambda f: ((f / SHARDS[1]).unlink(), (f / SHARDS[1]).mkdir()),
    "a cut shard": lambda f: os.truncate(f / SHARDS[1], 300),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_directory_that_is_not_whole_is_refused(tmp_path: Path, name: str) -> None:
    """By packing, unpacking, loading and listing alike, in one error of ours; nothing is left behind."""
    source = sharded(tmp_path / "in", net())
    pack(source, tmp_path / "packed", "rf8")
    for folder in (source, tmp_path / "packed"):
        WRONG[name](folder)
    with pytest.raises(FormatError):
        pack(source, tmp_path / "new")
    with pytest.raises(FormatError):
        unpack(tmp_path / "packed", tmp_path / "new")
    with pytest.raises(FormatError):
        load(tmp_path / "packed" / INDEX, into=net())
    with pytest.raises(FormatError):
        Checkpoint(source / INDEX)
    assert {p.name for p in tmp_path.iterdir()} == {"in", "packed"}


def test_other_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    source = sharded(tmp_path / "in", net())
    for name, make in (("vocab.json", lambda p: _link(p, "gone")), ("socket", _pipe)):
        make(source / name)
        with pytest.raises(FormatError, match=name):
            pack(source, tmp_path / "new")
        (source / name).unlink()


def test_a_model_in_a_hugging_face_cache(tmp_path: Path) -> None:
    """Snapshots are links to blobs, relative or absolute; what is packed is the files themselves."""
    source = sharded(tmp_path / "in", net())
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "0f"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}" if i % 2 else blobs / str(i))
    pack(snapshot, tmp_path / "linked", "rf8")
    pack(source, tmp_path / "direct", "rf8")
    for file in (tmp_path / "direct").iterdir():
        assert not (tmp_path / "linked" / file.name).is_symlink()
        assert (tmp_path / "linked" / file.name).read_bytes() == file.read_bytes()


def test_an_interrupted_directory_leaves_nothing_in_the_finished_one(tmp_path: Path) -> None:
    """Stopped at every tensor in turn; what interrupted runs left inside the source is no part of the model either."""
    source = sharded(tmp_path / "in", net())
    pack(source, tmp_path / "whole", "rf8")
    expected = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    (source / ".x.safetensors.0123.ggpass-part").mkdir()
    for stop in range(7):
        calls = [0]

        def interrupt(name: str, done: int, total: int, stop: int = stop, calls: list[int] = calls) -> None:
            calls[0] += 1
            if calls[0] > stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pack(source, tmp_path / "out", "rf8", progress=interrupt)
        assert left_in(tmp_path).is_dir()
        pack(source, tmp_path / "out", "rf8")
        assert {p.name: p.read_bytes() for p in (tmp_path / "out").rglob("*")} == expected
        shutil.rmtree(tmp_path / "out")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_equal_size_and_time_are_no_identity(tmp_path: Path) -> None:
    """A shard is written again with other values while its size and its time stay: the finished half is not reused."""
    source = sharded(tmp_path / "in", net())
    shard = source / SHARDS[0]

    def interrupt(name: str, done: int, total: int) -> None:
        if name.startswith("2."):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "out", "rf8", progress=interrupt)
    stamp = shard.stat()
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard)
    os.utime(shard, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert (shard.stat().st_size, shard.stat().st_mtime_ns) == (stamp.st_size, stamp.st_mtime_ns)
    pack(source, tmp_path / "out", "rf8")
    pack(source, tmp_path / "fresh", "rf8")
    for name in SHARDS:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_a_directory_is_replaced_when_asked(tmp_path: Path) -> None:
    source = sharded(tmp_path / "in", net())
    pack(source, tmp_path / "out", "rf8")
    (tmp_path / "out" / "old").write_text("x")
    with pytest.raises(GgpassError, match="exists already"):
        pack(source, tmp_path / "out", "int8")
    pack(source, tmp_path / "out", "int8", replace=True)
    assert not (tmp_path / "out" / "old").exists()
    assert PackedFile(tmp_path / "out").stored("1.weight").format == "int8"
    with pytest.raises(GgpassError, match="outside"):
        pack(source, source, "rf8", replace=True)
    assert (source / SHARDS[0]).exists()
