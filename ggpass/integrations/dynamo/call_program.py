"""CallProgram: Dynamo's graph as a Program with tensors that are arguments of each call.

Under torch.compile one compiled graph serves every module of a class, so no weight may be baked into it. The passes
that `ggpass.compile` runs edit this Program too; the tensors that they derive (codes, scales, merged biases) become
further arguments, which `Runner` derives from the weights of each call.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ggpass.graph.program import Program
from ggpass.integrations.dynamo.arguments import compiled_module, fake_of, parameter_name, source_name
from ggpass.integrations.dynamo.code_cache import Derived, Feed, Runner


class CallProgram(Program):
    """A graph with placeholders in the place of `get_attr`: a name is a placeholder's.

    Attributes:
        examples: Dynamo's arguments.
    """

    def __init__(self, source: fx.GraphModule, examples: Sequence[Any]) -> None:
        """Trace Dynamo's graph to ATen.

        Args:
            source: Dynamo's graph, which is not edited.
            examples: its arguments, fake or real.
        """
        self.examples = list(examples)
        self.fake_mode = detect_fake_mode(self.examples) or FakeTensorMode(shape_env=ShapeEnv())
        fakes = [fake_of(value, self.fake_mode) for value in self.examples]
        # A copy is traced: tracing runs the module, and Dynamo keeps the original.
        with self.fake_mode:
            module = make_fx(copy.deepcopy(source), pre_dispatch=True)(*fakes)
        placeholders = module.graph.find_nodes(op="placeholder")
        sources = [source_name(node) for node in source.graph.find_nodes(op="placeholder")]
        self._values: dict[str, Any] = {str(node.target): fake for node, fake in zip(placeholders, fakes)}
        self._nodes: dict[str, fx.Node] = {str(node.target): node for node in placeholders}
        self._feeds: dict[str, Feed] = {str(node.target): i for i, node in enumerate(placeholders)}
        self._labels = {str(node.target): parameter_name(name) for node, name in zip(placeholders, sources)}
        # Inputs of the model change from call to call: nothing is derived from them.
        self._state = {
            str(node.target)
            for node, fake, name in zip(placeholders, fakes, sources)
            if isinstance(fake, nn.Parameter) or (isinstance(fake, Tensor) and "_buffers['" in name)
        }
        super().__init__(module)
        self._name_weights()

    def _name_weights(self) -> None:
        """Find all names of each weight: Dynamo passes a tied one once, under one of its names."""
        model = compiled_module()
        named = [] if model is None else list(model.named_parameters(remove_duplicate=False))
        self._model_names = None if model is None else [name for name, p in named if p.dim() >= 2]
        names: dict[int, tuple[str, ...]] = {}
        for name, parameter in named:
            names[id(parameter)] = (*names.get(id(parameter), ()), name)
        self._all_names = {
            id(fake): names.get(id(example)) or (self._labels[name],)
            for (name, fake), example in zip(self._values.items(), self.examples)
            if isinstance(fake, Tensor)
        }

    def reads(self) -> list[fx.Node]:
        """Return the placeholders that yield weights and buffers, and what was derived from them."""
        return [node for node in self.graph.nodes if node.op == "placeholder" and str(node.target) in self._state]

    def names_by_tensor(self) -> dict[int, tuple[str, ...]]:
        """Return all names of each tensor, by its identity."""
        return self._all_names

    def matrix_names(self) -> list[str]:
        """Return all names of the compiled module's matrices; those of this graph if it is no module."""
        if self._model_names is not None:
            return self._model_names
        return [name for weight in self.tensors() if weight.is_matrix for name in weight.names]

    def weight(self, name: str) -> Tensor:
        """Return the fake tensor of an argument."""
        value = self._values.get(name)
        return value if isinstance(value, Tensor) else super().weight(name)

    def label(self, name: str) -> str:
        """Return the weight's name in the model; a placeholder's name has no dots."""
        return self._labels.get(name, name).removesuffix(".lowered.codes")

    def free_name(self, name: str) -> str:
        """Return a placeholder's name for a tensor, and note the tensor's own for reports."""
        free = f"ggpass_{len(self._labels)}"
        self._labels[free] = name
        return free

    def get_attr(self, name: str) -> fx.Node:
        """Return the placeholder of this name."""
        return self._nodes[name]

    def derive(
        self,
        names: Iterable[str],
        function: Callable[..., tuple[Tensor | None, ...]],
        sources: Iterable[Tensor | None],
        buffer: bool = True,
    ) -> None:
        """(names) = function(sources) at each call, kept as long as the sources live unchanged."""
        sources = list(sources)
        feed_of = {id(value): self._feeds[name] for name, value in self._values.items() if isinstance(value, Tensor)}
        derived = Derived(function, tuple(None if s is None else feed_of[id(s)] for s in sources))
        with self.fake_mode:
            values = function.empty(*sources)  # type: ignore[attr-defined]
        for output, (name, value) in enumerate(zip(names, values)):
            if value is not None:
                self._add(name, value, (derived, output))

    def _bind(self, name: str, value: Tensor) -> None:
        """Add a constant."""
        with self.fake_mode:
            self._add(name, torch.empty(value.shape, dtype=value.dtype, device=value.device), value)

    def _add(self, name: str, fake: Tensor, feed: Feed) -> None:
        with self.graph.inserting_after(self.graph.find_nodes(op="placeholder")[-1]):
            node = self.graph.placeholder(name)
        node.meta["val"] = fake
        self._values[name], self._nodes[name], self._feeds[name] = fake, node, feed
        self._state.add(name)

    def delete_weight(self, name: str) -> None:
        """Leave it: arguments that nothing reads go in `compile`."""

    def prune(self) -> list[str]:
        """Leave all arguments; those that nothing reads go in `compile`."""
        return []

    def check(self) -> None:
        """Recompile; the inner backend derives the shapes."""
        self.graph.lint()
        self.graph_module.recompile()

    def compile(self, inner: Callable[..., Any]) -> Runner:
        """Return the edited graph, compiled by `inner`; it takes Dynamo's arguments."""
        self.graph.eliminate_dead_code()
        # A weight that the graph reads only as codes does not enter it at all.
        for node in self.graph.find_nodes(op="placeholder"):
            if not node.users:
                self.graph.erase_node(node)
        self.graph_module.recompile()
        order = [str(node.target) for node in self.graph.find_nodes(op="placeholder")]
        feeds = [self._feeds[name] for name in order]
        # Dynamo's own arguments go on as Dynamo's: a tracer's fakes lack its notes on values that change.
        values = [self.examples[f] if isinstance(f, int) else self._values[n] for f, n in zip(feeds, order)]
        return Runner(inner(self.graph_module, values), feeds)
