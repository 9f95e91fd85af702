"""ln p = ln ∫_cell f: the probability of a cell of a centred generalized Gaussian, exact far into the tails."""

import math

import torch
from torch import Tensor

#: Cells over which the exponent (|x|/α)^ν changes by no more than this are integrated by quadrature.
SMOOTH_CHANGE = 1.0

#: Gauss-Legendre on [−1, 1], 10 nodes (x ≥ 0, with their weights): for a function that is analytic up to three
#: half-widths from the middle its error is of the order (3 + √8)^−20 = 5e-16.
NODES = (
    (0.14887433898163122, 0.29552422471475287),
    (0.4333953941292472, 0.26926671930999635),
    (0.6794095682990244, 0.21908636251598204),
    (0.8650633666889845, 0.14945134915058059),
    (0.9739065285171717, 0.06667134430868814),
)


def check_step(step: float) -> float:
    """Δ itself, if it is a positive finite number; ValueError otherwise."""
    if not (math.isfinite(step) and step > 0):
        raise ValueError(f"the step of a grid is a positive number, not {step!r}")
    return step


def log_peak(shape: float, scale: float) -> float:
    """ln f(μ) = ln(ν / (2αΓ(1/ν)))."""
    return math.log(shape / (2 * scale)) - math.lgamma(1 / shape)


def lower(order: float | Tensor, s: Tensor) -> Tensor:
    """P(a, s) = ∫₀ˢ t^(a−1) e^(−t) dt / Γ(a), for s ≥ 0 in float64; a is a number, or a tensor that broadcasts."""
    return torch.special.gammainc(torch.as_tensor(order, dtype=s.dtype, device=s.device), s)


def upper(order: float | Tensor, s: Tensor) -> Tensor:
    """Q(a, s) = 1 − P(a, s), with its own relative precision."""
    return torch.special.gammaincc(torch.as_tensor(order, dtype=s.dtype, device=s.device), s)


def log_upper(order: float | Tensor, s: Tensor) -> Tensor:
    """ln Q(a, s) = −s + a ln s − lnΓ(a) − ln(s + 1 − a − 1(1 − a)/(s + 3 − a − 2(2 − a)/(s + 5 − a − …))).

    Legendre's continued fraction (DLMF 8.9.2) beyond s = max(200, 4a): there eight of its terms are exact in
    float64, and Q itself soon ends below the smallest number. Before that, ln of `upper`.

    Args:
        order: a > 0, a number, or a tensor that broadcasts with s.
        s: float64, s ≥ 0; infinity gives −∞.
    """
    order = torch.as_tensor(order, dtype=s.dtype, device=s.device)
    start = (4 * order).clamp(min=200.0)
    near = upper(order, torch.minimum(s, start)).log()
    if not bool((s > start).any()):
        return near
    far = torch.maximum(s, start)
    fraction = far + 17 - order
    for k in range(8, 0, -1):
        fraction = far + (2 * k - 1 - order) - k * (k - order) / fraction
    series = -far + order * far.log() - order.lgamma() - fraction.log()
    return torch.where(s > start, torch.where(s == math.inf, -math.inf, series), near)


def log_cell(shape: float, scale: float, centre: Tensor, step: float) -> Tensor:
    """ln p(x) = ln ∫ f over [x − Δ/2, x + Δ/2], f the generalized Gaussian of mean 0.

    With s(t) = (t/α)^ν and a = 1/ν the integral from 0 to t is P(a, s(t))/2. Which form keeps its precision
    depends on the cell:

    1. all of it so near the centre that f is constant to the last bit: ln f(0) + ln Δ;
    2. it holds the centre: (P + P)/2, or 1 − (Q + Q)/2 where that is nearly 1;
    3. it is next to such a cell, and before the bulk's end: a difference of P, which at least doubles over it;
    4. narrow against the tail's decay: Gauss-Legendre quadrature of f, free of any cancellation;
    5. what remains: ln Q(low) + ln(1 − Q(high)/Q(low)), the logarithms by `log_upper`.

    Args:
        shape: ν.
        scale: α.
        centre: x, any shape, float64; both signs.
        step: Δ > 0.

    Returns:
        The same shape, float64; −∞ only where s overflows.
    """
    order, x = 1 / shape, centre.abs().flatten()
    low, high = x - step / 2, x + step / 2
    s_low, s_high = (low.abs() / scale) ** shape, (high / scale) ** shape
    flat = s_high < 2.0**-54
    middle = ~flat & (low < 0)
    next_to = ~flat & (low >= 0) & (low < step) & (s_high <= order)
    narrow = (low >= step) & (s_high - s_low <= SMOOTH_CHANGE)
    rest = ~(flat | middle | next_to | narrow)
    result = torch.full_like(x, log_peak(shape, scale) + math.log(step))
    if bool(middle.any()):
        result[middle] = _log_middle(order, s_low[middle], s_high[middle])
    if bool(next_to.any()):
        result[next_to] = ((lower(order, s_high[next_to]) - lower(order, s_low[next_to])) / 2).log()
    if bool(narrow.any()):
        result[narrow] += _log_mean(shape, scale, x[narrow], step)
    if bool(rest.any()):
        first, second = log_upper(order, s_low[rest]), log_upper(order, s_high[rest])
        result[rest] = first - math.log(2) + torch.log1p(-(second - first).exp())
    return result.reshape(centre.shape)


def _log_middle(order: float, s_low: Tensor, s_high: Tensor) -> Tensor:
    """ln((P(s_low) + P(s_high))/2), by way of Q where the cell holds nearly everything."""
    inside = (lower(order, s_low) + lower(order, s_high)) / 2
    outside = (upper(order, s_low) + upper(order, s_high)) / 2
    return torch.where(inside < 0.5, inside.log(), torch.log1p(-outside))


def _log_mean(shape: float, scale: float, x: Tensor, step: float) -> Tensor:
    """ln of the mean of exp(−(t/α)^ν) over t in [x − Δ/2, x + Δ/2]."""
    exponent = (x / scale) ** shape
    total = torch.zeros_like(x)
    for node, weight in NODES:
        for t in (x - node * step / 2, x + node * step / 2):
            total += weight / 2 * (exponent - (t / scale) ** shape).exp()
    return total.log() - exponent
