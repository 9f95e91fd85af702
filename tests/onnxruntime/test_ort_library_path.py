"""Where the custom-op library lies, and what is said where there is none."""

import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from support.ort_models import library

from ggpass.errors import GgpassError
from ggpass.onnxruntime import library as module


def test_the_printed_path_is_the_library() -> None:
    done = subprocess.run([sys.executable, "-m", "ggpass.onnxruntime"], capture_output=True, text=True, check=False)
    assert done.stdout == f"{library()}\n"
    assert Path(library()).read_bytes()[:4] == b"\x7fELF"


def test_the_library_needs_nothing_but_the_c_library() -> None:
    """Hosts in other languages have neither TVM nor Python at hand."""
    done = subprocess.run(["ldd", library()], capture_output=True, text=True, check=True)
    needed = {Path(line.split()[0]).name.split(".")[0] for line in done.stdout.splitlines()}
    assert needed <= {"linux-vdso", "libc", "libm", "libpthread", "libdl", "ld-linux-x86-64", "ld-linux-aarch64"}


def absent(name: str) -> ModuleSpec | None:
    return None


def test_without_a_library_the_reason_of_the_build_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = ModuleType("ggpass._onnxruntime_missing")
    missing.REASON = "apache-tvm is not installed where the wheel was built"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, missing.__name__, missing)
    monkeypatch.setattr(module, "find_spec", absent)
    with pytest.raises(GgpassError, match=r"no ONNX Runtime library: apache-tvm is not installed.*pip install"):
        module.library_path()


def test_a_package_that_was_never_built_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", absent)
    monkeypatch.setitem(sys.modules, "ggpass._onnxruntime_missing", None)
    with pytest.raises(GgpassError, match="put on the path without being built"):
        module.library_path()
