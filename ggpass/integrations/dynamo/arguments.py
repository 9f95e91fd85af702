"""What Dynamo says about the arguments of the graphs that it hands to a backend."""

import re
from typing import Any

from torch import Tensor, fx
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


def parameter_name(source: str) -> str:
    """`L['self']._modules['a']._parameters['weight']` → `a.weight`; other sources as they are."""
    parts = re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", source)
    return ".".join(parts) or source


def source_name(node: fx.Node) -> str:
    """Where an argument of Dynamo's graph comes from, in Dynamo's words; the node's own name where it does not say."""
    argument = node.meta.get("grapharg")
    return argument.source.name if argument is not None else str(node.target)


def fake_of(value: Any, mode: FakeTensorMode) -> Any:
    """The fake tensor of an argument, with the symbolic sizes that Dynamo chose for it; other values as they are."""
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return value
    tracing = TracingContext.try_get()
    context = tracing.tensor_to_context.get(value) if tracing is not None else None
    source = getattr(context, "tensor_source", None)
    return mode.from_tensor(value, symbolic_context=context, source=source, trace=context is None)
