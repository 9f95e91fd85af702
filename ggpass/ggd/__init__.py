"""The generalized Gaussian: its density, samples, fits to weights, and the rate in bits that it gives them (pure)."""

from ggpass.ggd.density import GGD
from ggpass.ggd.fit import SHAPE_RANGE, fit_moments, log_moment_ratio, shape_of_moment_ratio
from ggpass.ggd.rate import rate, rate_slope, smooth_bits, smooth_rate

__all__ = [
    "GGD",
    "SHAPE_RANGE",
    "fit_moments",
    "log_moment_ratio",
    "rate",
    "rate_slope",
    "shape_of_moment_ratio",
    "smooth_bits",
    "smooth_rate",
]
