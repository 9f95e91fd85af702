"""The shim that runs the kernels' parallel loops on torch's own OpenMP threads (native/parallel.c)."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch  # noqa: F401  (loads the OpenMP run time that the shim looks up)

from ggpass.errors import KernelsUnavailable

logger = logging.getLogger("ggpass")

#: The function pointers of a TVM-built library, and what fills them. A pointer a library does not use is absent.
_HOOKS = {
    "__TVMBackendParallelLaunch": "ggpass_parallel_launch",
    "__TVMBackendAllocWorkspace": "ggpass_workspace_alloc",
    "__TVMBackendFreeWorkspace": "ggpass_workspace_free",
}


@functools.cache
def _shim() -> ctypes.PyDLL:
    spec = find_spec("ggpass._parallel")
    if spec is None or spec.origin is None:
        raise KernelsUnavailable(
            "the native module ggpass._parallel is missing, so ggpass was not installed but only put on the path; "
            "run `pip install .` (or `pip install -e .`) in its source folder"
        )
    shim = ctypes.PyDLL(spec.origin)  # the calls return at once: keeping the interpreter's lock is cheaper
    try:
        shim.ggpass_parallel_inline.argtypes = [ctypes.c_int]
    except AttributeError as error:
        raise KernelsUnavailable(
            f"{spec.origin} was built from another version of ggpass ({error}); run `pip install -e .` again"
        ) from error
    shim.ggpass_parallel_inline.restype = None
    if not shim.ggpass_parallel_init():
        logger.warning("torch brought no OpenMP run time along: the kernels run on one thread")
    return shim


def connect(library: Path) -> Callable[[int], None]:
    """Point the loaded kernel library at the shim.

    The pointers are set in this library alone and not in TVM's process-wide registry: another TVM module in the
    process keeps its own thread pool.

    Returns:
        `inline(on)`: with 1, loops launched from the calling thread run inline until it is called with 0.
    """
    shim, kernels = _shim(), ctypes.CDLL(str(library))
    for hook, function in _HOOKS.items():
        try:
            pointer = ctypes.c_void_p.in_dll(kernels, hook)
        except ValueError:
            continue
        pointer.value = ctypes.cast(getattr(shim, function), ctypes.c_void_p).value
    return shim.ggpass_parallel_inline
