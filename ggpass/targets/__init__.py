"""The targets. A new one is a file here and a name in the loop below; elsewhere, a call of `register`."""

from collections.abc import Sequence

from ggpass.errors import FormatError, TargetError
from ggpass.formats import FORMATS, Format, get_format
from ggpass.kernels.cpu.memory import aligned_empty
from ggpass.lowering.operators import REFERENCE
from ggpass.targets.base import TARGETS, Target, register
from ggpass.targets.cpu import CpuTarget
from ggpass.targets.cuda import CudaTarget
from ggpass.targets.onnx import OnnxTarget

#: Pure torch on any device: it defines what every other target must compute.
REFERENCE_TARGET = Target("reference", REFERENCE)

for _target in (CpuTarget("cpu", allocate=aligned_empty), CudaTarget("cuda"), REFERENCE_TARGET, OnnxTarget("onnx")):
    register(_target)


def _choices() -> str:
    devices = ", ".join(f"{t.name} ({t.unavailable() or 'available'})" for t in TARGETS.values())
    return f"formats: {', '.join(FORMATS)}; devices: {devices}"


def resolve(target: str, archs: Sequence[str] = ()) -> tuple[Format, Target]:
    """`format-device` → (Format, Target): a target string splits at its first dash.

    Args:
        archs: architectures to build for ahead of time; empty for this machine.

    Raises:
        TargetError: an unknown half, or a device that cannot be used here; lists both halves with the reasons.
    """
    if not isinstance(target, str):
        raise TargetError(f"a target is a string FORMAT-DEVICE, as in 'rf8-cpu', not {target!r}; {_choices()}")
    name, dash, device = target.partition("-")
    if not dash:
        raise TargetError(f"a target is FORMAT-DEVICE, as in 'rf8-cpu', not {target!r}; {_choices()}")
    try:
        fmt = get_format(name)
    except FormatError as error:
        raise TargetError(f"target {target!r}: {error}; {_choices()}") from None
    if device not in TARGETS:
        raise TargetError(f"target {target!r}: there is no device {device!r}; {_choices()}")
    found = TARGETS[device].for_archs(archs) if archs else TARGETS[device]
    reason = found.unavailable()
    if reason:
        raise TargetError(f"target {target!r} cannot be used here: {reason}; {_choices()}")
    return fmt, found


__all__ = ["TARGETS", "Target", "register", "resolve"]
