"""The target `reference`: pure torch on any device; it defines what every other target must compute."""

from ggpass.lowering.operators import REFERENCE
from ggpass.targets.base import TorchTarget

REFERENCE_TARGET = TorchTarget("reference", REFERENCE)
