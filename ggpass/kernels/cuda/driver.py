"""The NVIDIA driver through ctypes: devices, modules, launches. Nothing is loaded before the first question.

Modules are loaded into each device's primary context, which is torch's. A launch allocates nothing on the device and
waits for nothing, so that it can be captured in a CUDA graph; loading a module cannot.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_int, c_uint, c_void_p
from dataclasses import dataclass
from typing import Any

from ggpass.errors import GgpassError, KernelsUnavailable
from ggpass.kernels.cuda.archs import OLDEST, Capability, name_of
from ggpass.kernels.cuda.compiler import DRIVER_BRANCH

LIBRARY = "libcuda.so.1"

#: The oldest driver whose CUDA release any compiler of ours builds for.
OLDEST_CUDA = 12

# CUresult, CUdevice_attribute and CUfunction_attribute of cuda.h.
NO_DEVICE = 100
INVALID_IMAGE, NO_BINARY_FOR_GPU = 200, 209
_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _SHARED_OPTIN = 75, 76, 97
_MAX_DYNAMIC_SHARED = 8

#: Every function we call, with its arguments' types; all return a CUresult.
_CALLS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxGetCurrent": (POINTER(c_void_p),),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuStreamIsCapturing": (c_void_p, POINTER(c_int)),
    "cuLaunchKernel": (c_void_p, *(c_uint,) * 7, c_void_p, c_void_p, c_void_p),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}


class DriverError(GgpassError, RuntimeError):
    """A call of the driver failed.

    Attributes:
        code: its CUresult.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Device:
    """One GPU as the driver shows it to this process.

    Attributes:
        index: as in torch's "cuda:index".
        name: as "NVIDIA H100 80GB HBM3".
        capability: as (9, 0).
        shared: bytes of shared memory that one block can have.
    """

    index: int
    name: str
    capability: Capability
    shared: int

    @property
    def arch(self) -> str:
        """Return its own architecture, as "sm_90"."""
        return name_of(self.capability)

    def reason_against(self) -> str:
        """Why the kernels do not run on it; empty if they do."""
        if self.capability >= OLDEST:
            return ""
        return f"the kernels need {name_of(OLDEST)} or newer, and this is {self.name} ({self.arch})"


class _Current(threading.local):
    """One thread's room for its current context, made once: launches are many."""

    def __init__(self) -> None:
        self.context = c_void_p()
        self.reference = ctypes.byref(self.context)


_current = _Current()


class Driver:
    """The loaded driver. Any thread may call.

    Attributes:
        version: the CUDA release it supports, as (13, 0).
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        """Initialize.

        Raises:
            DriverError: it cannot be; NO_DEVICE if there is no GPU.
            AttributeError: the library lacks a function.
        """
        self._calls: dict[str, Any] = {}
        for name, types in _CALLS.items():
            self._calls[name] = getattr(library, name)
            self._calls[name].argtypes, self._calls[name].restype = types, c_int
        self._launch, self._current = self._calls["cuLaunchKernel"], self._calls["cuCtxGetCurrent"]
        self._contexts: dict[int, int] = {}
        self._lock = threading.Lock()
        self._call("cuInit", 0)
        version = c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        self.version = version.value // 1000, version.value % 1000 // 10

    def _call(self, name: str, *arguments: Any, what: str = "") -> None:
        code = self._calls[name](*arguments)
        if code:
            raise self.error(name, code, what)

    def error(self, call: str, code: int, what: str = "") -> DriverError:
        """Return the error of a call, by the driver's own name and words for its code."""
        texts = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = c_char_p()
            failed = self._calls[name](code, ctypes.byref(text))
            texts.append("" if failed or not text.value else text.value.decode(errors="replace"))
        name, words = texts[0] or f"CUDA error {code}", texts[1] or "no text"
        return DriverError(f"{call} failed{f' for {what}' if what else ''}: {name} ({words})", code)

    def count(self) -> int:
        """Return how many devices this process sees."""
        count = c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        return count.value

    def device(self, index: int) -> Device:
        """Return the device torch calls "cuda:index"."""
        handle, name = c_int(), ctypes.create_string_buffer(256)
        self._call("cuDeviceGet", ctypes.byref(handle), index, what=f"cuda:{index}")
        self._call("cuDeviceGetName", name, len(name), handle)
        values = []
        for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _SHARED_OPTIN):
            value = c_int()
            self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, handle)
            values.append(value.value)
        return Device(index, name.value.decode(errors="replace"), (values[0], values[1]), values[2])

    def devices(self) -> list[Device]:
        """Return all of them."""
        return [self.device(index) for index in range(self.count())]

    def context(self, index: int) -> int:
        """Return the primary context of a device, kept for as long as the process lives, as torch keeps it."""
        with self._lock:
            if index not in self._contexts:
                handle, context = c_int(), c_void_p()
                self._call("cuDeviceGet", ctypes.byref(handle), index)
                self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle, what=f"cuda:{index}")
                self._contexts[index] = context.value or 0
            return self._contexts[index]

    @contextmanager
    def entered(self, context: int) -> Iterator[None]:
        """Make a context current on this thread."""
        self._call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(c_void_p()))

    def load(self, image: bytes, entry: str, index: int, what: str) -> int:
        """Return the function `entry` of a cubin, loaded onto a device for as long as the process lives.

        Raises:
            DriverError: the driver does not take it, or it has no such function.
        """
        module, function = c_void_p(), c_void_p()
        with self.entered(self.context(index)):
            self._call("cuModuleLoadData", ctypes.byref(module), image, what=what)
            self._call("cuModuleGetFunction", ctypes.byref(function), module, entry.encode(), what=what)
        return function.value or 0

    def allow_shared(self, function: int, size: int, index: int, what: str) -> None:
        """Let a function have `size` bytes of dynamic shared memory, more than the 48 KiB it may have unasked."""
        with self.entered(self.context(index)):
            self._call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, size, what=f"{what} ({size} bytes)")

    def capturing(self, stream: int) -> bool:
        """Return True if a CUDA graph is being captured from this stream."""
        status = c_int()
        self._call("cuStreamIsCapturing", stream, ctypes.byref(status))
        return status.value != 0

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        block: int,
        shared: int,
        stream: int,
        extra: Any,
        context: int,
        what: str,
    ) -> None:
        """Queue a function on a stream.

        Args:
            function: from `load`.
            grid, block: blocks, and threads in each.
            shared: bytes of dynamic shared memory.
            stream: its handle; 0 is the default stream.
            extra: the `CU_LAUNCH_PARAM_*` array; the driver copies the parameters before this returns.
            context: the device's, in which the function and the stream live.

        Raises:
            DriverError: the launch was refused. What goes wrong on the device shows at a later call, as with torch.
        """
        mine: Any = _current
        self._current(mine.reference)
        # Torch makes a context current on a thread only when it first calls the runtime there.
        if mine.context.value != context:
            with self.entered(context):
                code = self._launch(function, *grid, block, 1, 1, shared, stream, None, extra)
        else:
            code = self._launch(function, *grid, block, 1, 1, shared, stream, None, extra)
        if code:
            raise self.error("cuLaunchKernel", code, f"{what}, grid {grid}, {block} threads, {shared} bytes shared")


