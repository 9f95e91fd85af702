"""θ ← sign(θ)·max(|θ| − τ·(|θ| + ε)^(ν−1), 0), and the same slope as a gradient; in place, a block at a time."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ggpass.training.grid import flat_blocks

#: Elements worked on at a time on the CPU: a block and its copies stay in the cache.
CPU_BLOCK = 1 << 16

#: The same on a device with its own memory, where a kernel launch is what costs.
DEVICE_BLOCK = 1 << 24


def shrink_(weight: Tensor, log_threshold: float, shape: float, epsilon: float) -> None:
    """θ ← sign(θ)·max(|θ| − τ·(|θ| + ε)^(ν−1), 0).

    1. No weight crosses zero; one whose threshold exceeds it becomes exactly zero, and zero stays zero.
    2. Computed in float32 (float64 where the weight is), and rounded once.

    Args:
        weight: floating, any shape and strides; changed in place.
        log_threshold: ln τ; −∞ changes nothing.
        shape: ν > 0.
        epsilon: ε ≥ 0.
    """
    for block in _blocks(weight, log_threshold):
        threshold = _slope(block, log_threshold, shape, epsilon)
        if isinstance(threshold, float):
            block.sub_(block.clamp(-threshold, threshold))
        else:
            # θ − clamp(θ, −t, t) is θ − sign(θ)·t where |θ| > t and exactly 0 elsewhere.
            step = torch.minimum(block, threshold)
            block.sub_(torch.maximum(step, threshold.neg_(), out=step))


def add_slope_(gradient: Tensor, weight: Tensor, log_factor: float, shape: float, epsilon: float) -> None:
    """g ← g + τ·sign(θ)·(|θ| + ε)^(ν−1): the rate's gradient joins the task's.

    Args:
        gradient: of the weight's shape; changed in place.
        weight: floating, any shape; with ε = 0 its exact zeros give 0.
        log_factor: ln τ.
        shape, epsilon: ν and ε.
    """
    if log_factor == -math.inf or not weight.numel():
        return
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    slope = _slope(wide, log_factor, shape, epsilon)
    sign = wide.sign()
    if isinstance(slope, float):
        gradient.add_(sign.mul_(slope).to(gradient.dtype))
    else:
        gradient.add_(torch.where(sign == 0, 0.0, sign * slope).to(gradient.dtype))


def _blocks(weight: Tensor, log_threshold: float) -> Iterator[Tensor]:
    """Blocks in at least float32 that are written back to the weight after each one's turn."""
    if log_threshold == -math.inf:
        return
    size = CPU_BLOCK if weight.device.type == "cpu" else DEVICE_BLOCK
    for block in flat_blocks(weight.detach(), size):
        if block.dtype in (torch.float32, torch.float64):
            yield block
        else:
            wide = block.float()
            yield wide
            block.copy_(wide)


def _slope(block: Tensor, log_factor: float, shape: float, epsilon: float) -> Tensor | float:
    """τ·(|θ| + ε)^(ν−1); a number where ν = 1. By exp and log, which are three times as fast as pow on a CPU."""
    if shape == 1.0:
        return math.exp(log_factor)
    return block.abs().add_(epsilon).log_().mul_(shape - 1).add_(log_factor).exp_()
