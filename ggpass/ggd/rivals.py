"""AIC = 2k − 2 Σ ln f(x): which of Gaussian, Laplace, generalized Gaussian and Student-t a weight follows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ggpass.errors import WeightError
from ggpass.ggd.density import GGD
from ggpass.ggd.fit import fit_moments
from ggpass.ggd.magnitudes import Magnitudes, score
from ggpass.ggd.moments import SHAPE_RANGE
from ggpass.ggd.search import falling_root
from ggpass.ggd.student import fit_student, student_log_density

#: The names of the two rivals that have a shape.
GG = "GG"
STUDENT = "Student-t"


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
            return student_log_density(x, self.shape or math.nan, self.scale)
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
    3. Shapes lie in SHAPE_RANGE and FREEDOM_RANGE (`student`); there a GG or Student-t may lose to a rival that it
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
    freedom, width, student_nats = fit_student(magnitudes)
    found = [
        ("Gaussian", rms, None, math.log(rms) + math.log(2 * math.pi * math.e) / 2),
        ("Laplace", first, None, math.log(2 * first) + 1),
        (GG, scale, shape, gg_nats),
        (STUDENT, width, freedom, student_nats),
    ]
    log_unit = math.log(unit)
    return tuple(Rival(name, s * unit, nu, -count * (nats + log_unit), count) for name, s, nu, nats in found)


def best_by_aic(rivals: Sequence[Rival]) -> Verdict:
    """The rival of least AIC, and the one of the next.

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
