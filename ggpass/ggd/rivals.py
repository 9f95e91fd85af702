"""AIC = 2k − 2 Σ ln f(x): which of Gaussian, Laplace, generalized Gaussian and Student-t a weight follows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ggpass.errors import WeightError
from ggpass.ggd.density import GGD
from ggpass.ggd.fit import fit_moments
from ggpass.ggd.magnitudes import Magnitudes, falling_root, score
from ggpass.ggd.moments import SHAPE_RANGE

#: The names of the two rivals that have a shape.
GG = "GG"
STUDENT = "Student-t"

#: The degrees of freedom that a fit can return; at the upper end the density is a Gaussian to 1e-4.
FREEDOM_RANGE = (0.2, 10000.0)

#: Passes over the whole weight: two or three do.
MOST_PASSES = 12


@dataclass(frozen=True)
class Rival:
    """A density that was fitted to a weight by maximum likelihood, about zero.

    Attributes:
        name: Gaussian, Laplace, GG or Student-t.
        scale: σ (Gaussian), the mean magnitude (Laplace), α (GG) or s (Student-t), in the units of the weight.
        shape: ν of a GG, the degrees of freedom of a Student-t; None for the others.
        log_likelihood: Σ ln f(x), in nats.
        count: the number of elements of that sum.
    """

    name: str
    scale: float
    shape: float | None
    log_likelihood: float
    count: int

    @property
    def parameters(self) -> int:
        """k: 1 for a scale alone, 2 with a shape."""
        return 1 if self.shape is None else 2

    @property
    def aic(self) -> float:
        """AIC = 2k − 2 ln L (Akaike 1974); the least is the best."""
        return 2 * self.parameters - 2 * self.log_likelihood

    def log_density(self, x: Tensor) -> Tensor:
        """ln f(x); the shape of x; float32, or float64 where x is."""
        if self.name == STUDENT:
            return _student_log_density(x, self.shape or math.nan, self.scale)
        if self.name == "Gaussian":
            return GGD(2.0, self.scale * math.sqrt(2)).log_density(x)
        return GGD(self.shape or 1.0, self.scale).log_density(x)


@dataclass(frozen=True)
class Verdict:
    """The best rival by AIC and the next one."""

    best: Rival
    second: Rival

    @property
    def margin(self) -> float:
        """(AIC of the next − AIC of the best) / (2n ln 2): bits a weight that the better density saves."""
        return (self.second.aic - self.best.aic) / (2 * self.best.count * math.log(2))


def fit_rivals(weight: Tensor) -> tuple[Rival, ...]:
    """ln L = max Σ ln f(x) for Gaussian, Laplace, generalized Gaussian and Student-t, all about zero, in this order.

    1. Every likelihood is that of all elements that are not exactly 0. Zeros are left out because a density that
       can grow without bound there (a Student-t with many of them) would win by nothing else; as an atom of their
       own they cost every model the same.
    2. The searches for the two shapes start on about 65536 evenly spread elements, always the same ones, and are
       finished on all of them, to about 1e-6 in the shape; sums are in float64.
    3. Shapes lie in SHAPE_RANGE and FREEDOM_RANGE; there a GG or Student-t may lose to a rival that it
       has as a special case, by the price of its second parameter.

    Args:
        weight: any shape and strides, floating.

    Raises:
        WeightError: as `fit_moments`.
    """
    start, weight = fit_moments(weight), weight.detach()
    count = int(weight.count_nonzero())
    unit = start.std * math.sqrt(weight.numel() / count)
    magnitudes = Magnitudes(weight, unit, count, keep_zeros=False)
    first, second = magnitudes.means(lambda r: (r, r.square()))
    rms = math.sqrt(second)
    shape, scale, gg_nats = _fit_gg(magnitudes, start.shape)
    freedom, width, student_nats = _fit_student(magnitudes)
    found = [
        ("Gaussian", rms, None, math.log(rms) + math.log(2 * math.pi * math.e) / 2),
        ("Laplace", first, None, math.log(2 * first) + 1),
        (GG, scale, shape, gg_nats),
        (STUDENT, width, freedom, student_nats),
    ]
    log_unit = math.log(unit)
    return tuple(Rival(name, s * unit, nu, -count * (nats + log_unit), count) for name, s, nu, nats in found)


def best_by_aic(rivals: Sequence[Rival]) -> Verdict:
    """Return the rival of least AIC, and the one of the next.

    Raises:
        WeightError: fewer than two rivals, or rivals that were fitted to different numbers of elements.
    """
    if len(rivals) < 2 or len({rival.count for rival in rivals}) > 1:
        raise WeightError("a comparison by AIC takes two or more fits of the same weight; give what fit_rivals returns")
    best, second, *_ = sorted(rivals, key=lambda rival: rival.aic)
    return Verdict(best, second)


def _fit_gg(magnitudes: Magnitudes, start: float) -> tuple[float, float, float]:
    """(ν, α/u, mean(−ln f) in units of u) at the maximum of the likelihood."""
    nats = 0.0

    def evaluate(shape: float) -> tuple[float, float]:
        nonlocal nats
        value, slope, nats = score(part, shape)
        return value, slope

    part = magnitudes.thinned()
    shape = falling_root(evaluate, start, SHAPE_RANGE, 1e-3)
    part = magnitudes
    shape = falling_root(evaluate, shape, SHAPE_RANGE, 1e-4)
    # L = ln 2 − ln ν + ln α + lnΓ(1/ν) + 1/ν at the best α: solved for it.
    scale = math.exp(nats - math.log(2 / shape) - math.lgamma(1 / shape) - 1 / shape)
    return shape, scale, nats


def _student_log_density(x: Tensor, freedom: float, scale: float) -> Tensor:
    """ln f(x) = ln(Γ((ν+1)/2)/(Γ(ν/2)√(πν)·s)) − (ν+1)/2 · ln(1 + x²/(νs²)); float32, or float64 where x is."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    peak = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi * freedom) / 2
    return peak - math.log(scale) - (freedom + 1) / 2 * torch.log1p((x / scale).square() / freedom)


