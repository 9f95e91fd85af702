"""ggpass: a compiler for neural networks with generalized-Gaussian priors."""

import importlib
from types import ModuleType

from ggpass.api import compile, export_onnx, init_, load, lower_onnx, prepare, report, save, shape_, sizes
from ggpass.errors import (
    FormatError,
    GgpassError,
    InputError,
    PassError,
    TargetError,
    TraceError,
    WeightError,
)
from ggpass.formats import Format, Scheme
from ggpass.graph.pipeline import Pass, Pipeline
from ggpass.graph.program import Program
from ggpass.graph.report import Change, Report, Skip
from ggpass.lowering.modules import dequantize
from ggpass.targets.artifact import Artifact, Sizes

__version__ = "0.1.0"


__all__ = [
    "Artifact",
    "Change",
    "Format",
    "FormatError",
    "GgpassError",
    "InputError",
    "Pass",
    "PassError",
    "Pipeline",
    "Program",
    "Report",
    "Scheme",
    "Sizes",
    "Skip",
    "TargetError",
    "TraceError",
    "WeightError",
    "compile",
    "dequantize",
    "export_onnx",
    "init_",
    "load",
    "lower_onnx",
    "prepare",
    "report",
    "save",
    "shape_",
    "sizes",
]

#: The rooms that users name, as in `ggpass.onnxruntime.session`.
_ROOMS = ("file", "formats", "ggd", "integrations", "onnxruntime", "passes", "targets", "training")


def __getattr__(name: str) -> ModuleType:
    """Import a room when it is first named: most programs need few of them, and some need other packages."""
    if name in _ROOMS:
        return importlib.import_module(f"ggpass.{name}")
    raise AttributeError(f"module 'ggpass' has no attribute {name!r}")
