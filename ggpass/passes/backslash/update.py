"""g ← g + λ·m·ρ'(|θ|)·sign(θ), or θ ← prox(θ): what a step of the rate does to gradients or to weights."""

from collections.abc import Mapping, Sequence

from torch import nn

from ggpass.errors import InputError
from ggpass.passes.backslash.proximal import add_slope_, shrink_
from ggpass.passes.backslash.rate import Rate
from ggpass.passes.backslash.sharded import local_part

#: Weights by their numbers in the Rate.
Numbered = Sequence[tuple[int, nn.Parameter]]


def join_gradients(rate: Rate, steps: int, weights: Numbered, log_scale: float) -> None:
    """The coupled modes: g ← g + e^log_scale·λ·m·ρ'(|θ|)·sign(θ),, once a step.

    Args:
        rate: with the slopes.
        steps: done so far.
        weights: those without a gradient are left alone.
        log_scale: ln of the factor that the gradients are multiplied by.

    Raises:
        InputError: a sparse gradient.
    """
    chosen = [(i, w, w.grad) for i, w in weights if w.grad is not None]
    for index, _, gradient in chosen:
        if gradient.is_sparse:
            raise InputError(
                f"{rate.names[index]} has a sparse gradient, which mode={rate.settings.mode!r} would fill up; skip it, "
                "train it with sparse=False, or use mode='proximal'"
            )
    slopes = [rate.slope(index, rate.log_factor(index, steps) + log_scale) for index, _, _ in chosen]
    add_slope_([local_part(g) for _, _, g in chosen], [local_part(w) for _, w, _ in chosen], slopes)


def step_weights(rate: Rate, steps: int, weights: Numbered, rates: Mapping[int, float]) -> None:
    """The modes that step the weights themselves, after the optimizer: "proximal" and "paper-code".

    Args:
        rate: with the slopes.
        steps: done so far.
        weights: those without a gradient are left alone.
        rates: id(weight) -> learning rate.
    """
    chosen = [(i, w) for i, w in weights if w.grad is not None]
    tensors = [local_part(weight) for _, weight in chosen]
    seed = steps * 2_654_435_761  # far from that of any other step, modulo 2^32
    rate.stepped([i for i, _ in chosen], steps)
    if rate.settings.is_paper:
        slopes = [rate.slope(i, rate.log_factor(i, steps)) for i, _ in chosen]
        add_slope_(tensors, tensors, slopes, sign=-1, seed=seed)
        return
    slopes = [rate.slope(i, rate.bounded_factor(i, steps, rates[id(w)])) for i, w in chosen]
    shrink_(tensors, slopes, seed)
