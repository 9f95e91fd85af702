"""Instruction sets: which vector width and which decode a CPU gets.

Nothing here imports tvm: a process that only runs cached kernels must know its instruction set too.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Isa:
    """One CPU family for which the kernels are generated.

    `code_bytes` is how many codes one step decodes (one byte vector); a float vector has a quarter of it.
    `decode` names the family: "shuffle" (16-entry byte tables in a register) or "bits" (plain arithmetic).
    With `shift_by_multiply`, shifts are written as multiplications: on AMD's Zen they compete with the shuffles for
    two of the four vector ports, which multiplications leave alone (one thread, M = 1: 16.2 -> 17.2 GB/s of codes).
    """

    name: str
    triple: str
    cpu: str
    features: tuple[str, ...]
    code_bytes: int
    decode: str
    shift_by_multiply: bool = False

    @property
    def lanes(self) -> int:
        """float32 lanes of one vector."""
        return self.code_bytes // 4


X86 = "x86_64-unknown-linux-gnu"
ARM = "aarch64-unknown-linux-gnu"

AVX2 = Isa("avx2", X86, "x86-64-v3", (), 32, "shuffle")
AVX2_ZEN = Isa("avx2-zen", X86, "znver3", (), 32, "shuffle", shift_by_multiply=True)
AVX512 = Isa("avx512", X86, "x86-64-v4", (), 64, "shuffle")
NEON = Isa("neon", ARM, "generic", ("+neon",), 16, "shuffle")
#: Any 64-bit CPU of the host's architecture: no shuffle tables, no special instructions.
PORTABLE_X86 = Isa("portable-x86", X86, "x86-64", (), 16, "bits")
PORTABLE_ARM = Isa("portable-arm", ARM, "generic", (), 16, "bits")

ALL = (AVX2, AVX2_ZEN, AVX512, NEON, PORTABLE_X86, PORTABLE_ARM)

_NEEDED_FLAGS = {
    AVX512: {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd", "fma"},
    AVX2: {"avx2", "fma", "bmi2", "f16c", "movbe", "abm"},
}


def portable() -> Isa:
    """Return the fallback for this machine's architecture."""
    return PORTABLE_ARM if platform.machine() in {"aarch64", "arm64"} else PORTABLE_X86


def detect(cpuinfo: Path = Path("/proc/cpuinfo")) -> Isa:
    """Return the best instruction set of this machine; the portable one if it cannot be recognized."""
    if portable() is PORTABLE_ARM:
        return NEON
    flags = set(_field(cpuinfo, "flags").split())
    isa = next((isa for isa, needed in _NEEDED_FLAGS.items() if needed <= flags), PORTABLE_X86)
    zen3 = "vaes" in flags and _field(cpuinfo, "vendor_id") == "AuthenticAMD"
    return AVX2_ZEN if isa is AVX2 and zen3 else isa


def _field(cpuinfo: Path, name: str) -> str:
    """Return the first value of `name` in /proc/cpuinfo; empty if there is none."""
    try:
        lines = cpuinfo.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return ""
    line = next((line for line in lines if line.split(":")[0].strip() == name), "")
    return line.partition(":")[2].strip()
