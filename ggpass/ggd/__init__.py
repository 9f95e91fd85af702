"""The generalized Gaussian: its density, samples, fits to weights, and the rate in bits that it gives them (pure)."""

from ggpass.ggd.density import GGD
from ggpass.ggd.fit import fit_likelihood, fit_moments
from ggpass.ggd.moments import SHAPE_RANGE, log_moment_ratio, shape_of_moment_ratio
from ggpass.ggd.rate import rate, rate_slope, smooth_bits, smooth_rate
from ggpass.ggd.rivals import Rival, Verdict, best_by_aic, fit_rivals

__all__ = [
    "GGD",
    "SHAPE_RANGE",
    "Rival",
    "Verdict",
    "best_by_aic",
    "fit_likelihood",
    "fit_moments",
    "fit_rivals",
    "log_moment_ratio",
    "rate",
    "rate_slope",
    "shape_of_moment_ratio",
    "smooth_bits",
    "smooth_rate",
]
