"""Load the CPU kernels of this machine, building them into the disk cache at the first use."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from ggpass.errors import KernelsUnavailable
from ggpass.kernels import cache
from ggpass.kernels.cpu.isa import Isa, detect
from ggpass.kernels.cpu.kernels import CpuKernels
from ggpass.kernels.cpu.parallel import connect

_HERE = Path(__file__).parent
_loaded: dict[tuple[Isa, Path], CpuKernels] = {}
_lock = threading.Lock()


def load(isa: Isa | None = None, directory: Path | None = None) -> CpuKernels:
    """Return the kernels for `isa` (this machine's if None), once for a process.

    Args:
        directory: where built libraries are kept; the user's cache directory if None.

    Raises:
        KernelsUnavailable: with the reason and the next action.
    """
    isa = detect() if isa is None else isa
    directory = cache.default_directory() if directory is None else directory
    with _lock:
        if (isa, directory) not in _loaded:
            _loaded[isa, directory] = _open(isa, fetch(isa, _build, directory))
        return _loaded[isa, directory]


def key(isa: Isa) -> str:
    """Return sixteen hex digits that change whenever the generated code for a CPU could."""
    return cache.key_of(repr(isa), (*sorted((_HERE / "generate").glob("*.py")), _HERE / "regimes.py"))


def fetch(isa: Isa, build: Callable[[Isa, Path], None], directory: Path | None = None) -> Path:
    """Return the checked library for `isa`, built by `build(isa, path)` if there is none yet.

    If TVM is not installed, a library that any TVM version built from the same generator serves.

    Raises:
        KernelsUnavailable: there is no library and it cannot be built, or the directory cannot be written.
    """
    directory = cache.default_directory() if directory is None else directory
    stem, tvm = f"{isa.name}-{key(isa)}", cache.version_of("apache-tvm")
    if tvm is None:
        found = [path for path in sorted(directory.glob(f"{stem}-tvm*.so")) if cache.whole(path)]
        if found:
            return found[-1]
        raise KernelsUnavailable(
            f"no built {isa.name} kernels in {directory} and apache-tvm is not installed to build them; "
            "run `pip install 'ggpass[tvm]'`"
        )
    return cache.obtain(directory / f"{stem}-tvm{tvm}.so", lambda path: build(isa, path))


def _build(isa: Isa, path: Path) -> None:
    try:
        from ggpass.kernels.cpu.generate.module import build
    except ImportError as error:
        raise KernelsUnavailable(
            f"apache-tvm cannot be imported ({error}); run `pip install --force-reinstall 'ggpass[tvm]'`"
        ) from error
    build(isa, path)


def _open(isa: Isa, path: Path) -> CpuKernels:
    import tvm_ffi

    try:
        module = tvm_ffi.load_module(str(path.resolve()))
    except (OSError, RuntimeError) as error:
        raise KernelsUnavailable(
            f"cannot load the built kernels {path} ({error}); delete the file to build it anew"
        ) from error
    return CpuKernels(isa, module.get_function, connect(path.resolve()))
