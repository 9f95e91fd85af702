"""The arguments of the graphs that Dynamo hands to a backend: their names, their fakes, the module they belong to."""

import re
import sys
from types import FrameType
from typing import Any

from torch import Tensor, fx, nn
from torch._dynamo import OptimizedModule
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


def parameter_name(source: str) -> str:
    """`L['self']._modules['a']._parameters['weight']` → `a.weight`; other sources as they are."""
    parts = re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", source)
    return ".".join(parts) or source


def source_name(node: fx.Node) -> str:
    """Return the place that an argument of Dynamo's graph comes from, in Dynamo's words; else the node's own name."""
    argument = node.meta.get("grapharg")
    return argument.source.name if argument is not None else str(node.target)


def compiled_module() -> nn.Module | None:
    """Return the module that `torch.compile` or `Module.compile` is compiling now; None for a plain function.

    Dynamo compiles a frame when it is called, so the module's call is on the stack. A graph break lets Dynamo compile
    the frames of inner modules by themselves, and their sources name weights from there; the names that a user gives
    start at the compiled module.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, OptimizedModule):
            inner: nn.Module = owner._orig_mod
            return inner
        if isinstance(owner, nn.Module) and getattr(owner, "_compiled_call_impl", None) is not None:
            return owner
        frame = frame.f_back
    return None


def fake_of(value: Any, mode: FakeTensorMode) -> Any:
    """Return the fake tensor of an argument, with the symbolic sizes that Dynamo chose for it; other values as is."""
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return value
    tracing = TracingContext.try_get()
    context = tracing.tensor_to_context.get(value) if tracing is not None else None
    source = getattr(context, "tensor_source", None)
    return mode.from_tensor(value, symbolic_context=context, source=source, trace=context is None)
