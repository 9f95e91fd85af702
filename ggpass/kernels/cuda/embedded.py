"""Where a kernel comes from: carried by a file that was loaded, else the disk cache, else built."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

from ggpass.kernels.cuda import cubins
from ggpass.kernels.cuda.archs import Capability, arch_for, parse, serves
from ggpass.kernels.cuda.cubins import Cubin, Generate, Named, generated
from ggpass.kernels.unavailable import KernelsUnavailable


class Embedded:
    """The cubins that came with loaded files. Any thread may ask.

    Attributes:
        generation: counts up with every file, so that what was not there before is looked for again.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._cubins: dict[tuple[str, str], Cubin] = {}
        self._lock = threading.Lock()

    def add(self, brought: Iterable[Cubin]) -> list[str]:
        """Register cubins.

        Returns:
            For each that cannot be used by this version of ggpass its name.
        """
        now, foreign = cubins.interface(), []
        with self._lock:
            for cubin in brought:
                if cubin.interface == now:
                    self._cubins[cubin.name, cubin.arch] = cubin
                else:
                    foreign.append(f"{cubin.name} for {cubin.arch}")
            self.generation += 1
        return foreign

    def find(self, name: str, capability: Capability, newest: int | None = None) -> Cubin | None:
        """The cubin of a variant that runs on a device of this capability, the one for the newest architecture."""
        with self._lock:
            fitting = [
                cubin
                for (held, arch), cubin in self._cubins.items()
                if held == name and serves(arch, capability) and (newest is None or cubin.cuda <= newest)
            ]
        return max(fitting, key=lambda cubin: parse(cubin.arch), default=None)

    def archs(self) -> list[str]:
        """The architectures that anything was carried for."""
        with self._lock:
            return sorted({arch for _, arch in self._cubins})

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._cubins.clear()
            self.generation += 1


#: What the files carried that this process loaded.
EMBEDDED = Embedded()


def find(
    variant: Named,
    capability: Capability,
    newest: int | None = None,
    *,
    directory: Path | None = None,
    generate: Generate = generated,
) -> Cubin:
    """The cubin of a variant for a device: carried, cached, or built now.

    Args:
        capability: of the device.
        newest: the driver's CUDA release.

    Raises:
        KernelsUnavailable: none can be had, with the reason and the next action.
    """
    carried = EMBEDDED.find(variant.name, capability, newest)
    if carried is not None:
        return carried
    try:
        return cubins.obtain(variant, arch_for(capability), newest, directory=directory, generate=generate)
    except KernelsUnavailable as error:
        there = EMBEDDED.archs()
        also = f"; loaded files carry other kernels, for {', '.join(there)}" if there else ""
        raise KernelsUnavailable(f"{error}{also}") from error
