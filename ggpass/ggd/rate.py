"""R(x) = −log2 ∫_cell f: the bits of a weight on a grid, exactly, and as the smooth function that training uses."""

import math
from typing import Any

import torch
from torch import Tensor

from ggpass.ggd.cells import check_step, log_cell
from ggpass.ggd.density import GGD

LN2 = math.log(2)


class _CellBits(torch.autograd.Function):
    """R = −log2 p, ∂R/∂x = (f(x − Δ/2) − f(x + Δ/2)) / (p ln 2): closed, so no 0 · ∞ of the chain rule arises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ggd: GGD, step: float) -> Tensor:
        log_p = log_cell(ggd.shape, ggd.scale, x.double() - ggd.mean, step)
        ctx.save_for_backward(x, log_p)
        ctx.ggd, ctx.step = ggd, step
        return (-log_p / LN2).to(torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, log_p = ctx.saved_tensors
        at = x.double()
        low, high = (ctx.ggd.log_density(at + half) for half in (-ctx.step / 2, ctx.step / 2))
        slope = ((low - log_p).exp() - (high - log_p).exp()) / LN2
        return (gradient * slope).to(x.dtype), None, None


def rate(x: Tensor, ggd: GGD, step: float) -> Tensor:
    """R(x) = −log2 ∫ f over [x − Δ/2, x + Δ/2], in bits, with its gradient.

    1. Computed in float64 (`cells.log_cell`), finite wherever (|x − μ|/α)^ν is, however far out.
    2. R is smooth in x, at 0 too, and so is its gradient (f(x − Δ/2) − f(x + Δ/2)) / (p ln 2), for every ν.

    Args:
        x: any shape, floating; on a grid x = kΔ these are the ideal code lengths of the symbols k.
        ggd: the density.
        step: Δ > 0, in the units of x.

    Returns:
        The same shape; float32, or float64 where x is.

    Raises:
        ValueError: the step is not a positive number.
    """
    return _CellBits.apply(x, ggd, check_step(step))


def smooth_rate(x: Tensor, ggd: GGD, step: float, epsilon: float = 0.0) -> Tensor:
    """R(x) ≈ ((|x − μ| + ε)/α)^ν / ln 2 + log2(2αΓ(1/ν)/(νΔ)), in bits: −log2(f·Δ), the rate of a small cell.

    The data term of BackSlash (arXiv 2504.16968, its rate of a generalized Gaussian) with the constant that makes
    it bits. For ν < 1 the gradient at x = μ is finite only with ε > 0.

    Args:
        x: any shape, floating.
        ggd: the density.
        step: Δ > 0, in the units of x.
        epsilon: ε ≥ 0, in the units of x.

    Returns:
        The same shape; float32, or float64 where x is.

    Raises:
        ValueError: the step is not a positive number.
    """
    return smooth_bits(x - ggd.mean if ggd.mean else x, ggd.shape, ggd.scale, check_step(step), epsilon)


def smooth_bits(
    x: Tensor, shape: float | Tensor, scale: float | Tensor, step: float | Tensor, epsilon: float | Tensor = 0.0
) -> Tensor:
    """R(x) = ((|x| + ε)/α)^ν / ln 2 + log2(2αΓ(1/ν)/(νΔ)), with every parameter a number or a tensor that broadcasts.

    Nothing waits for the device: ν and α may be 0-dimensional tensors that live there. Shapes and dtypes as in
    `smooth_rate`.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    constant = _log(2 * scale) + _lgamma(1 / shape) - _log(shape) - _log(step)
    return (((x.abs() + epsilon) / scale) ** shape + constant) / LN2


def rate_slope(x: Tensor, shape: float | Tensor, scale: float | Tensor, epsilon: float | Tensor = 0.0) -> Tensor:
    """∂R/∂x = ν/(α^ν ln 2) · sign(x) · (|x| + ε)^(ν−1), in bits per unit of x: the gradient of `smooth_bits`.

    1. sign(0) = 0: an exact zero is not moved, whatever ν and ε.
    2. Taken as ν/(α ln 2) · ((|x| + ε)/α)^(ν−1), since α^ν alone leaves float32 for small α and large ν.
    3. Nothing waits for the device: ν, α and ε are numbers or tensors that broadcast.

    Args:
        x: any shape, floating; half dtypes are computed in float32.
        shape: ν.
        scale: α, in the units of x.
        epsilon: ε ≥ 0, in the units of x.

    Returns:
        The shape and dtype of x.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    magnitude = ((wide.abs() + epsilon) / scale) ** (shape - 1) * (shape / (scale * LN2))
    return torch.where(wide == 0, 0.0, torch.copysign(magnitude, wide)).to(x.dtype)


def _log(value: float | Tensor) -> float | Tensor:
    return value.log() if isinstance(value, Tensor) else math.log(value)


def _lgamma(value: float | Tensor) -> float | Tensor:
    return value.lgamma() if isinstance(value, Tensor) else math.lgamma(value)
