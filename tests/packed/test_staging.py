"""Links, races and force: what lies under a temporary name is never followed, mixed or deleted while it is written."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ggpass
from ggpass import FormatError, GgpassError, WeightError
from ggpass.file import PackedFile, pack, unpack
from ggpass.packed.staging import PART_SUFFIX, Staging, refuse_existing


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file({f"w{i}": torch.randn(64, 64) for i in range(4)}, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def interrupt(name: str, done: int, total: int) -> None:
    if name == "w2":
        raise KeyboardInterrupt


def leave(source: Path, target: Path, method: str = "rf8") -> Path:
    """What an interrupted pack leaves."""
    before = set(target.parent.iterdir())
    with pytest.raises(KeyboardInterrupt):
        pack(source, target, method, progress=interrupt)
    (found,) = set(target.parent.iterdir()) - before
    return found


def test_what_is_unfinished_is_for_its_owner_alone(source: Path, tmp_path: Path) -> None:
    staging = leave(source, tmp_path / "p.safetensors")
    assert staging.stat().st_mode & 0o777 == 0o700
    pack(source, tmp_path / "p.safetensors")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "p.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("inside", ["lock", "work/journal", "work/part"])
def test_a_link_in_the_staging_directory(source: Path, tmp_path: Path, inside: str) -> None:
    """Nobody else can put one there, and none is written through."""
    staging, precious = leave(source, tmp_path / "p.safetensors"), tmp_path / "precious"
    precious.write_text("mine")
    (staging / inside).unlink()
    (staging / inside).symlink_to(precious)
    with pytest.raises(GgpassError, match="could not be written"):
        pack(source, tmp_path / "p.safetensors")
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "link to a directory", "link to nothing", "pipe"])
def test_something_else_under_the_temporary_name(source: Path, tmp_path: Path, kind: str) -> None:
    staging = leave(source, tmp_path / "p.safetensors")
    import shutil

    shutil.rmtree(staging)
    (tmp_path / "elsewhere").mkdir()
    if kind == "file":
        staging.write_text("mine")
    elif kind == "pipe":
        os.mkfifo(staging)
    else:
        staging.symlink_to(tmp_path / ("elsewhere" if "directory" in kind else "nothing"))
    with pytest.raises(GgpassError, match="is in the way"):
        pack(source, tmp_path / "p.safetensors")
    assert os.path.lexists(staging)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_other_settings_neither_resume_nor_delete(source: Path, tmp_path: Path) -> None:
    """A second pack with other options while the first is at work: both are whole, the first to finish wins."""
    target, seen = tmp_path / "p.safetensors", []

    def meanwhile(name: str, done: int, total: int) -> None:
        if name == "w2" and not seen:
            seen.append(name)
            pack(source, target, "int8")

    with pytest.raises(GgpassError, match="exists already"):
        pack(source, target, "rf8", progress=meanwhile)
    with PackedFile(target) as opened:
        assert {stored.format for stored in opened.manifest.tensors.values()} == {"int8"}
        opened.read_all()


def test_the_same_settings_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    def meanwhile(name: str, done: int, total: int) -> None:
        with pytest.raises(GgpassError, match="another process is writing"):
            pack(source, tmp_path / "p.safetensors", "rf8")

    pack(source, tmp_path / "p.safetensors", "rf8", progress=meanwhile)
    assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors", "p.safetensors"}


def test_a_finished_target_takes_the_leftovers_of_other_settings_with_it(source: Path, tmp_path: Path) -> None:
    leave(source, tmp_path / "p.safetensors", "rf8")
    leave(source, tmp_path / "p.safetensors", "int8")
    kept = leave(source, tmp_path / "q.safetensors", "rf8")
    with Staging(tmp_path / "p.safetensors", "at work") as other:
        pack(source, tmp_path / "p.safetensors", "lossless")
        assert other.path.is_dir()
        assert {p.name for p in tmp_path.glob(f".*{PART_SUFFIX}")} == {other.path.name, kept.name}


def test_the_source_of_the_same_size_and_time_with_other_values(source: Path, tmp_path: Path) -> None:
    leave(source, tmp_path / "p.safetensors")
    stamp = source.stat()
    save_file({name: tensor * 2 for name, tensor in load_file(source).items()}, source)
    os.utime(source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    pack(source, tmp_path / "p.safetensors")
    pack(source, tmp_path / "fresh.safetensors")
    assert (tmp_path / "p.safetensors").read_bytes() == (tmp_path / "fresh.safetensors").read_bytes()


def test_a_refused_source_leaves_nothing(source: Path, tmp_path: Path) -> None:
    """NaN late in the file, damage late in the file, a file that is not packed, in a directory and alone."""
    tensors = {**load_file(source), "z": torch.full((64, 64), torch.nan)}
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "m.safetensors")
    (tmp_path / "in" / "config.json").write_text("{}")
    before = set(tmp_path.iterdir())
    for one in (tmp_path / "in" / "m.safetensors", tmp_path / "in"):
        target = tmp_path / "out.safetensors"
        with pytest.raises(WeightError, match="z cannot be packed"):
            pack(one, target)
        with pytest.raises(FormatError, match="not packed"):
            unpack(one, target)
        assert set(tmp_path.iterdir()) == before
    pack(source, tmp_path / "p.safetensors")
    data = bytearray((tmp_path / "p.safetensors").read_bytes())
    data[-100] ^= 1
    (tmp_path / "p.safetensors").write_bytes(data)
    with pytest.raises(FormatError, match="is damaged"):
        unpack(tmp_path / "p.safetensors", tmp_path / "out.safetensors")
    assert set(tmp_path.iterdir()) == before | {tmp_path / "p.safetensors"}


@pytest.mark.parametrize("length", [40, 120, 240])
@pytest.mark.parametrize("letter", ["a", "ä", "漢"])
def test_long_names(source: Path, tmp_path: Path, letter: str, length: int) -> None:
    """A name may take 255 bytes; the temporary one is no longer."""
    name = letter * (length // len(letter.encode()))
    pack(source, tmp_path / f"{name}.safetensors")
    ggpass.save(nn.Linear(3, 3), tmp_path / f"{name}.safetensors")
    assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors", f"{name}.safetensors"}


def test_existing_outputs_are_refused_and_replaced_when_asked(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "p.safetensors"
    for make in (lambda: target.write_text("old"), lambda: target.symlink_to("nothing"), target.mkdir):
        make()
        with pytest.raises(GgpassError, match="exists already"):
            pack(source, target)
        with pytest.raises(GgpassError, match="exists already"):
            refuse_existing(target)
        pack(source, target, replace=True)
        PackedFile(target).read_all()
        target.unlink()
    with pytest.raises(GgpassError, match="outside"):
        pack(source, source, replace=True)


KILLED = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    from ggpass.file import pack
    name = sys.argv[3]
    real, calls = getattr(os, name), [0]
    def dying(*arguments, **keywords):
        calls[0] += 1
        if calls[0] == int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **keywords)
    setattr(os, name, dying)
    pack(sys.argv[1], sys.argv[2], replace=True)
    print("whole")
    """
)


@pytest.mark.parametrize("call", ["rename", "replace", "fsync"])
def test_a_kill_at_any_rename_leaves_the_old_or_the_new(source: Path, tmp_path: Path, call: str) -> None:
    """Of a file that is replaced: at any moment one of the two has its name, and the next run finishes."""
    old = tmp_path / "old.safetensors"
    pack(source, old, "int8")
    pack(source, tmp_path / "new.safetensors", "rf8")
    states = {old.read_bytes(), (tmp_path / "new.safetensors").read_bytes()}
    for at in range(1, 6):
        target = tmp_path / "p.safetensors"
        target.write_bytes(old.read_bytes())
        command = [sys.executable, "-c", KILLED, str(source), str(target), call, str(at)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert target.read_bytes() in states
        if "whole" in run.stdout:
            break
        assert run.returncode == -9, run.stderr
        pack(source, target, replace=True)
        assert target.read_bytes() == (tmp_path / "new.safetensors").read_bytes()
    assert not list(tmp_path.glob(f".*{PART_SUFFIX}"))
