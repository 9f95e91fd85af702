"""w → w' for the weights of a model, one at a time: what is reshaped, and what stays and why."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ggpass.errors import WeightError
from ggpass.ggd.fit import fit_moments
from ggpass.ggd.grid import Histogram
from ggpass.passes.deepshape.figures import Reshaped, Shaped, measure
from ggpass.passes.deepshape.histogram import count, join
from ggpass.passes.deepshape.specification import (
    MIN_ELEMENTS,
    MIN_SHAPE,
    MIN_STEPS,
    Shaping,
    Specification,
    respecify,
    specify,
)

#: Elements, and cells of histograms, of the channels that are reshaped at a time.
BLOCK_ELEMENTS = 1 << 20
BLOCK_CELLS = 1 << 23


@dataclass(frozen=True)
class Source:
    """A weight to reshape, read when its turn comes.

    Attributes:
        name: for reports.
        size: its elements.
        read: its values, floating, any shape; called twice, and must return the same.
        transposed: whether its output channels are its second dimension.
    """

    name: str
    size: int
    read: Callable[[], Tensor]
    transposed: bool = False


def reshape(
    sources: Sequence[Source],
    shaping: Shaping,
    write: Callable[[Source, Tensor], None],
    progress: Callable[[Source], None] = lambda source: None,
) -> Reshaped:
    """w' of every weight, handed to `write` one at a time; nothing is written before all were looked at.

    1. A weight that is empty, of fewer than MIN_ELEMENTS, constant, or so small that the grid would flatten it stays.
    2. With granularity `model` the histogram of all the others is taken first; else each has its own.

    Args:
        sources: the weights, tied ones once.
        write: called with each reshaped weight's new values, in its shape and dtype and on its device.
        progress: called twice for each weight: when it was looked at, and when it is done.

    Raises:
        WeightError: NaN or infinity in a weight; the message holds its name.
    """
    chosen: list[Source] = []
    skipped: list[tuple[str, str]] = []
    for source in sources:
        reason = _reason_to_keep(source, shaping)
        if reason:
            skipped.append((source.name, reason))
        else:
            chosen.append(source)
        progress(source)
    total = sum(source.size for source in chosen)
    shared = specify(_all(chosen, shaping.step), shaping, total) if shaping.granularity == "model" and chosen else None
    shaped: list[Shaped] = []
    pooled: list[Histogram] = []
    for source in chosen:
        weight = source.read().detach()
        new, moved = _reshape_one(weight, source.transposed, shared, shaping, total)
        if moved:
            measured, histograms = measure(source.name, weight, new, moved, shaping.step)
            shaped.append(measured)
            pooled = [join(a, b) for a, b in zip(pooled, histograms)] or histograms
            write(source, new)
        else:
            skipped.append((source.name, _reason_nothing_moved(weight, shared, shaping)))
        progress(source)
    return Reshaped.of(shaped, skipped, pooled)


def _as_row(weight: Tensor) -> Tensor:
    return weight.reshape(1, -1)


def _all(sources: Sequence[Source], step: float) -> Histogram:
    """Return the histogram of all weights together."""
    return functools.reduce(join, (count(_as_row(source.read().detach()), step) for source in sources))


def _reason_to_keep(source: Source, shaping: Shaping) -> str:
    """Why a weight is not reshaped; empty where it is.

    Raises:
        WeightError: NaN or infinity in it.
    """
    weight = source.read().detach()
    size = weight.numel()
    if size and shaping.granularity == "channel":
        size //= weight.shape[1 if source.transposed else 0]
    reason = reason_without_fit(source.name, weight, size, " in a channel" if shaping.granularity == "channel" else "")
    if reason:
        return reason
    deviation = fit_moments(weight).std
    if deviation < MIN_STEPS * shaping.step:
        return f"its σ of {deviation:.2g} is below {MIN_STEPS:g} steps of {shaping.step:.3g}; choose a smaller step"
    return ""


def reason_without_fit(name: str, weight: Tensor, size: int, where: str = "") -> str:
    """Return the reason why a weight has no fit to go by (empty, constant, too small), or ''.

    Args:
        name: of the weight.
        weight: its values, floating.
        size: the elements that are fitted together.
        where: they lie, for the reason.

    Raises:
        WeightError: NaN or infinity in it.
    """
    if not weight.numel():
        return "is empty"
    low, high = (float(bound) for bound in weight.aminmax())
    if not math.isfinite(high - low):
        raise WeightError(f"weight {name!r} holds NaN or infinity; repair it, or skip=[{name!r}]")
    if low == high:
        return "all of its weights are " + ("zero" if low == 0 else "equal")
    return f"has {size} weights{where}, too few to fit (least {MIN_ELEMENTS})" if size < MIN_ELEMENTS else ""


def reason_of_shape(shape: float) -> str:
    """Return the reason why a weight of this ν is left alone, or ''."""
    return f"its ν of {shape:.2g} is below {MIN_SHAPE:g}: outliers more than a shape" if shape < MIN_SHAPE else ""


def _reason_nothing_moved(weight: Tensor, shared: Specification | None, shaping: Shaping) -> str:
    if shared is not None and not float(shared.shape) >= MIN_SHAPE:
        return f"all weights together have a ν below {MIN_SHAPE:g}: reshape each by itself"
    if shaping.granularity == "tensor" and (reason := reason_of_shape(fit_moments(weight).shape)):
        return reason
    if shaping.granularity == "channel":
        return f"none of its channels moves: each has a ν below {MIN_SHAPE:g}, too small a σ, or rare values alone"
    return f"each of its values is rarer than rare={shaping.rare:g} allows; lower rare"


def _reshape_one(
    weight: Tensor, transposed: bool, shared: Specification | None, shaping: Shaping, total: int
) -> tuple[Tensor, int]:
    """w' and how many weights moved: by the map that all share, else by the weight's own or its channels'."""
    if shaping.granularity == "channel":
        return _by_channel(weight, transposed, shaping, total)
    row = _as_row(weight)
    specification = shared or specify(count(row, shaping.step), shaping, total)
    new, moved = respecify(row, specification, shaping.mode == "compensated")
    return new.view_as(weight), moved


def _by_channel(weight: Tensor, transposed: bool, shaping: Shaping, total: int) -> tuple[Tensor, int]:
    """Each output channel with its own fit and map, some channels at a time."""
    rows = weight.t() if transposed else weight.flatten(1)
    width = int(2 * float(rows.abs().max()) / shaping.step) + 3
    block = max(1, min(BLOCK_ELEMENTS // rows.shape[1], BLOCK_CELLS // width))
    new, moved = torch.empty_like(rows), 0
    for part, out in zip(rows.split(block), new.split(block)):
        specification = specify(count(part, shaping.step), shaping, total)
        changed, some = respecify(part, specification, shaping.mode == "compensated")
        out.copy_(changed)
        moved += some
    return (new.t() if transposed else new.view_as(weight)).contiguous(), moved
