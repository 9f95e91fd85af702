"""Load the CPU kernels of this machine, building them into the disk cache at the first use."""

from __future__ import annotations

import threading
from pathlib import Path

from ggpass.kernels import cache
from ggpass.kernels.cpu.isa import Isa, detect
from ggpass.kernels.cpu.kernels import CpuKernels
from ggpass.kernels.cpu.parallel import connect
from ggpass.kernels.unavailable import KernelsUnavailable

__all__ = ["CpuKernels", "KernelsUnavailable", "load"]

_loaded: dict[tuple[Isa, Path], CpuKernels] = {}
_lock = threading.Lock()


def load(isa: Isa | None = None, directory: Path | None = None) -> CpuKernels:
    """The kernels for `isa` (this machine's where None), once for a process.

    Args:
        directory: where built libraries are kept; the user's cache directory where None.

    Raises:
        KernelsUnavailable: with the reason and the next action.
    """
    isa = detect() if isa is None else isa
    directory = cache.default_directory() if directory is None else directory
    with _lock:
        if (isa, directory) not in _loaded:
            _loaded[isa, directory] = _open(isa, cache.fetch(isa, _build, directory))
        return _loaded[isa, directory]


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
