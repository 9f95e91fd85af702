"""q = round(w / step): a uniform grid of integer symbols of any range, and how coarse it may be.

No codebook and no fixed number of bits: the coder gives each symbol what its frequency costs, so the step alone decides
size and loss. For a model trained with a rate penalty this is the way to its true size.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ggpass.errors import FormatError
from ggpass.ggd.grid import on_grid, symbols_of
from ggpass.ggd.moments import absolute_sums

#: Elements rounded at a time, so that the temporaries stay in the cache.
BLOCK_ELEMENTS = 1 << 18

#: Symbols are stored in 8, 16 or 32 bits before they are coded.
MAX_SYMBOL = (1 << 31) - 1

#: Relative squared error allowed where nothing else is said: 30 dB, a little finer than RF8.
DEFAULT_LOSS = 1e-3


@dataclass(frozen=True)
class GridChoice:
    """How a tensor's step is chosen; exactly one of the three.

    Attributes:
        step: the same for every tensor.
        sigma: the step in units of each tensor's root mean square.
        loss: the coarsest step with Σ(w − ŵ)² ≤ loss·Σw² in each tensor.
    """

    step: float | None = None
    sigma: float | None = None
    loss: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.step, self.sigma, self.loss) if value is not None]
        if len(given) != 1 or not 0 < given[0] < math.inf:
            raise FormatError(f"a grid takes one positive number: step, sigma or loss, not {self}")
        if self.loss is not None and self.loss >= 1:
            raise FormatError(f"a loss of {self.loss} keeps nothing of a weight; give one below 1, such as 1e-3")

    def step_for(self, weight: Tensor) -> float:
        """Return the step for this weight, a positive float32.

        Raises:
            FormatError: NaN or infinity in the weight.
        """
        energy = absolute_sums([weight])[0, 1].item()
        if not math.isfinite(energy):
            raise FormatError("NaN or infinity among the weights; repair or skip this weight")
        rms = math.sqrt(energy / max(1, weight.numel()))
        if self.step is not None:
            return _float32(self.step)
        if rms == 0:
            return 1.0
        if self.sigma is not None:
            return _float32(self.sigma * rms)
        limit = (self.loss or DEFAULT_LOSS) * energy
        # Fine grids err by step² / 12 a weight, which is where the search starts.
        return coarsest_step(lambda step: grid_error(weight, step) <= limit, math.sqrt(12 * limit / weight.numel()))


def _float32(value: float) -> float:
    step = float(np.float32(value))
    if not 0 < step < math.inf:
        raise FormatError(f"a grid step of {value} is no positive float32; choose a larger or smaller one")
    return step


def _blocks(weight: Tensor) -> Iterator[Tensor]:
    """Flat float64 blocks of a contiguous weight."""
    for block in weight.reshape(-1).split(BLOCK_ELEMENTS):
        yield block.double()


def grid_error(weight: Tensor, step: float) -> float:
    """Σ (w − step·round(w / step))², in float64."""
    return sum(float((block - on_grid(block, step)).square_().sum()) for block in _blocks(weight))


def coarsest_step(acceptable: Callable[[float], bool], start: float, precision: float = 1 / 64) -> float:
    """step = max{s : acceptable(s)}, by doubling and then bisection in log s.

    Args:
        acceptable: whether a step loses no more than it may: an error bound, or a trained model's own score with every
            weight on that grid. Taken to hold below some step and to fail above it.
        start: where to begin.
        precision: the ratio between what is returned and what fails is at most 1 + precision.

    Returns:
        A float32 step that was found acceptable.

    Raises:
        FormatError: none within 2^±40 of `start` is.
    """
    at = _float32(start)
    good = acceptable(at)
    factor = 2.0 if good else 0.5
    for _ in range(40):
        if acceptable(_float32(factor * at)) != good:
            break
        at = _float32(factor * at)
    else:
        raise FormatError(f"no grid step within 2^±40 of {start:g} is the coarsest acceptable one; state the step")
    low, high = sorted((at, factor * at))
    while high / low > 1 + precision:
        middle = _float32(math.sqrt(low * high))
        low, high = (middle, high) if acceptable(middle) else (low, middle)
    return _float32(low)


def to_grid(weight: Tensor, step: float) -> np.ndarray:
    """q = round(w / step), ties to even, in the narrowest of int8, int16 and int32; (n,).

    Raises:
        FormatError: NaN or infinity, or symbols beyond 2^31.
    """
    largest = max((float(block.abs().max()) for block in _blocks(weight) if block.numel()), default=0.0)
    if not largest / step <= MAX_SYMBOL:
        raise FormatError(
            f"weights up to {largest:g} on a grid of {step:g} need symbols beyond 2^31; repair or skip this weight, or "
            "choose a coarser step"
        )
    dtype = next(d for d in (torch.int8, torch.int16, torch.int32) if round(largest / step) <= torch.iinfo(d).max)
    symbols = torch.empty(weight.numel(), dtype=dtype)
    for block, out in zip(_blocks(weight), symbols.split(BLOCK_ELEMENTS)):
        out.copy_(symbols_of(block, step))
    return symbols.numpy()


def from_grid(symbols: np.ndarray, step: float) -> Tensor:
    """ŵ = float32(q)·step, (n,) float32."""
    return torch.from_numpy(symbols).float() * step
