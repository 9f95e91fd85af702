"""Program: the one IR, an unlifted ATen `fx.GraphModule` with its weights, edited copy-on-write."""

import copy
import gc
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from ggpass.errors import PassError, TraceError
from ggpass.graph.report import Report
from ggpass.graph.weights import Selection, Weight, weights_of_graph


def owner_of(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the submodule that holds the tensor of a dotted name, and the tensor's name in it; made where missing."""
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


def _run_on(module: fx.GraphModule, mode: FakeTensorMode, values: list[Any]) -> None:
    # torch's decompositions in Python: composite kernels in C++ take no symbolic shapes, or make them static.
    with torch.no_grad(), enable_python_dispatcher():
        _ShapesOnly(module, mode).propagate_dont_convert_inputs(*values)


def _example(value: Any) -> Any:
    """Return a fake tensor, or a size, with the sizes of the traced example in the place of open ones."""
    if isinstance(value, FakeTensor):
        return torch.empty(
            [int(size.node.hint) if isinstance(size, torch.SymInt) else size for size in value.shape],
            dtype=value.dtype,
            device=value.device,
        )
    return value.node.hint if isinstance(value, torch.SymInt) else value


class Program:
    """A traced model: `graph` computes, `weights()` are the matrices that it computes with.

    For deployment the tensors are the traced model's own until a pass replaces one: `replace` and `set_weight` rebind
    names and never write into a tensor, so the model that was traced stays as it was.

    A program that trains reads the caller's own Parameters, which the optimizer holds: there `replace` writes into
    them, and a pass that puts other tensors in their place is refused by the Pipeline.

    Attributes:
        graph_module: the graph and its tensors.
        training: whether it is a training graph.
        frozen: of a training graph: whether `replace` leaves the weights alone, since an earlier trace of the same
            model has written them.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        model: nn.Module | None = None,
        *,
        training: bool = False,
        frozen: bool = False,
    ) -> None:
        """Take over a graph.

        Args:
            graph_module: an unlifted ATen graph.
            model: the traced model, which knows all names of tied weights; a graph may read only one of them.
            training, frozen: as the attributes.
        """
        self.graph_module = graph_module
        self.training = training
        self.frozen = frozen
        named = (model or graph_module).named_parameters(remove_duplicate=False)
        # Weak: a weight that a pass has replaced is not kept in memory for its names.
        self._named: dict[str, weakref.ref[Tensor]] = {name: weakref.ref(tensor) for name, tensor in named}
        self._trained = {str(n.target): self.weight(str(n.target)) for n in self.reads() if n.users} if training else {}

    @classmethod
    def trace(
        cls,
        model: nn.Module,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        dynamic_shapes: Any = None,
    ) -> "Program":
        """Return the eval-mode graph of `model` at these inputs, by torch.export.

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
        program = cls(exported.module(check_guards=False), model)
        del exported
        gc.collect()  # tracing leaves megabytes in reference cycles, which would count towards compile's peak
        return program

    def copy(self) -> "Program":
        """Return a Program whose graph can be edited apart from this one's; the tensors are shared."""
        source = self.graph_module
        twin = fx.GraphModule(source, copy.deepcopy(source.graph))
        for name in ("_in_spec", "_out_spec"):
            if hasattr(source, name):
                setattr(twin, name, getattr(source, name))
        program = Program(twin, training=self.training, frozen=self.frozen)
        program._named, program._trained = dict(self._named), dict(self._trained)
        return program

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.graph_module(*args, **kwargs)

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    def calls(self, *targets: Any) -> Iterator[fx.Node]:
        """Yield the nodes that call one of `targets`, in execution order; safe to edit the graph meanwhile."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target in targets:
                yield node

    def reads(self) -> list[fx.Node]:
        """The `get_attr` nodes that yield tensors; others yield the sub-graphs of `cond`, autocast and their kin."""
        nodes = [node for node in self.graph.nodes if node.op == "get_attr"]
        return [n for n in nodes if not isinstance(getattr(self.graph_module, str(n.target), None), fx.GraphModule)]

    def weight(self, name: str) -> Tensor:
        """Return the tensor that `get_attr` nodes of this name read.

        Raises:
            PassError: there is none.
        """
        value: Any = self.graph_module
        for part in name.split("."):
            value = getattr(value, part, None)
        if not isinstance(value, Tensor):
            raise PassError(f"the graph reads {name!r}, which is no tensor of the program")
        return value

    def tensors(self) -> list[Weight]:
        """Return every tensor that the graph reads and uses, vectors and buffers too, each once with all its names."""
        names = self.names_by_tensor()
        return weights_of_graph(
            self.reads(), lambda node: self.weight(str(node.target)), lambda tensor: names.get(id(tensor), ())
        )

    def names_by_tensor(self) -> dict[int, tuple[str, ...]]:
        """Return all names that the traced model has for each of its tensors, by the tensor's identity."""
        names: dict[int, tuple[str, ...]] = {}
        for name, reference in self._named.items():
            names[id(reference())] = (*names.get(id(reference()), ()), name)
        return names

    def weights(
        self, *, only: str | Iterable[str] = (), skip: str | Iterable[str] = (), report: Report | None = None
    ) -> list[Weight]:
        """Return the weights to work on: float matrices among the Parameters that the graph uses, tied ones once.

        Args:
            only, skip: patterns on any name of a weight, as for `ggpass.compile`.
            report: gets a Skip with the reason for each other float tensor.

        Raises:
            WeightError: a pattern that matches no weight, or a weight on the meta device.
        """
        tensors = [w for w in self.tensors() if w.tensor.is_floating_point()]
        selection = Selection(only, skip)  # type: ignore[arg-type]
        selection.check(self.matrix_names())
        return selection.choose(tensors, report)

    def matrix_names(self) -> list[str]:
        """Return all names of the traced model's matrices, and of those that passes have added."""
        known = [name for name, ref in self._named.items() if (tensor := ref()) is not None and tensor.dim() >= 2]
        read = {str(n.target): self.weight(str(n.target)) for n in self.reads() if n.users}
        added = [name for name, tensor in read.items() if tensor.dim() >= 2 and isinstance(tensor, nn.Parameter)]
        return list(dict.fromkeys([*known, *added]))

    def replace(self, weight: Weight, value: Tensor, *, requires_grad: bool = False) -> None:
        """w ← value at all uses and names of a weight; its dtype and device stay.

        For deployment a Parameter, frozen unless said otherwise, takes the place of the old one, and the traced model
        stays as it was. In a training graph the caller's own Parameter is written to, so that its optimizer goes on
        with it.

        Args:
            weight: one of `weights()`.
            value: of the same shape.
            requires_grad: of the Parameter that takes the place of the old one.
        """
        tensor = weight.tensor
        if self.training:
            if not self.frozen:
                with torch.no_grad():
                    tensor.copy_(value)
            return
        parameter = nn.Parameter(value.to(tensor.device, tensor.dtype), requires_grad=requires_grad)
        for node in self.reads():
            if self.weight(str(node.target)) is tensor:
                self._bind(str(node.target), parameter)
        for name in weight.names:
            self._named[name] = weakref.ref(parameter)

    def derive(
        self,
        names: Iterable[str],
        function: Callable[..., tuple[Tensor | None, ...]],
        sources: Iterable[Tensor | None],
        buffer: bool = True,
    ) -> None:
        """(names) = function(sources): bind new tensors that are computed from the program's own.

        Args:
            names: of the results.
            function: of the sources; a None among its results binds nothing.
            sources: tensors that the graph reads, or None.
            buffer: whether the results are buffers, or frozen Parameters.
        """
        for name, value in zip(names, function(*sources)):
            if value is not None:
                self.set_weight(name, value, buffer)

    def set_weight(self, name: str, value: Tensor, buffer: bool = False) -> None:
        """Bind `name` to another tensor: a frozen Parameter, or a buffer."""
        self._bind(name, value if buffer else nn.Parameter(value, requires_grad=False))

    def _bind(self, name: str, value: Tensor) -> None:
        module, leaf = owner_of(self.graph_module, name)
        self.delete_weight(name)
        if isinstance(value, nn.Parameter):
            module.register_parameter(leaf, value)
        else:
            module.register_buffer(leaf, value)
        if name in self._named:
            self._named[name] = weakref.ref(value)

    def label(self, name: str) -> str:
        """Return the name that reports show for a tensor of the program."""
        return name

    def delete_weight(self, name: str) -> None:
        """Unbind `name`, if it is bound."""
        module, leaf = owner_of(self.graph_module, name)
        module._parameters.pop(leaf, None)
        module._buffers.pop(leaf, None)
        module._non_persistent_buffers_set.discard(leaf)
        if isinstance(module.__dict__.get(leaf), Tensor):
            delattr(module, leaf)  # a constant of the trace is a plain attribute

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
        """Return `name`, or if it is taken, `name` with a number behind it."""
        taken = {
            *dict(self.graph_module.named_parameters(remove_duplicate=False)),
            *dict(self.graph_module.named_buffers(remove_duplicate=False)),
            *dict(self.graph_module.named_modules(remove_duplicate=False)),
        }
        numbered = (f"{name}_{i}" for i in itertools.count(1))
        return name if name not in taken else next(n for n in numbered if n not in taken)

    def check(self) -> None:
        """Recompile, and derive every node's shape and dtype again: the legality that a pass must keep.

        Raises:
            PassError: the graph is malformed, reads a tensor that is not there, or its shapes do not fit together. Of
                a training graph: it no longer reads one of the caller's trainable Parameters.
        """
        graph = self.graph
        read = {id(self.weight(str(node.target))) for node in self.reads() if node.users}
        lost = [n for n, tensor in self._trained.items() if tensor.requires_grad and id(tensor) not in read]
        if lost:
            raise PassError(
                f"a training graph must go on reading the caller's own Parameters, and {', '.join(lost[:3])} would get "
                "no gradient: write with program.replace(weight, value), or run the pass when the model is compiled"
            )
        try:
            graph.lint()
            self.graph_module.recompile()
            self._propagate()
        except Exception as error:
            raise PassError(str(error)) from error

    def _propagate(self) -> None:
        """Set every node's `meta["val"]` by running the graph on fake tensors; what is open in it stays open."""
        values = [node.meta.get("val") for node in self.graph.nodes if node.op == "placeholder"]
        fakes = [v for v in values if isinstance(v, FakeTensor)]
        if not fakes:
            return
        mode, known = fakes[0].fake_mode, {node: node.meta.get("val") for node in self.graph.nodes}
        try:
            if mode.shape_env is not None:
                mode.shape_env.freeze()  # a comparison of sizes makes none of them static
            _run_on(self.graph_module, mode, values)
        except Exception:
            if not any(isinstance(size, torch.SymInt) for fake in fakes for size in fake.shape):
                raise
            # An operator that takes no symbolic shapes is no fault of a pass: the sizes of the example decide.
            with FakeTensorMode(allow_non_fake_inputs=True) as examples:
                _run_on(self.graph_module, examples, [_example(value) for value in values])
            for node, value in known.items():
                if value is not None:
                    node.meta["val"] = value

    @property
    def in_spec(self) -> pytree.TreeSpec:
        """Return the structure of (args, kwargs)."""
        return self.graph_module._in_spec

    def inputs(self) -> list[fx.Node]:
        """Return the placeholders, one for each leaf of (args, kwargs)."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]
