"""f(x) = Γ((ν+1)/2)/(Γ(ν/2)√(πν)·s) · (1 + x²/(νs²))^(−(ν+1)/2): the maximum-likelihood Student-t about zero."""

import math

import torch
from torch import Tensor

from ggpass.ggd.magnitudes import Magnitudes
from ggpass.ggd.search import falling_root

#: The degrees of freedom that a fit can return; at the upper end the density is a Gaussian to 1e-4.
FREEDOM_RANGE = (0.2, 10000.0)

#: Passes over the whole weight: two or three do.
MOST_PASSES = 12


def student_log_density(x: Tensor, freedom: float, scale: float) -> Tensor:
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


def fit_student(magnitudes: Magnitudes) -> tuple[float, float, float]:
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