class _At:
    """The likelihood and its derivatives at (ln s, ν), by w = u/(ν + u), u = (r/s)².

    L = mean ln f = lnΓ((ν+1)/2) − lnΓ(ν/2) − ln(πν)/2 − ln s − (ν+1)/2 · A with A = −mean ln(1 − w), B = mean w and
    C = mean w². Then ∂L/∂ln s = (ν+1)B − 1, ∂w/∂ln s = −2w(1 − w) and ∂w/∂ν = −w(1 − w)/ν give the rest.
    """

    def __init__(self, magnitudes: Magnitudes, log_scale: float, freedom: float) -> None:
        width = freedom * math.exp(2 * log_scale)

        def terms(r: Tensor) -> tuple[Tensor, ...]:
            ratio = r.square_().div_(width)
            w = ratio / (1 + ratio)
            return ratio.log1p_(), w, w.square()

        a, b, c = magnitudes.means(terms)
        half = torch.tensor([(freedom + 1) / 2, freedom / 2], dtype=torch.float64)
        digamma, trigamma = torch.digamma(half).tolist(), torch.polygamma(1, half).tolist()
        self.nats = -(
            math.lgamma((freedom + 1) / 2)
            - math.lgamma(freedom / 2)
            - math.log(math.pi * freedom) / 2
            - log_scale
            - (freedom + 1) / 2 * a
        )
        spread = (b - c) / freedom
        more = (freedom + 1) / freedom
        # By ln s, and by ν: gradients and second derivatives of L.
        self.by_scale = (freedom + 1) * b - 1
        self.by_freedom = (digamma[0] - digamma[1] - 1 / freedom - a + more * b) / 2
        self.scale_scale = -2 * (freedom + 1) * (b - c)
        self.scale_freedom = b - (freedom + 1) * spread
        self.freedom_freedom = (
            (trigamma[0] - trigamma[1]) / 2 + 1 / freedom**2 + b / freedom - b / freedom**2 - more * spread
        ) / 2


def _fit_student(magnitudes: Magnitudes) -> tuple[float, float, float]:
    """(ν, s/u, mean(−ln f) in units of u) at the maximum of the likelihood, ν within FREEDOM_RANGE.

    Newton's method on the profile over s for the thinned weight, then on (ln s, ν) jointly for all elements.
    """
    log_scale = -0.1

    def profile(freedom: float) -> tuple[float, float]:
        nonlocal log_scale
        log_scale, at = _best_scale(thinned, log_scale, freedom)
        total = at.freedom_freedom - at.scale_freedom**2 / at.scale_scale
        return at.by_freedom, total * freedom

    thinned = magnitudes.thinned()
    freedom = falling_root(profile, 5.0, FREEDOM_RANGE, 1e-3)
    return _refine(magnitudes, log_scale, freedom)


def _best_scale(magnitudes: Magnitudes, log_scale: float, freedom: float) -> tuple[float, _At]:
    """ln s with (ν + 1)·mean w = 1, from a guess: mean w falls as s grows, so there is one."""
    for _ in range(50):
        at = _At(magnitudes, log_scale, freedom)
        step = -at.by_scale / at.scale_scale if at.scale_scale else math.copysign(1.0, at.by_scale)
        log_scale += min(max(step, -1.0), 1.0)
        if abs(step) < 1e-6:
            break
    return log_scale, at


def _refine(magnitudes: Magnitudes, log_scale: float, freedom: float) -> tuple[float, float, float]:
    """Newton's steps on (ln s, ν) over all elements until they are below 1e-6."""
    for _ in range(MOST_PASSES):
        at = _At(magnitudes, log_scale, freedom)
        determinant = at.scale_scale * at.freedom_freedom - at.scale_freedom**2
        bound = freedom in FREEDOM_RANGE or determinant <= 0 or at.freedom_freedom >= 0
        if bound:
            by_scale, by_freedom = -at.by_scale / at.scale_scale, 0.0
        else:
            by_scale = (at.scale_freedom * at.by_freedom - at.freedom_freedom * at.by_scale) / determinant
            by_freedom = (at.scale_freedom * at.by_scale - at.scale_scale * at.by_freedom) / determinant
        relative = min(max(by_freedom / freedom, -0.5), 1.0)
        log_scale += min(max(by_scale, -1.0), 1.0)
        freedom = min(max(freedom * (1 + relative), FREEDOM_RANGE[0]), FREEDOM_RANGE[1])
        if abs(by_scale) < 1e-6 and abs(relative) < 1e-6 * max(1.0, freedom):
            break
    return freedom, math.exp(log_scale), at.nats
