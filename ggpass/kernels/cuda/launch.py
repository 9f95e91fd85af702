"""A loaded kernel: its parameters packed by name, launched on a stream."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from typing import Any

from ggpass.errors import KernelsUnavailable
from ggpass.kernels.cuda.cubin import Cubin
from ggpass.kernels.cuda.driver import Device, Driver, DriverError, explain_load
from ggpass.kernels.cuda.variants import Launch

#: struct's letter for each parameter's type. Native alignment is that of kernel parameters: both follow the C ABI.
KINDS = {
    **dict.fromkeys(("x", "codes", "scale", "codebook", "bias", "y", "ids", "scratch"), "P"),
    **dict.fromkeys(("m", "n", "k", "scale_stride", "bias_on"), "i"),
}

#: Dynamic shared memory that a block may have without asking.
UNASKED_SHARED = 48 << 10

#: More than any kernel's parameters take; the hardware's limit is 4 KiB.
_PARAMETER_BYTES = 512

# CU_LAUNCH_PARAM_BUFFER_POINTER, _SIZE and _END of cuda.h.
_POINTER, _SIZE, _END = 1, 2, 0


class _Parameters(threading.local):
    """One thread's buffer for parameters. The driver copies it within the launch, and other threads have their own."""

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(_PARAMETER_BYTES)
        self.size = ctypes.c_size_t()
        address, size = ctypes.addressof(self.buffer), ctypes.addressof(self.size)
        self.extra = (ctypes.c_void_p * 5)(_POINTER, address, _SIZE, size, _END)


_parameters = _Parameters()


def layout_of(parameters: Sequence[str]) -> struct.Struct:
    """Return how a kernel's parameters lie in memory.

    Raises:
        KernelsUnavailable: a parameter that this version does not know.
    """
    unknown = [name for name in parameters if name not in KINDS]
    if unknown:
        raise KernelsUnavailable(f"a kernel takes {', '.join(unknown)}, which this ggpass does not know; update ggpass")
    return struct.Struct("@" + "".join(KINDS[name] for name in parameters))


class Kernel:
    """One cubin on one device. Any thread may call.

    Attributes:
        cubin: what was loaded.
        device: onto which.
    """

    def __init__(self, driver: Driver, device: Device, cubin: Cubin) -> None:
        """Load it.

        Raises:
            KernelsUnavailable: the driver does not take it; says whether the driver or the architecture is at fault.
        """
        self.cubin, self.device = cubin, device
        self._driver, self._layout = driver, layout_of(cubin.parameters)
        self._shared = UNASKED_SHARED
        self._context = driver.context(device.index)
        try:
            self._function = driver.load(cubin.image, cubin.entry, device.index, cubin.name)
        except DriverError as error:
            reason = explain_load(error, driver, device, f"kernel {cubin.name}", cubin.arch, cubin.cuda)
            raise KernelsUnavailable(reason) from error

    def prepare(self, launch: Launch) -> None:
        """Ask for the dynamic shared memory of a launch; not for the device, only for the function.

        Raises:
            KernelsUnavailable: more than this device has.
        """
        if launch.shared <= self._shared:
            return
        if launch.shared > self.device.shared:
            raise KernelsUnavailable(
                f"kernel {self.cubin.name} takes {launch.shared} bytes of shared memory, and {self.device.name} has "
                f"{self.device.shared} for a block; report this"
            )
        self._driver.allow_shared(self._function, launch.shared, self.device.index, self.cubin.name)
        self._shared = launch.shared

    def __call__(self, launch: Launch, stream: int, values: dict[str, int]) -> None:
        """Queue it on a stream.

        Args:
            launch: prepared before.
            stream: its handle.
            values: each parameter's, by name: an address or a number.
        """
        mine: Any = _parameters
        self._layout.pack_into(mine.buffer, 0, *[values[name] for name in self.cubin.parameters])
        mine.size.value = self._layout.size
        self._driver.launch(
            self._function, launch.grid, launch.block, launch.shared, stream, mine.extra, self._context, self.cubin.name
        )
