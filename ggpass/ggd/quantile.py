"""F⁻¹(p) = μ ± α · s^(1/ν) with P(1/ν, s) = |2p − 1|: quantiles of a generalized Gaussian, by Newton's method."""

import math

import torch
from torch import Tensor

from ggpass.ggd.cells import log_upper, lower, upper

#: Newton's method converges quadratically from its safe side; more than 12 steps were never needed.
MOST_STEPS = 60


def cdf(shape: float, scale: float, x: Tensor) -> Tensor:
    """F(x) = Q(1/ν, (|x|/α)^ν)/2 for x ≤ 0, and 1 − F(−x) for x > 0; float64 in and out.

    The lower tail keeps its relative precision; the upper tail's is that of F(−x).
    """
    tail = upper(1 / shape, (x.abs() / scale) ** shape) / 2
    return torch.where(x > 0, 1 - tail, tail)


def quantile(shape: float, scale: float, p: Tensor) -> Tensor:
    """x = sign(p − 1/2) · α · s^(1/ν), P(1/ν, s) = |2p − 1| or Q(1/ν, s) = 2 min(p, 1 − p), whichever is below 1/2.

    Args:
        p: float64, probabilities; 0 and 1 give −∞ and ∞, what lies outside [0, 1] NaN.

    Returns:
        The same shape, float64.
    """
    order, flat = 1 / shape, p.flatten()
    inside, outside = (2 * flat - 1).abs(), 2 * torch.minimum(flat, 1 - flat)
    log_s = torch.full_like(flat, math.nan)
    central = inside <= 0.5
    tail = (outside > 0) & (outside < 0.5)
    log_s[central] = _log_lower_inverse(order, inside[central])
    log_s[tail] = _log_upper_inverse(order, outside[tail])
    log_s[outside == 0] = math.inf
    x = torch.copysign(scale * (log_s / shape).exp(), flat - 0.5)
    return x.reshape(p.shape)


def _log_lower_inverse(order: float, p: Tensor) -> Tensor:
    """y with P(a, e^y) = p ≤ 1/2.

    ln P(e^y) is concave in y and P(a, s) ≤ s^a/Γ(a+1), so Newton's method started where the bound is p comes from
    the left and never overshoots.
    """
    y = (p.log() + math.lgamma(order + 1)) / order
    wanted, tiny = p.log(), y < -40  # there the bound is exact
    for _ in range(MOST_STEPS):
        log_p = lower(order, y.exp()).log()
        slope = (order * y - y.exp() - math.lgamma(order) - log_p).exp()
        step = torch.where(tiny, 0.0, (wanted - log_p) / slope)
        y = y + step
        if not bool((step.abs() > 1e-15 * (1 + y.abs())).any()):
            break
    return y


def _log_upper_inverse(order: float, q: Tensor) -> Tensor:
    """y with Q(a, e^y) = q < 1/2.

    ln Q(e^y) is concave in y too, and Q(a, a + √(2aL) + L) ≤ e^−L (Boucheron, Lugosi & Massart, Concentration
    Inequalities, 2.4), so Newton's method started at L = −ln q comes from the right and never overshoots.
    """
    wanted = q.log()
    y = (order + (-2 * order * wanted).sqrt() - wanted).log()
    for _ in range(MOST_STEPS):
        s = y.exp()
        log_q = log_upper(order, s)
        slope = -(order * y - s - math.lgamma(order) - log_q).exp()
        step = (wanted - log_q) / slope
        y = y + step
        if not bool((step.abs() > 1e-15 * (1 + y.abs())).any()):
            break
    return y
