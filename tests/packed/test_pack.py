"""Packing directories: shards in and out, resuming after a kill, a full disk, bounded memory."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.real_models import minilm_folder
from support.staging import left_in

from ggpass import FormatError, GgpassError
from ggpass.file import PackedFile, pack, unpack
from ggpass.packed.staging import Staging
from ggpass.packed.writer import Writer


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    """A Hugging Face directory of two shards, with configuration, tokenizer, a subfolder and a pickle."""
    folder.mkdir()
    tensors = {f"layers.{i}.weight": torch.randn(120, 200) for i in range(4)} | {"norm": torch.randn(200)}
    shards = {"model-00001-of-00002.safetensors": [*tensors][:2], "model-00002-of-00002.safetensors": [*tensors][2:]}
    for shard, names in shards.items():
        save_file({n: tensors[n] for n in names}, folder / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    total = sum(t.numel() * 4 for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    return tensors


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_sharded_directory_comes_back(tmp_path: Path) -> None:
    tensors = sharded(tmp_path / "in")
    before = contents(tmp_path / "in")
    report = pack(tmp_path / "in", tmp_path / "packed", "lossless")
    assert contents(tmp_path / "in") == before
    assert any("pytorch_model.bin" in note and "pickle" in note for note in report.notes)
    packed = contents(tmp_path / "packed")
    assert set(packed) == set(before) - {"pytorch_model.bin"}
    assert packed["config.json"] == before["config.json"]
    # The index is true of the shards beside it, so tools that check total_size agree.
    index = json.loads(packed["model.safetensors.index.json"])
    payload = sum(PackedFile(tmp_path / "packed" / s).packed_bytes(n) for n, s in index["weight_map"].items())
    assert index["metadata"]["total_size"] == payload
    unpack(tmp_path / "packed", tmp_path / "back")
    back = contents(tmp_path / "back")
    assert json.loads(back["model.safetensors.index.json"]) == json.loads(before["model.safetensors.index.json"])
    found: dict[str, torch.Tensor] = {}
    for shard in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        found |= load_file(tmp_path / "back" / shard)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    pack(tmp_path / "in" / "model.safetensors.index.json", tmp_path / "by-index", "rf8")
    assert (tmp_path / "by-index" / "config.json").exists()


def test_plain_transformers_loads_an_unpacked_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pack(minilm_folder(), tmp_path / "packed", "rf8")
    unpack(tmp_path / "packed", tmp_path / "back")
    model = transformers.AutoModel.from_pretrained(tmp_path / "back", local_files_only=True)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "packed", local_files_only=True)
    with PackedFile(tmp_path / "packed" / "model.safetensors") as opened:
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, opened.read(name))


def test_what_stands_in_the_way_is_said(tmp_path: Path) -> None:
    sharded(tmp_path / "in")
    (tmp_path / "there").mkdir()
    for target, words in (("there", "exists already"), ("no/where", "no directory"), ("in/side", "inside")):
        with pytest.raises(GgpassError, match=words):
            pack(tmp_path / "in", tmp_path / target)
    shard = tmp_path / "in" / "model-00001-of-00002.safetensors"
    with pytest.raises(GgpassError, match=r"named \.safetensors"):
        pack(shard, tmp_path / "x.bin")
    for source in ("nothing", "1_Pooling"):
        with pytest.raises(FormatError):
            pack(tmp_path / "in" / source, tmp_path / "x")


#: Packs argv[1] into argv[2]; with argv[3], stops itself or limits its files before it can finish.
PACKER = textwrap.dedent(
    """
    import os, signal, sys, resource
    from pathlib import Path
    from ggpass.file import pack
    count = 0
    def progress(name, done, total):
        global count
        count += 1
        if sys.argv[3] == "kill" and count == int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[3] == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))
    pack(sys.argv[1], sys.argv[2], "rf8", threads=1, progress=progress)
    """
)


def run_packer(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PACKER, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_a_kill_leaves_the_source_and_no_target_and_is_resumed(tmp_path: Path) -> None:
    sharded(tmp_path / "in")
    before = contents(tmp_path / "in")
    killed = run_packer(tmp_path / "in", tmp_path / "out", "kill", 5)
    assert killed.returncode == -signal.SIGKILL
    assert contents(tmp_path / "in") == before
    assert not (tmp_path / "out").exists()
    staging = left_in(tmp_path)
    first = staging / "new" / "model-00001-of-00002.safetensors"
    assert first.exists()  # the first shard is whole and is not packed again
    stamp = first.stat().st_mtime_ns
    pack(tmp_path / "in", tmp_path / "out", "rf8")
    assert (tmp_path / "out" / first.name).stat().st_mtime_ns == stamp
    assert not staging.exists()
    pack(tmp_path / "in", tmp_path / "fresh", "rf8")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_killed_file_goes_on_behind_its_last_whole_tensor(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.randn(64, 64) for i in range(6)}
    source, target = tmp_path / "a.safetensors", tmp_path / "p.safetensors"
    save_file(tensors, source)
    assert run_packer(source, target, "kill", 4).returncode == -signal.SIGKILL
    assert not target.exists()
    with (left_in(tmp_path) / "work" / "journal").open("ab") as journal:
        journal.write(b'{"name": "w3", "beg')  # cut off in the middle of a line
    seen: list[str] = []
    write = Writer.write

    def spy(self: Writer, name: str, *rest: object) -> object:
        seen.append(name)
        return write(self, name, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "write", spy)
        pack(source, target, "rf8")
    assert seen == ["w3", "w4", "w5"]
    pack(source, tmp_path / "fresh.safetensors", "rf8")
    assert target.read_bytes() == (tmp_path / "fresh.safetensors").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors", "p.safetensors", "fresh.safetensors"}


@pytest.mark.parametrize("damage", ["part", "plan", "source"])
def test_what_no_longer_fits_is_not_resumed(tmp_path: Path, damage: str) -> None:
    tensors = {f"w{i}": torch.randn(64, 64) for i in range(4)}
    source, target = tmp_path / "a.safetensors", tmp_path / "p.safetensors"
    save_file(tensors, source)
    assert run_packer(source, target, "kill", 4).returncode == -signal.SIGKILL
    method = "rf8"
    if damage == "part":  # a power cut may leave zeros where data should be
        with (left_in(tmp_path) / "work" / "part").open("r+b") as part:
            part.seek(-3000, os.SEEK_END)
            part.write(bytes(100))
    elif damage == "plan":
        method = "int8"
    else:
        time.sleep(0.01)
        save_file({n: t + 1 for n, t in tensors.items()}, source)
    pack(source, target, method)
    pack(source, tmp_path / "fresh.safetensors", method)
    assert target.read_bytes() == (tmp_path / "fresh.safetensors").read_bytes()


def test_a_full_disk_is_said_and_resumed(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.randn(200, 300) for i in range(5)}
    source, target = tmp_path / "a.safetensors", tmp_path / "p.safetensors"
    save_file(tensors, source)
    before = source.read_bytes()
    failed = run_packer(source, target, "full", 120_000)
    assert failed.returncode == 1
    assert "could not be written" in failed.stderr
    assert "make room and run the same command again" in failed.stderr
    assert source.read_bytes() == before
    assert not target.exists()
    pack(source, target, "rf8")
    assert PackedFile(target).names == tuple(tensors)


def test_a_directory_on_a_full_disk(tmp_path: Path) -> None:
    sharded(tmp_path / "in")
    failed = run_packer(tmp_path / "in", tmp_path / "out", "full", 20_000)
    assert failed.returncode == 1
    assert "could not be written" in failed.stderr
    assert not (tmp_path / "out").exists()


def test_two_packs_into_one_file_do_not_mix(tmp_path: Path) -> None:
    with Staging(tmp_path / "p.safetensors", "plan"), pytest.raises(GgpassError, match="another process"):
        Staging(tmp_path / "p.safetensors", "plan")


MEMORY = textwrap.dedent(
    """
    import resource, sys
    import torch, ggpass.file
    from ggpass.file import pack, unpack
    torch.set_num_threads(1)
    pack(sys.argv[2], sys.argv[2] + "-warm.safetensors", sys.argv[4], threads=1)  # code and buffers of the first use
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before = peak()
    pack(sys.argv[1], sys.argv[3], sys.argv[4], threads=1)
    print(peak() - before)
    """
)


@pytest.mark.parametrize("method", ["rf8", "grid:0.05", "lossless"])
def test_memory_is_bounded_by_the_two_largest_tensors(tmp_path: Path, method: str) -> None:
    shape = (2048, 2048)  # 16 MB each, 160 MB in all
    save_file({f"w{i}": torch.randn(shape) for i in range(10)}, tmp_path / "a.safetensors")
    save_file({"w": torch.randn(256, 256)}, tmp_path / "small.safetensors")
    names = [str(tmp_path / name) for name in ("a.safetensors", "small.safetensors", "p.safetensors")]
    command = [sys.executable, "-c", MEMORY, *names, method]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert int(run.stdout) <= 2 * np.prod(shape) * 4


def test_this_system_counts_memory_as_the_test_above_expects() -> None:
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > 2**20