def open_driver(library: str | None = None) -> Driver:
    """Return the driver of this machine, once for a process.

    Args:
        library: to load; the system's if None.

    Raises:
        KernelsUnavailable: there is none, it cannot start, or it sees no GPU; with the reason and the next action.
    """
    return _open(LIBRARY if library is None else library)


@functools.lru_cache(maxsize=8)
def _open(library: str) -> Driver:
    try:
        loaded = ctypes.CDLL(library)
    except OSError as error:
        raise KernelsUnavailable(
            f"there is no NVIDIA driver here ({error}); install it on a machine with an NVIDIA GPU"
        ) from error
    try:
        return Driver(loaded)
    except AttributeError as error:
        raise KernelsUnavailable(f"the NVIDIA driver is too old ({error}); update it") from error
    except DriverError as error:
        if error.code == NO_DEVICE:
            raise KernelsUnavailable(_no_device()) from error
        raise KernelsUnavailable(f"the NVIDIA driver does not start: {error}; reboot, or install it again") from error


def _no_device() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    return f"the NVIDIA driver sees no GPU{hidden}; make one visible to this process"


def reason_against(library: str | None = None) -> str:
    """Why no kernel can run on this machine, and what to do about it; empty if one can."""
    try:
        driver = open_driver(library)
        devices = driver.devices()
    except (KernelsUnavailable, DriverError) as error:
        return str(error)
    if not devices:
        return _no_device()
    if driver.version[0] < OLDEST_CUDA:
        return (
            f"the driver supports CUDA {driver.version[0]}.{driver.version[1]}, and the kernels need {OLDEST_CUDA}.0; "
            f"update it to {DRIVER_BRANCH[OLDEST_CUDA]} or newer"
        )
    reasons = [device.reason_against() for device in devices]
    return "" if "" in reasons else f"{'; '.join(dict.fromkeys(reasons))}; use a newer GPU"


def explain_load(error: DriverError, driver: Driver, device: Device, what: str, arch: str, cuda: int) -> str:
    """Why a cubin was not loaded, in words that lead on: an older driver, another architecture, or a damaged image."""
    if driver.version[0] < cuda:
        return (
            f"{what} was built by CUDA {cuda} and the driver supports {driver.version[0]}.{driver.version[1]}; update "
            f"it to {DRIVER_BRANCH.get(cuda, 'a newer one')}, or build with CUDA {driver.version[0]}"
        )
    if error.code in (INVALID_IMAGE, NO_BINARY_FOR_GPU):
        return f"{what} is for {arch} and does not run on {device.name} ({device.arch}): {error}; compile it for that"
    return str(error)
