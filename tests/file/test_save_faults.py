"""No save can destroy a file: whatever interrupts one, an older file stays whole, and the next save is a new one."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.staging import left_in
from torch import nn

import ggpass
from ggpass import GgpassError
from ggpass.file import load, save
from ggpass.packed.staging import Staging
from ggpass.packed.writer import Writer


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))


def same(path: Path, wanted: nn.Module) -> bool:
    found = load(path, into=model(99)).state_dict()
    return all(torch.equal(found[name], tensor) for name, tensor in wanted.state_dict().items())


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def _full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _other_fault() -> None:
    raise RuntimeError("an operator failed")


@pytest.mark.parametrize("fault", [_interrupted, _full_disk, _other_fault])
@pytest.mark.parametrize("at", [1, 3, 6])
def test_a_save_after_a_failed_one_writes_a_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[], None], at: int
) -> None:
    path, old, new = tmp_path / "m.safetensors", model(1), model(2)
    save(old, path)
    calls, write = [], Writer.write

    def failing(self: Writer, name: str, pieces: object, *rest: object) -> object:
        calls.append(name)
        if len(calls) != at:
            return write(self, name, pieces, *rest)  # type: ignore[arg-type]
        fault()
        return None

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", failing)
        with pytest.raises((KeyboardInterrupt, GgpassError, RuntimeError)):
            save(new, path)
    assert same(path, old)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    # Many saves: identities of freed objects come back, and none may be taken for the failed run's.
    for seed in range(3, 13):
        other = model(seed)
        save(other, path)
        assert same(path, other)


def _leave_a_journal(path: Path) -> None:
    with Staging(path, "any plan") as staging:
        (staging.work() / "part").write_bytes(bytes(1000))
        line = b'{"name": "0.weight", "begin": 0, "end": 0, "crc": 0, "note": {}}'
        (staging.work() / "journal").write_bytes(b"\n" + line + b"\n")
        raise KeyboardInterrupt


def test_a_journal_that_lies_there_is_not_read(tmp_path: Path) -> None:
    path, wanted = tmp_path / "m.safetensors", model(1)
    with pytest.raises(KeyboardInterrupt):
        _leave_a_journal(path)
    assert left_in(tmp_path).is_dir()
    save(wanted, path)
    assert same(path, wanted)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"], "a finished target needs no leftovers"


def test_what_does_not_open_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, old = tmp_path / "m.safetensors", model(1)
    save(old, path)
    finish = Writer.finish

    def shifted(self: Writer, header: bytes, *check: object) -> None:
        finish(self, header.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1), *check)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish", shifted)
        with pytest.raises(GgpassError, match="nothing was replaced"):
            save(model(2), path)
    assert same(path, old)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_link_under_the_temporary_name_is_not_followed(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    precious = tmp_path / "precious"
    precious.write_text("mine")
    save_file({"w": torch.randn(64, 64)}, tmp_path / "a.safetensors")
    with pytest.raises(KeyboardInterrupt):
        ggpass.file.pack(tmp_path / "a.safetensors", tmp_path / "p.safetensors", "rf8", progress=_interrupted)
    staging = left_in(tmp_path)
    shutil.rmtree(staging)
    staging.symlink_to(precious)
    with pytest.raises(GgpassError, match="is in the way"):
        ggpass.file.pack(tmp_path / "a.safetensors", tmp_path / "p.safetensors", "rf8")
    assert precious.read_text() == "mine"


def _no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace", "open", "mkdir"])
def test_a_disk_that_refuses_at_the_end_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Whatever call of the system fails: an error of ours, the old file, nothing beside it, and the next save works."""
    path, old, new = tmp_path / "m.safetensors", model(1), model(2)
    save(old, path)
    for at in range(1, 4):
        real, calls = getattr(os, call), [0]

        def failing(*arguments: object, real: Callable = real, calls: list[int] = calls, at: int = at, **more: object):
            calls[0] += 1
            return real(*arguments, **more) if calls[0] != at else _no_space()

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                save(new, path)
                wanted = new  # it has no such call any more, or can do without it
            except GgpassError:
                wanted = old
        assert same(path, wanted)
        assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
        save(old, path)


@pytest.mark.parametrize("room", [100, 3000, 33_000, 49_000])
def test_a_disk_that_is_full_anywhere_is_said(tmp_path: Path, room: int) -> None:
    """In the header, in the journal or in a tensor: the file is 51 kB."""
    save(model(1), tmp_path / "a.safetensors")
    code = f"""if True:
        import resource, sys
        import torch
        from torch import nn
        import ggpass
        from ggpass.file import save, unpack
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
        resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))
        for write in (lambda: save(model, sys.argv[1] + "/m.safetensors"),
                      lambda: unpack(sys.argv[1] + "/a.safetensors", sys.argv[1] + "/u.safetensors")):
            try:
                write()
            except ggpass.GgpassError as error:
                print(error)
            else:
                sys.exit("it was written")
    """
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("could not be written: File too large") == 2, run.stdout
    assert {p.name for p in tmp_path.iterdir() if p.suffix == ".safetensors"} == {"a.safetensors"}
    assert (tmp_path / "a.safetensors").stat().st_size > 49_900
