"""The disk cache: built once, never half a file, damaged ones built anew, and no TVM needed to use it."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from ggpass.errors import KernelsUnavailable
from ggpass.kernels import cache
from ggpass.kernels.cpu import library
from ggpass.kernels.cpu.isa import AVX2, NEON
from ggpass.kernels.cpu.library import load


class Build:
    """Writes a stand-in library and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, isa, path: Path) -> None:
        self.count += 1
        path.write_bytes(b"library" * 1000)


def test_a_library_is_built_once_and_then_found(tmp_path: Path) -> None:
    build = Build()
    first = library.fetch(AVX2, build, tmp_path)
    assert library.fetch(AVX2, build, tmp_path) == first
    assert build.count == 1
    assert library.fetch(NEON, build, tmp_path) != first


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "checksum gone", "checksum garbled"])
def test_a_damaged_library_is_built_anew_and_logged(tmp_path: Path, caplog, damage: str) -> None:
    build = Build()
    path = library.fetch(AVX2, build, tmp_path)
    checksum = path.with_name(path.name + ".sha256")
    good = path.read_bytes()
    match damage:
        case "truncated":
            path.write_bytes(good[:1000])
        case "flipped":
            path.write_bytes(good[:10] + b"\0" + good[11:])
        case "empty":
            path.write_bytes(b"")
        case "checksum gone":
            checksum.unlink()
        case _:
            checksum.write_bytes(b"\xff\xfe")
    with caplog.at_level(logging.WARNING, logger="ggpass"):
        library.fetch(AVX2, build, tmp_path)
    assert build.count == 2
    assert path.read_bytes() == good
    assert damage == "checksum gone" or "building them again" in caplog.text


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(isa, path: Path) -> None:
        path.write_bytes(b"half")
        raise KernelsUnavailable("no linker; install one")

    with pytest.raises(KernelsUnavailable, match="no linker"):
        library.fetch(AVX2, fail, tmp_path)
    assert not list(tmp_path.glob("*.so"))
    assert library.fetch(AVX2, Build(), tmp_path).exists()


def test_what_is_cached_is_the_users_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = library.fetch(AVX2, Build(), tmp_path / "ggpass" / "kernels")
    finally:
        os.umask(before)
    assert (path.parent.stat().st_mode & 0o777, path.parent.parent.stat().st_mode & 0o777) == (0o700, 0o700)
    assert {file.stat().st_mode & 0o177 for file in path.parent.iterdir()} == {0}


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from ggpass.kernels.cpu import library
        from ggpass.kernels.cpu.isa import AVX2
        def build(isa, path):
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        library.fetch(AVX2, build, Path(sys.argv[1]))
    """)
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == -signal.SIGKILL
        assert len(list(tmp_path.glob(".build-*"))) == 1
    others = tmp_path / ".build-old-1", tmp_path / ".build-new-1"
    for folder in others:
        folder.mkdir()
    os.utime(others[0], (1, 1))
    library.fetch(AVX2, Build(), tmp_path)
    assert list(tmp_path.glob(".build-*")) == [others[1]]


def test_builds_of_many_files_at_once_do_not_trip_over_each_others_folders(tmp_path: Path) -> None:
    def build(path: Path) -> None:
        path.write_bytes(b"kernel")

    names = [tmp_path / f"{i}.so" for i in range(400)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda path: cache.obtain(path, build), names)) == names
    assert not list(tmp_path.glob(".build-*"))


@pytest.mark.parametrize("free", [1 << 20, 1 << 40])
def test_a_linker_that_fails_on_a_full_disk_asks_for_space(tmp_path: Path, monkeypatch, free: int) -> None:
    pytest.importorskip("tvm")
    from ggpass.kernels.cpu.generate import module

    class Compiled:
        @staticmethod
        def write_to_file(path: str) -> None:
            Path(path).write_bytes(b"cut off")

    monkeypatch.setattr(module, "compile_module", lambda isa: Compiled)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    match = (
        "(?s)No space left on device.*free some space" if free < module.LEAST_FREE else "(?s)could not link.*binutils"
    )
    with pytest.raises(KernelsUnavailable, match=match):
        library.fetch(AVX2, library._build, tmp_path)
    assert not list(tmp_path.glob(".build-*"))


def test_without_tvm_a_library_of_any_tvm_version_serves(tmp_path: Path, monkeypatch) -> None:
    path = library.fetch(AVX2, Build(), tmp_path)
    version_of = cache.version_of
    monkeypatch.setattr(cache, "version_of", lambda name: None if name == "apache-tvm" else version_of(name))
    build = Build()
    assert library.fetch(AVX2, build, tmp_path) == path
    path.write_bytes(b"damaged")
    with pytest.raises(KernelsUnavailable, match=r"pip install 'ggpass\[tvm\]'"):
        library.fetch(AVX2, build, tmp_path)
    assert build.count == 0


def test_a_directory_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(KernelsUnavailable, match="make it writable"):
        library.fetch(AVX2, Build(), tmp_path / "file" / "kernels")


def test_the_key_follows_the_generator(tmp_path: Path, monkeypatch) -> None:
    before = library.key(AVX2)
    assert library.key(NEON) != before
    version_of = cache.version_of
    monkeypatch.setattr(cache, "version_of", lambda name: "9" if name == "apache-tvm-ffi" else version_of(name))
    assert library.key(AVX2) != before


def test_two_processes_that_start_together_build_once(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from ggpass.kernels.cpu import library
        from ggpass.kernels.cpu.isa import AVX2
        folder = Path(sys.argv[1])
        def build(isa, path):
            with (folder / "log").open("a") as log:
                log.write("built\\n")
            with path.open("wb") as out:
                for _ in range(20):
                    out.write(b"part")
                    out.flush()
                    time.sleep(0.05)
        assert library.fetch(AVX2, build, folder).read_bytes() == b"part" * 20
    """)
    runs = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(3)]
    assert [run.wait(120) for run in runs] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_real_library_is_rebuilt_when_truncated(tmp_path: Path, monkeypatch) -> None:
    """End to end with the generator, on its smallest kernel."""
    pytest.importorskip("tvm")
    from ggpass.kernels.cpu.generate import module
    from ggpass.kernels.cpu.generate.decoders import decoders
    from ggpass.kernels.cpu.generate.dequantize import dequantize_kernel

    isa = library.detect()
    kernel = dequantize_kernel(isa, decoders(isa)[0]).with_attr("global_symbol", "dequantize")
    monkeypatch.setattr(module, "module", lambda isa: module.tvm.IRModule({"dequantize": kernel}))
    path = library.fetch(isa, library._build, tmp_path)
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    assert library.fetch(isa, library._build, tmp_path) == path
    assert len(path.read_bytes()) == len(good)


def test_cached_kernels_run_without_importing_tvm() -> None:
    try:
        load()
    except KernelsUnavailable as reason:
        pytest.skip(str(reason))
    script = textwrap.dedent("""
        import sys
        sys.modules["tvm"] = None
        import torch
        from ggpass.formats.rf8 import RF8_CODEBOOK
        from ggpass.kernels.cpu.library import load
        codes = torch.full((3, 100), 0x7B, dtype=torch.uint8)
        y = load().linear(torch.ones(1, 100), codes, torch.ones(1), None, RF8_CODEBOOK)
        assert y.tolist() == [[100.0] * 3]
        assert not any(name == "tvm" or name.startswith("tvm.") for name in sys.modules if sys.modules[name])
    """)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
