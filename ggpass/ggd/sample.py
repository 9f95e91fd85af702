"""|x − μ| = α · G^(1/ν) · U with G ~ Gamma(1 + 1/ν), U uniform: samples of a generalized Gaussian."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def draw(
    shape: float,
    scale: float,
    mean: float,
    size: Sequence[int],
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """x = μ + α · G^(1/ν) · U, G ~ Gamma(1 + 1/ν), U uniform in (−1, 1): the method behind GGD.sample.

    With Y ~ Gamma(1/ν), |x| is α · Y^(1/ν), and Y = G · V^ν for a uniform V (Johnson et al., Continuous Univariate
    Distributions, 17.6): so the power of a gamma variate near 0, which underflows for small ν, is never taken.

    1. Everything is computed in float32 (float64 for float64) and rounded once: the narrow dtypes lose
       no more than that rounding, and what lies beyond their largest number becomes that number.
    2. U is an odd multiple of 2^−24 (2^−53): exactly symmetric and never 0, so that no zero appears but where
       the dtype cannot hold the value. The sign is U's own.
    3. α · G^(1/ν) is taken as exp(ln α + ln G / ν), which overflows only where the sample does.
    4. The same generator state, device and size give the same sample for every μ; devices differ among themselves.

    Args:
        size: the shape of the result.
        generator: the random numbers' source; torch's default one of the device if left out.
        device: where; the generator's if left out, else torch's default.
        dtype: floating.

    Raises:
        ValueError: dtype is not floating.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"a generalized Gaussian has floating samples, not {dtype}; give a floating dtype")
    if device is None and generator is not None:
        device = generator.device
    wide = torch.promote_types(dtype, torch.float32)
    order = torch.full(tuple(size), 1 + 1 / shape, device=device, dtype=wide)
    # torch.distributions.Gamma calls this too, but hands no generator on.
    magnitude = torch._standard_gamma(order, generator=generator)
    magnitude.log_().div_(shape).add_(math.log(scale)).exp_()
    bits = 53 if wide == torch.float64 else 24
    uniform = order.random_(0, 1 << (bits - 1), generator=generator)
    sign_bits = torch.empty_like(order, dtype=torch.int8).random_(0, 2, generator=generator)
    uniform = uniform.mul_(2).add_(1).mul_(2.0**-bits)
    x = torch.where(sign_bits == 0, uniform, -uniform).mul_(magnitude)
    if mean:
        x += mean
    if wide == dtype:
        return x
    limit = torch.finfo(dtype).max
    return x.clamp_(-limit, limit).to(dtype)
