"""training: the bits of a model's weights as a term of its training, by generalized-Gaussian rates."""

from ggpass.training.grid import GridHistogram, entropy_bits, histogram
from ggpass.training.regularizer import Regularizer
from ggpass.training.schedule import Schedule
from ggpass.training.settings import RateSettings

__all__ = ["GridHistogram", "RateSettings", "Regularizer", "Schedule", "entropy_bits", "histogram"]
