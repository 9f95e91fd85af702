"""The generalized Gaussian fitted to one weight: by moments, and at the maximum of the likelihood."""

import math

import torch
from torch import Tensor

from ggpass.errors import WeightError
from ggpass.ggd.density import GGD
from ggpass.ggd.magnitudes import Magnitudes, falling_root, score
from ggpass.ggd.moments import SHAPE_RANGE, moments

#: Rounds of (ν, α) given μ and μ given ν; the two hardly depend on each other, so three or four do.
MOST_ROUNDS = 20

#: For ν < 1, the mean is the best of this many elements next to each other.
NEAR = 64


def fit_moments(weight: Tensor) -> GGD:
    """ρ(ν) = Γ(1/ν)Γ(3/ν)/Γ(2/ν)² = E[x²]/E[|x|]², α = √(E[x²]·Γ(1/ν)/Γ(3/ν)), μ = 0.

    The fit of `ggpass.ggd.moments` for one weight.

    1. The sums are taken in float64, a block at a time.
    2. ν lies in SHAPE_RANGE: heavier tails give its lower end, lighter ones (a constant magnitude, or flatter
       than a GGD of ν = 10) its upper end; σ is √E[x²] all the same.

    Args:
        weight: any shape and strides, floating.

    Raises:
        WeightError: empty, all zero, not floating, or NaN or infinity in it: no such density exists.
    """
    if not weight.is_floating_point():
        raise WeightError(
            "a generalized Gaussian is fitted to floating weights, not "
            f"{str(weight.dtype).removeprefix('torch.')}; skip this tensor"
        )
    if weight.numel() == 0:
        raise WeightError("a generalized Gaussian cannot be fitted to an empty tensor; skip this weight")
    found = moments([weight])
    if not math.isfinite(found.second.item()):
        raise WeightError("NaN, infinity or a square beyond float64 among the weights; repair or skip this weight")
    if found.second.item() == 0:
        raise WeightError("a generalized Gaussian cannot be fitted to zeros only; skip this weight")
    shape = found.shape
    return GGD(shape.item(), found.scale(shape).item())


def fit_likelihood(weight: Tensor, *, free_mean: bool = False) -> GGD:
    """max over ν, α (and μ) of Σ ln f(x); given ν, α^ν = ν·mean|x − μ|^ν.

    The maximum-likelihood estimator, more precise than `fit_moments` and less swayed by single large weights.

    1. ν is found by Newton's method within SHAPE_RANGE, on about 65536 evenly spread elements first, always the
       same ones, and then on all of them: the result is the maximum over the whole weight to about 1e-9 in ν.
    2. Sums are in float64, a block at a time, as in `fit_moments`; exact zeros count like any other value.
    3. About zero unless `free_mean`; then μ is the maximum over those 65536 elements (over all in a smaller
       weight). For ν < 1 every element is a local maximum: μ is the best of the elements that
       an ever finer search tries.

    Args:
        weight: any shape and strides, floating.
        free_mean: whether μ is fitted too.

    Raises:
        WeightError: as `fit_moments`; with `free_mean` also where all elements are equal.
    """
    start = fit_moments(weight)
    whole = Magnitudes(weight.detach(), start.std, weight.numel())
    if free_mean:
        whole, shape = _centred(whole, start.shape)
    else:
        shape = _shape(whole.thinned(), start.shape, 1e-3)
    shape = _shape(whole, shape, 1e-6)
    power = whole.means(lambda r: (r**shape,))[0]
    return GGD(shape, whole.unit * (shape * power) ** (1 / shape), whole.mean)


def _shape(magnitudes: Magnitudes, start: float, tolerance: float) -> float:
    return falling_root(lambda shape: score(magnitudes, shape)[:2], start, SHAPE_RANGE, tolerance)


def _centred(whole: Magnitudes, shape: float) -> tuple[Magnitudes, float]:
    """Return the magnitudes about the likeliest mean and the shape there, by turns, on the thinned weight."""
    flat = whole.thinned().weight.flatten().double().sort().values
    if bool(flat[0] == flat[-1]):
        raise WeightError("a generalized Gaussian with a free mean cannot be fitted to equal values; fit about zero")
    mean = previous = flat[(len(flat) - 1) // 2].item()
    for _ in range(MOST_ROUNDS):
        unit = (flat - mean).square().mean().sqrt().item()
        shape = _shape(Magnitudes(flat, unit, len(flat), mean), shape, 1e-6)
        mean = _likeliest_mean(flat, shape)
        if abs(mean - previous) <= 1e-9 * unit:
            break
        previous = mean
    return Magnitudes(whole.weight, unit, whole.count, mean), shape


def _likeliest_mean(flat: Tensor, shape: float) -> float:
    """argmin_μ Σ|x − μ|^ν over sorted values: by narrowing grids of them, then by all, or by bisection if convex."""
    low, high = 0, len(flat) - 1
    while high - low > NEAR:
        ranks = torch.linspace(low, high, 17, dtype=torch.float64, device=flat.device).round().long()
        best = _least(flat, flat[ranks], shape)
        low, high = int(ranks[max(best - 1, 0)]), int(ranks[min(best + 1, 16)])
    if shape < 1:
        near = flat[low : high + 1]
        return near[_least(flat, near, shape)].item()
    left, right = flat[low].item(), flat[high].item()
    while right - left > 1e-12 * max(abs(left), abs(right)):  # the sum is convex: its slope tells the side
        middle = (left + right) / 2
        if middle in (left, right):
            break
        away = middle - flat
        if (away.sign() * away.abs() ** (shape - 1)).sum() > 0:
            right = middle
        else:
            left = middle
    return (left + right) / 2


def _least(flat: Tensor, candidates: Tensor, shape: float) -> int:
    """Which candidate μ has the least Σ|x − μ|^ν."""
    sums = [((flat - candidate).abs() ** shape).sum().item() for candidate in candidates]
    return sums.index(min(sums))
