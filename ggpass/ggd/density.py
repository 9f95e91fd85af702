"""f(x) = ν / (2αΓ(1/ν)) · exp(−(|x − μ|/α)^ν): the generalized Gaussian."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ggpass.ggd.cells import check_step, log_cell, log_peak, upper
from ggpass.ggd.quantile import quantile

#: Cells on either side of the centre that are summed one by one; the density is as good as constant over the others.
MOST_CELLS = 1 << 16

#: If (|x|/α)^ν is larger, no probability is left in float64.
LAST_EXPONENT = 800.0


@dataclass(frozen=True)
class GGD:
    """f(x) = ν / (2αΓ(1/ν)) · exp(−(|x − μ|/α)^ν); ν = 2 is the Gaussian, ν = 1 the Laplacian.

    Attributes:
        shape: ν > 0; the smaller, the heavier the tails.
        scale: α > 0, in the units of x (a Gaussian of deviation σ has α = σ√2).
        mean: μ.

    Raises:
        ValueError: ν or α is not a positive number, or μ not a number.
    """

    shape: float
    scale: float
    mean: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("shape", self.shape), ("scale", self.scale)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"the {name} of a generalized Gaussian is a positive number, not {value!r}")
        if not math.isfinite(self.mean):
            raise ValueError(f"the mean of a generalized Gaussian is a finite number, not {self.mean!r}")

    @classmethod
    def of_std(cls, shape: float, std: float) -> "GGD":
        """α = σ · √(Γ(1/ν) / Γ(3/ν)), μ = 0: the density of shape ν and deviation σ."""
        return cls(shape, std / cls(shape, 1.0).std)

    @property
    def std(self) -> float:
        """σ = α · √(Γ(3/ν) / Γ(1/ν))."""
        return self.scale * math.exp((math.lgamma(3 / self.shape) - math.lgamma(1 / self.shape)) / 2)

    @property
    def entropy(self) -> float:
        """h = (1/ν + ln(2αΓ(1/ν)/ν)) / ln 2, the differential entropy in bits."""
        return (1 / self.shape - log_peak(self.shape, self.scale)) / math.log(2)

    def log_density(self, x: Tensor) -> Tensor:
        """ln f(x) = ln(ν / (2αΓ(1/ν))) − (|x − μ|/α)^ν.

        Args:
            x: any shape, floating.

        Returns:
            The same shape; float32, or float64 where x is.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return log_peak(self.shape, self.scale) - ((x - self.mean).abs() / self.scale) ** self.shape

    def density(self, x: Tensor) -> Tensor:
        """f(x) = ν / (2αΓ(1/ν)) · exp(−(|x − μ|/α)^ν); shapes and dtypes as in `log_density`."""
        return self.log_density(x).exp()

    def sample(
        self,
        size: Sequence[int] | int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """x = μ + α · G^(1/ν) · U, G ~ Gamma(1 + 1/ν), U uniform in (−1, 1).

        With Y ~ Gamma(1/ν), |x| is α · Y^(1/ν), and Y = G · V^ν for a uniform V (Johnson et al., Continuous Univariate
        Distributions, 17.6): so the power of a gamma variate near 0, which underflows for small ν, is never taken.

        1. Everything is computed in float32 (float64 for float64) and rounded once: the narrow dtypes lose
           no more than that rounding, and what lies beyond their largest number becomes that number.
        2. U is an odd multiple of 2^−24 (2^−53): exactly symmetric and never 0, so that a zero appears only if the
           dtype cannot hold the value. The sign is U's own.
        3. α · G^(1/ν) is taken as exp(ln α + ln G / ν), which overflows only if the sample does.
        4. The same generator state, device and size give the same sample for every μ; devices differ among themselves.

        Args:
            size: the shape of the result, or its length.
            generator: the random numbers' source; torch's default one of the device if left out.
            device: of the result; the generator's if left out, else torch's default.
            dtype: floating.

        Raises:
            ValueError: dtype is not floating.
        """
        if not dtype.is_floating_point:
            raise ValueError(f"a generalized Gaussian has floating samples, not {dtype}; give a floating dtype")
        if device is None and generator is not None:
            device = generator.device
        size = (size,) if isinstance(size, int) else tuple(size)
        wide = torch.promote_types(dtype, torch.float32)
        order = torch.full(size, 1 + 1 / self.shape, device=device, dtype=wide)
        # torch.distributions.Gamma calls this too, but hands no generator on.
        magnitude = torch._standard_gamma(order, generator=generator)
        magnitude.log_().div_(self.shape).add_(math.log(self.scale)).exp_()
        bits = 53 if wide == torch.float64 else 24
        uniform = order.random_(0, 1 << (bits - 1), generator=generator)
        sign_bits = torch.empty_like(order, dtype=torch.int8).random_(0, 2, generator=generator)
        uniform = uniform.mul_(2).add_(1).mul_(2.0**-bits)
        x = torch.where(sign_bits == 0, uniform, -uniform).mul_(magnitude)
        if self.mean:
            x += self.mean
        if wide == dtype:
            return x
        limit = torch.finfo(dtype).max
        return x.clamp_(-limit, limit).to(dtype)

    def cdf(self, x: Tensor) -> Tensor:
        """F(x) = ½ + sign(x − μ) · P(1/ν, (|x − μ|/α)^ν)/2, P the regularized lower incomplete gamma function.

        Below μ with full relative precision, far into the tail; above it take F(2μ − x) for the tail.

        Args:
            x: any shape, floating.

        Returns:
            The same shape, float64.
        """
        x = x.double() - self.mean
        tail = upper(1 / self.shape, (x.abs() / self.scale) ** self.shape) / 2
        return torch.where(x > 0, 1 - tail, tail)

    def quantile(self, p: Tensor) -> Tensor:
        """F⁻¹(p) = μ ± α · s^(1/ν), P(1/ν, s) = |2p − 1|; −∞ at 0, ∞ at 1, NaN outside [0, 1].

        Args:
            p: any shape, floating: probabilities.

        Returns:
            The same shape, float64.
        """
        return quantile(self.shape, self.scale, p.double()) + self.mean

    def quantized_entropy(self, step: float) -> float:
        """H(Δ) = −Σ_k p_k log2 p_k in bits, p_k the probability that round(x/Δ) is k.

        1. The 2·MOST_CELLS cells around the centre, or as many as hold anything in float64, are summed exactly.
        2. Beyond them −p log2 p is integrated as −f log2(fΔ), which is closed in incomplete gamma functions; with so
           many cells before it the error of that (Δ²f''/(24f) of it) is below 1e-7 bits.

        Args:
            step: Δ > 0, in the units of x.

        Raises:
            ValueError: the step is not a positive number.
        """
        offset = self.mean / check_step(step) - round(self.mean / step)
        reach = math.log(LAST_EXPONENT) / self.shape + math.log(self.scale) - math.log(step)
        count = MOST_CELLS if reach > math.log(MOST_CELLS) else max(1, math.ceil(math.exp(reach)) + 1)
        index = torch.arange(count + 1, dtype=torch.float64)
        right = _bits(log_cell(self.shape, self.scale, (index - offset) * step, step))
        left = _bits(log_cell(self.shape, self.scale, (index[1:] + offset) * step, step)) if offset else right[1:]
        total = right.sum() + left.sum()
        for side in (-offset, offset):
            total += _tail_bits(self.shape, self.scale, (count + 0.5 + side) * step, step)
        return max(0.0, total.item())


def _bits(log_p: Tensor) -> Tensor:
    """−p log2 p, and 0 for p = 0."""
    return torch.where(log_p == -math.inf, 0.0, -log_p * log_p.exp()) / math.log(2)


def _tail_bits(shape: float, scale: float, start: float, step: float) -> Tensor:
    """∫ −f log2(fΔ) from `start` on = (−log2(f(0)Δ) · Q(a, s) + a · Q(a + 1, s)/ln 2)/2, a = 1/ν, s = (start/α)^ν."""
    order = 1 / shape
    s = torch.tensor((start / scale) ** shape if start < 1e30 * scale else math.inf, dtype=torch.float64)
    nats = -(log_peak(shape, scale) + math.log(step)) * upper(order, s) + order * upper(order + 1, s)
    return nats / (2 * math.log(2))
