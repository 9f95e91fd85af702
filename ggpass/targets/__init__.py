"""The targets. A new one is a file here and a name in the loop below; elsewhere, a call of `register`."""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from ggpass.errors import FormatError, TargetError
from ggpass.formats import FORMATS, Format, get_format
from ggpass.kernels.cpu.memory import aligned_empty
from ggpass.lowering.operators import REFERENCE
from ggpass.targets.base import TARGETS, Target, register
from ggpass.targets.cpu import CpuTarget
from ggpass.targets.cuda import CudaTarget
from ggpass.targets.onnx import OnnxTarget

logger = logging.getLogger("ggpass")

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


def place(
    target: str | None, device: str | torch.device | None, model: object
) -> tuple[Target, Format | None, torch.device | None]:
    """Return what is to compute with a loaded model, in which format, and where the model goes.

    Args:
        target: a target string, or a target's name alone, which takes any format; None: that of the device, or the
            reference if it has none that can be used here.
        device: torch's; None: where the target computes, or else where the model is.
        model: that is loaded into.

    Returns:
        The Target, the format (None: any), and the device (None: the model stays where it is).

    Raises:
        TargetError: an unknown or unusable target, or an unknown device.
    """
    if device is not None and not isinstance(device, torch.device):
        if _torch_device(device) is None and device in TARGETS:
            logger.warning("ggpass.load(device=%r) names a target, not a device; write target=%r", device, device)
            target, device = target or device, None
        elif (device := _torch_device(name := device)) is None:
            raise TargetError(f"{name!r} is no device of torch; a target is given as target=; {_choices()}")
    if device is None and target is not None:
        device = _torch_device(target.partition("-")[2] or target)
    if device is None and isinstance(model, nn.Module):
        device = next((p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")), None)
    if target is None:
        found = TARGETS.get(device.type if device else "cpu", REFERENCE_TARGET)
        return (REFERENCE_TARGET if found.unavailable() else found), None, device
    if target not in TARGETS:
        fmt, found = resolve(target)
        return found, fmt, device
    reason = TARGETS[target].unavailable()
    if reason:
        raise TargetError(f"target {target!r} cannot be used here: {reason}; {_choices()}")
    return TARGETS[target], None, device


def _torch_device(name: str) -> torch.device | None:
    try:
        return torch.device(name)
    except RuntimeError:  # no such device
        return None


__all__ = ["TARGETS", "Target", "place", "register", "resolve"]
