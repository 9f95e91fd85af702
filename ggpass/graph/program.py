"""Program: the one IR, an unlifted ATen `fx.GraphModule` with its weights, edited copy-on-write."""

import copy
import gc
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from ggpass.errors import PassError, TraceError


def owner_of(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule that holds the tensor of a dotted name, and the tensor's name in it; made where missing."""
    *path, leaf = name.split(".")
    module = root
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    return module, leaf


class _ShapesOnly(FakeTensorProp):
    """Runs a graph on fake tensors alone: an in-place operator must not reach the real buffers."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value


class Program:
    """A traced model: `graph` computes, `weight(name)` are its tensors.

    The tensors are the traced model's own until a pass replaces one: a pass may rebind a name (`set_weight`) but never
    writes into a tensor, so the model it came from stays as it was.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module

    @classmethod
    def trace(
        cls,
        model: nn.Module,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        dynamic_shapes: Any = None,
    ) -> "Program":
        """The eval-mode graph of `model` at these inputs, by torch.export.

        Args:
            model: any module; its training flags are as before afterwards.
            args, kwargs: example inputs.
            dynamic_shapes: as torch.export takes it; None for static shapes.

        Raises:
            TraceError: torch.export cannot trace it; says what broke and that leaving out the inputs still works.
        """
        training = [m for m in model.modules() if m.training]
        for module in training:
            module.training = False
        try:
            with torch.no_grad():
                exported = torch.export.export(model, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
        except Exception as error:  # torch.export raises whatever the model's own code and its tracer raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = "\n".join(lines[:4]) or "no message"
            raise TraceError(
                f"torch.export could not trace {type(model).__name__}: {type(error).__name__}: {reason}\n"
                "Without example inputs no tracing is needed: leave out args and kwargs, and the weights are "
                "lowered inside the model itself."
            ) from error
        finally:
            for module in training:
                module.training = True
        program = cls(exported.module(check_guards=False))
        del exported
        gc.collect()  # tracing leaves megabytes in reference cycles, which would count towards compile's peak
        return program

    def copy(self) -> "Program":
        """A Program whose graph can be edited apart from this one's; the tensors are shared."""
        source = self.graph_module
        twin = fx.GraphModule(source, copy.deepcopy(source.graph))
        for name in ("_in_spec", "_out_spec"):
            if hasattr(source, name):
                setattr(twin, name, getattr(source, name))
        return Program(twin)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.graph_module(*args, **kwargs)

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    def calls(self, *targets: Any) -> Iterator[fx.Node]:
        """The nodes that call one of `targets`, in execution order; safe to edit the graph meanwhile."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target in targets:
                yield node

    def reads(self) -> list[fx.Node]:
        """The `get_attr` nodes that yield tensors; others yield the sub-graphs of `cond`, autocast and their kin."""
        nodes = [node for node in self.graph.nodes if node.op == "get_attr"]
        return [n for n in nodes if not isinstance(getattr(self.graph_module, str(n.target), None), fx.GraphModule)]

    def weight(self, name: str) -> Tensor:
        """The tensor that `get_attr` nodes of this name read.

        Raises:
            PassError: there is none.
        """
        value: Any = self.graph_module
        for part in name.split("."):
            value = getattr(value, part, None)
        if not isinstance(value, Tensor):
            raise PassError(f"the graph reads {name!r}, which is no tensor of the program")
        return value

    def set_weight(self, name: str, value: Tensor, buffer: bool = False) -> None:
        """Bind `name` to another tensor: a frozen Parameter, or a buffer."""
        module, leaf = owner_of(self.graph_module, name)
        self.delete_weight(name)
        if buffer:
            module.register_buffer(leaf, value)
        else:
            module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))

    def delete_weight(self, name: str) -> None:
        """Unbind `name`, if it is bound."""
        module, leaf = owner_of(self.graph_module, name)
        module._parameters.pop(leaf, None)
        module._buffers.pop(leaf, None)
        module._non_persistent_buffers_set.discard(leaf)

    def get_attr(self, name: str) -> fx.Node:
        """A new node that reads tensor `name`, at the current insertion point."""
        return self.graph.create_node("get_attr", name, name=name.replace(".", "_"))

    def prune(self) -> list[str]:
        """Erase `get_attr` nodes without users, and unbind the names that no node reads.

        Returns:
            The names of tensors that are gone with that: not read under another name.
        """
        for node in reversed(list(self.graph.nodes)):
            if node.op == "get_attr" and not node.users:
                self.graph.erase_node(node)
        read = {str(node.target) for node in self.reads()}
        still_there = {id(self.weight(name)) for name in read}
        module = self.graph_module
        tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(
            module.named_buffers(remove_duplicate=False)
        )
        # Sub-graphs hold what they read themselves.
        inner = tuple(f"{name}." for name, child in module.named_children() if isinstance(child, fx.GraphModule))
        unread = {name: t for name, t in tensors.items() if name not in read and not name.startswith(inner)}
        for name in unread:
            self.delete_weight(name)
        return [name for name, tensor in unread.items() if id(tensor) not in still_there]

    def own_tensors(self, model: nn.Module) -> None:
        """Copy what the graph still shares with `model`, so that changes of one do not reach the other."""
        theirs = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        copies: dict[int, Tensor] = {}
        for name in dict.fromkeys(str(node.target) for node in self.reads()):
            tensor = self.weight(name)
            if id(tensor) in theirs:
                copies.setdefault(id(tensor), tensor.detach().clone())
                self.set_weight(name, copies[id(tensor)], buffer=not isinstance(tensor, nn.Parameter))

    def free_name(self, name: str) -> str:
        """`name`, or with a number behind it where it is taken."""
        taken = {
            *dict(self.graph_module.named_parameters(remove_duplicate=False)),
            *dict(self.graph_module.named_buffers(remove_duplicate=False)),
            *dict(self.graph_module.named_modules(remove_duplicate=False)),
        }
        numbered = (f"{name}_{i}" for i in itertools.count(1))
        return name if name not in taken else next(n for n in numbered if n not in taken)

    def check(self) -> None:
        """Recompile, and re-derive every node's shape and dtype: what a pass must leave legal.

        Raises:
            PassError: the graph is malformed, reads a tensor that is not there, or its shapes do not fit together.
        """
        graph = self.graph
        for node in self.reads():
            self.weight(str(node.target))
        try:
            graph.lint()
            self.graph_module.recompile()
            self._propagate()
        except Exception as error:
            raise PassError(str(error)) from error

    def _propagate(self) -> None:
        """Set every node's `meta["val"]` by running the graph on fake tensors."""
        values = [node.meta.get("val") for node in self.graph.nodes if node.op == "placeholder"]
        fakes = [v for v in values if isinstance(v, FakeTensor)]
        if fakes:
            with torch.no_grad():
                _ShapesOnly(self.graph_module, fakes[0].fake_mode).propagate_dont_convert_inputs(*values)

    @property
    def in_spec(self) -> pytree.TreeSpec:
        """The structure of (args, kwargs)."""
        return self.graph_module._in_spec

    def inputs(self) -> list[fx.Node]:
        """The placeholders, one for each leaf of (args, kwargs)."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]
