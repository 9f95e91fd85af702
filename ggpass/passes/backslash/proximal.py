"""θ ← sign(θ)·max(|θ| − τ·(|θ| + ε)^(ν−1), 0), and the same slope as a gradient; in place, many tensors at once."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ggpass.ggd.blocks import blocks

#: Elements worked on at a time on the CPU: they and their copies stay in the cache.
CPU_BLOCK = 1 << 16

#: The same on a device of its own, where the number of kernel launches is what costs.
DEVICE_BLOCK = 1 << 25

#: ε is at least this, so that no slope is infinite; added to any weight but zero it is lost.
SMALLEST_EPSILON = 1e-30

#: Bits of a float32 that a narrower dtype drops.
DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}


@dataclass(frozen=True)
class Slope:
    """τ·(|θ| + ε)^(ν−1) for the weights of one tensor.

    Attributes:
        log_factor: ln τ; −∞ for no slope at all.
        shape: ν > 0.
        epsilon: ε ≥ 0.
    """

    log_factor: float
    shape: float
    epsilon: float


@dataclass
class _Batch:
    """Blocks of one device and dtype that are worked on together, with the numbers of each."""

    targets: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    slopes: list[Slope] = field(default_factory=list)
    elements: int = 0

    def values(self) -> list[Tensor]:
        """τ·(|θ| + ε)^(ν−1) of each block, by exp and log: on a CPU they take half the time of pow."""
        found = list(torch._foreach_abs(self.weights))
        torch._foreach_add_(found, [max(slope.epsilon, SMALLEST_EPSILON) for slope in self.slopes])
        torch._foreach_log_(found)
        torch._foreach_mul_(found, [slope.shape - 1 for slope in self.slopes])
        torch._foreach_add_(found, [slope.log_factor for slope in self.slopes])
        torch._foreach_exp_(found)
        return found


def shrink_(weights: Sequence[Tensor], slopes: Sequence[Slope], seed: int = 0) -> None:
    """θ ← sign(θ)·max(|θ| − τ·(|θ| + ε)^(ν−1), 0).

    1. No weight crosses zero; one whose threshold exceeds it becomes exactly zero, and zero stays zero.
    2. Computed in float32, or float64 if the weight is.
    3. A bfloat16 or float16 weight is rounded up or down at random, so that thresholds far below its last bit act in
       the mean: rounded to nearest they would be lost altogether.

    Args:
        weights: floating, any shapes, strides and devices; changed in place.
        slopes: one for each.
        seed: of the rounding in (3); the same seed rounds the same way. A call uses up one for each batch of blocks.
    """
    for number, batch in enumerate(_batches(weights, weights, slopes)):
        if all(slope.shape == 1 for slope in batch.slopes):
            constants = [math.exp(slope.log_factor) for slope in batch.slopes]
            steps = list(torch._foreach_clamp_max(batch.weights, constants))
            torch._foreach_clamp_min_(steps, [-constant for constant in constants])
        else:
            limits = batch.values()
            steps = list(torch._foreach_minimum(batch.weights, limits))
            torch._foreach_neg_(limits)
            torch._foreach_maximum_(steps, limits)
        # θ − clamp(θ, −t, t) is θ − sign(θ)·t if |θ| > t, and exactly 0 if not.
        _subtract(batch, steps, seed + number)


def add_slope_(
    targets: Sequence[Tensor], weights: Sequence[Tensor], slopes: Sequence[Slope], sign: int = 1, seed: int = 0
) -> None:
    """g ← g ± τ·sign(θ)·(|θ| + ε)^(ν−1): the rate's gradient joins the task's, or steps the weights themselves.

    Args:
        targets: g, of the weights' shapes; changed in place. They may be the weights.
        weights: floating, any shapes and devices; an exact zero adds 0.
        slopes: one for each.
        sign: 1 or −1.
        seed: of the rounding to bfloat16 and float16, as in `shrink_`.
    """
    for number, batch in enumerate(_batches(targets, weights, slopes)):
        steps = batch.values()
        torch._foreach_mul_(steps, [-sign * block.sign() for block in batch.weights])
        batch.weights = [
            block if block is target else _wide(target) for block, target in zip(batch.weights, batch.targets)
        ]
        _subtract(batch, steps, seed + number)


def slope_of(weight: Tensor, slope: Slope) -> Tensor:
    """τ·(|θ| + ε)^(ν−1) of each weight: the same shape, float32 or float64."""
    if slope.log_factor == -math.inf:
        return torch.zeros_like(weight)
    return _Batch(weights=[_wide(weight.detach())], slopes=[slope]).values()[0]


def _subtract(batch: _Batch, steps: list[Tensor], seed: int) -> None:
    """target ← wide − step, rounded if the target is narrower."""
    torch._foreach_sub_(batch.weights, steps)
    generators: dict[torch.device, torch.Generator] = {}
    for target, wide in zip(batch.targets, batch.weights):
        if target is not wide:
            if target.device not in generators:
                generator = torch.Generator(target.device)
                generators[target.device] = generator.manual_seed(seed % (1 << 32))  # a CPU's reads no more of it
            target.copy_(_round_at_random(wide, target.dtype, generators[target.device]))


def _round_at_random(wide: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A float32 tensor with the bits that `dtype` drops set to zero, carrying into the kept ones with probability
    dropped/2^bits: its mean over the noise is the value itself. float16's subnormal numbers are left to the cast."""
    bits = DROPPED_BITS[dtype]
    noise = torch.randint(0, 1 << bits, wide.shape, generator=generator, device=wide.device, dtype=torch.int32)
    return noise.add_(wide.view(torch.int32)).bitwise_and_(-(1 << bits)).view(torch.float32)


def _wide(block: Tensor) -> Tensor:
    """Return the block itself, or its copy in float32 if it is narrower."""
    return block.float() if block.dtype in DROPPED_BITS else block


def _batches(targets: Sequence[Tensor], weights: Sequence[Tensor], slopes: Sequence[Slope]) -> Iterator[_Batch]:
    """Return the blocks of all tensors that have a slope, in batches of one device, dtype and kind of slope."""
    open_batches: dict[tuple[torch.device, torch.dtype, bool], _Batch] = {}
    for target, weight, slope in zip(targets, weights, slopes):
        if slope.log_factor == -math.inf:
            continue
        limit = CPU_BLOCK if weight.device.type == "cpu" else DEVICE_BLOCK
        key = (weight.device, weight.dtype, slope.shape == 1)
        for target_block, block in _paired(target, weight, limit):
            batch = open_batches.setdefault(key, _Batch())
            if batch.elements + block.numel() > limit and batch.elements:
                yield open_batches.pop(key)
                batch = open_batches.setdefault(key, _Batch())
            batch.targets.append(target_block)
            batch.weights.append(_wide(block))
            batch.slopes.append(slope)
            batch.elements += block.numel()
    yield from open_batches.values()


def _paired(target: Tensor, weight: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of two tensors of one shape that hold the same elements in the same order."""
    if target is weight:
        for block in blocks(weight.detach(), size):
            yield block, block
    elif target.stride() == weight.stride():
        yield from zip(blocks(target.detach(), size), blocks(weight.detach(), size))
    elif weight.numel():
        yield target.detach(), weight.detach()
