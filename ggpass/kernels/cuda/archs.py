"""GPU architectures: which cubins are built, and which cubin runs on which device.

A cubin for sm_XY runs on every device of the same major number X and a minor number of at least Y (CUDA C++
Programming Guide, "Binary Compatibility"): sm_80 serves 8.0, 8.6 and 8.7, sm_90 serves 9.0, sm_100 serves 10.0 and
10.3. A cubin for sm_90a runs on 9.0 and on nothing else. Nothing of ours serves a major number that is not in ARCHS
(sm_110, sm_120): there a kernel is compiled for the device itself, without PTX.
"""

from __future__ import annotations

import re

from ggpass.errors import KernelsUnavailable

#: What the kernels are tested for.
ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100")

#: The first capability with bfloat16 in the tensor cores and asynchronous copies.
OLDEST = (8, 0)

Capability = tuple[int, int]

_ARCH = re.compile(r"sm_(\d+)(\d)(a?)")


def parse(arch: str) -> tuple[Capability, bool]:
    """ "sm_90a" -> ((9, 0), True): the capability, and whether it serves that one alone.

    Raises:
        KernelsUnavailable: no such name, or one older than the kernels can be built for.
    """
    match = _ARCH.fullmatch(arch) if isinstance(arch, str) else None
    if match is None:
        raise KernelsUnavailable(f"{arch!r} is no GPU architecture; name one like {', '.join(ARCHS)}")
    capability = int(match[1]), int(match[2])
    if capability < OLDEST:
        raise KernelsUnavailable(
            f"the kernels need {name_of(OLDEST)} or newer, not {arch}; name one of {', '.join(ARCHS)}"
        )
    return capability, bool(match[3])


def name_of(capability: Capability) -> str:
    """(8, 6) -> "sm_86"."""
    return f"sm_{capability[0]}{capability[1]}"


def serves(arch: str, capability: Capability) -> bool:
    """Return True if a cubin for `arch` runs on a device of this capability."""
    built, alone = parse(arch)
    return built == capability or (not alone and built[0] == capability[0] and built[1] <= capability[1])


def arch_for(capability: Capability) -> str:
    """Return the architecture to build for a device: the newest of ARCHS that serves it, else the device's own."""
    fitting = [arch for arch in ARCHS if serves(arch, capability)]
    return fitting[-1] if fitting else name_of(capability)
