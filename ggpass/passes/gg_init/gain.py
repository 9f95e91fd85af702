"""ξ with E[f(√ξ·z)²] = 1, z ~ N(0, 1): the gain that lets a layer and the activation f after it keep the power."""

import math

import torch
from torch import Tensor

#: Gains are looked for in here; a function that needs another is no activation of the usual kind.
GAINS = (1 / 8, 8.0)

#: Where f is sampled: beyond 32 lie 11 deviations of the largest gain.
_POINTS = torch.linspace(-32, 32, 12801, dtype=torch.float64)


def points() -> Tensor:
    """Return the abscissae on which `gain_of` wants f: float64, evenly spaced, 0 among them."""
    return _POINTS.clone()


def _power(values: Tensor, gain: float) -> float:
    """E[f(√ξ·z)²] = ∫ f(u)² φ(u/√ξ)/√ξ du by the trapezoidal rule, which for this integrand converges exponentially."""
    step = (_POINTS[1] - _POINTS[0]).item()
    density = torch.exp(-(_POINTS**2) / (2 * gain)) / math.sqrt(2 * math.pi * gain)
    return float((values**2 * density).sum() * step)


def _slopes(values: Tensor) -> tuple[float, float] | None:
    """(a, b) where f(u) = a·u for u > 0 and b·u for u < 0; None where f is nothing so simple."""
    high, low = (values[-1] / _POINTS[-1]).item(), (values[0] / _POINTS[0]).item()
    expected = torch.where(_POINTS > 0, high * _POINTS, low * _POINTS)
    near = 1e-6 * max(abs(high), abs(low)) * (1 + _POINTS.abs())
    return (high, low) if bool(((values - expected).abs() <= near).all()) else None


def is_linear(values: Tensor) -> bool:
    """Whether f(u) = a·u, given f at `points()`."""
    slopes = _slopes(values)
    return slopes is not None and abs(slopes[0] - slopes[1]) <= 1e-6 * abs(slopes[0])


def gain_of(values: Tensor) -> float | None:
    """ξ with E[f(√ξ·z)²] = 1 for z ~ N(0, 1).

    Inputs of mean square 1, weights of variance ξ/n: the layer yields z ~ N(0, ξ), and f(z) has mean square 1 again
    (He et al. 2015, eq. 7–10, for any f). This is the condition at the layer's *input*; 1/E[f(z)²], z ~ N(0, 1),
    puts it between layer and activation. The two agree for homogeneous f; where they do not, inputs that a norm or
    data preparation has brought to mean square 1 are what models have.

    1. Piecewise linear with a kink at 0, slopes a and b: 2m²/(a² + b²), m = max(|a|, |b|). So linear 1, ReLU 2,
       LeakyReLU 2/(1 + k²); a constant factor is the model's own scaling, and does not count.
    2. Anything else: by bisection. SELU 1, GELU and SiLU a little above 2.
    3. Bounded by 1 (sigmoid, tanh, sine), or a gain outside GAINS: None; no gain reaches the power, and the
       published choice is 1.

    Args:
        values: f at `points()`, float64.
    """
    if not bool(torch.isfinite(values).all()):
        return None
    slopes = _slopes(values)
    if slopes is not None:
        a, b = slopes
        largest = max(abs(a), abs(b))
        return 2 * largest**2 / (a**2 + b**2) if largest > 0 else None
    low, high = GAINS
    if not _power(values, low) < 1 < _power(values, high):
        return None
    while high - low > 1e-12 * high:
        middle = math.sqrt(low * high)
        if _power(values, middle) < 1:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)
