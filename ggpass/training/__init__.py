"""training: the bits of a model's weights as a term of its training, by generalized-Gaussian rates."""

from ggpass.ggd.grid import Histogram as GridHistogram
from ggpass.passes.backslash.regularizer import Regularizer
from ggpass.passes.backslash.schedule import Schedule
from ggpass.passes.backslash.settings import RateSettings
from ggpass.passes.backslash.statistics import entropy_bits, histogram

__all__ = ["GridHistogram", "RateSettings", "Regularizer", "Schedule", "entropy_bits", "histogram"]
