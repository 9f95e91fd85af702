"""f(z): what a graph does, element by element, with the result z of a layer, up to where it meets something else."""

import heapq
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ggpass.graph.program import Program
from ggpass.passes.gg_init.gain import gain_of, is_linear, points
from ggpass.passes.gg_init.operator_names import KEEPERS, MOVERS, POINTWISE, name_of

aten = torch.ops.aten

#: Words for the place where f ends.
_ENDS = {"add": "a residual add", "add_": "a residual add", "mul": "a product", "output": "the output"}


@dataclass(frozen=True)
class _Value:
    """What an element holds: f at `points()`, where it is, and the operators that made it so."""

    grid: Tensor
    place: fx.Node
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Activation:
    """One function that a graph applies to a layer's result.

    Attributes:
        gain: ξ.
        why: in words: `relu after it`.
    """

    gain: float
    why: str


def activations_after(program: Program, start: fx.Node, order: Mapping[fx.Node, int]) -> list[Activation]:
    """Return the functions that reach the readers of `start`'s result, each once.

    1. Dropout, casts, views, splits, pooling, norms and the addition of a constant (a bias) are seen through.
    2. Operators that compute element by element from z alone, scalars and constants of one value are evaluated,
       however many a function is made of (the tanh form of GELU is eight).
    3. f ends where another value joins (a residual, a gate, a matmul), at a softmax, and at the output. A
       multiplication by a scalar right before that end is the model's own scaling and not part of f.
    4. A norm is seen through since its result has the power that the inputs of a layer are taken to have; the
       scale of the weight before it does not change what the model computes.

    Args:
        order: of the graph's nodes.
    """
    walk = _Walk(program, start, order)
    walk.run()
    found: dict[str, Activation] = {}
    for value, end in walk.ends:
        activation = _describe(value, end)
        found.setdefault(activation.why, activation)
    return list(found.values())


#: Operators too common to name a function by.
_PLAIN = ("add", "sub", "mul", "div")


def _describe(value: _Value, end: fx.Node) -> Activation:
    words = [w for w in dict.fromkeys(value.words) if w not in _PLAIN]
    if not words and is_linear(value.grid):
        name = name_of(end)
        return Activation(1.0, f"linear into {_ENDS.get(name, name)}")
    words = words or list(dict.fromkeys(value.words))
    text = words[0] if len(words) == 1 else "a function of " + ", ".join(words)
    gain = gain_of(value.grid)
    if gain is None:
        return Activation(1.0, f"{text} after it, which no gain brings to unit power")
    return Activation(gain, f"{text} after it")


class _Walk:
    """Follows one result through the graph, in execution order."""

    def __init__(self, program: Program, start: fx.Node, order: Mapping[fx.Node, int]) -> None:
        self.program = program
        self.order = order
        self.start = start
        self.known: dict[fx.Node, _Value] = {start: _Value(points(), start)}
        self.unscaled: dict[fx.Node, _Value] = {}
        self.ends: list[tuple[_Value, fx.Node]] = []

    def run(self) -> None:
        queue = [(self.order[user], user) for user in self.start.users]
        heapq.heapify(queue)
        seen = set(self.start.users)
        while queue:
            _, node = heapq.heappop(queue)
            if self._reads_a_statistic(node):
                continue
            value = self._value(node)
            if value is None:
                self.ends += [
                    (self.unscaled.get(a, self.known[a]), node) for a in node.all_input_nodes if a in self.known
                ]
                continue
            self.known[node] = value
            for user in node.users:
                if user not in seen:
                    seen.add(user)
                    heapq.heappush(queue, (self.order[user], user))

    @staticmethod
    def _reads_a_statistic(node: fx.Node) -> bool:
        """Return True if a node reads a size, or reduces with keepdim: the parts of a norm, and no layer's input."""
        if node.op == "output":
            return False
        schema = getattr(node.target, "_schema", None)
        for position, argument in enumerate(schema.arguments if schema else ()):
            if argument.name == "keepdim":
                given = node.args[position] if position < len(node.args) else node.kwargs.get("keepdim")
                return given is True
        value = node.meta.get("val")
        return value is not None and not isinstance(value, (torch.Tensor, tuple, list))

    def _value(self, node: fx.Node) -> _Value | None:
        name = name_of(node)
        sources = [a for a in node.all_input_nodes if a in self.known]
        if node.target is operator.getitem or name in KEEPERS or name in MOVERS:
            if len(sources) != 1 or node.args[0] is not sources[0]:
                return None
            source = self.known[sources[0]]
            if sources[0] in self.unscaled:
                old = self.unscaled[sources[0]]
                self.unscaled[node] = old
            return source if name in KEEPERS else _Value(source.grid, node, source.words)
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return None
        if torch.Tag.pointwise not in node.target.tags and name not in POINTWISE:
            return None
        return self._pointwise(node, name, sources)

    def _pointwise(self, node: fx.Node, name: str, sources: list[fx.Node]) -> _Value | None:
        places = {self.known[s].place for s in sources}
        others = [a for a in node.all_input_nodes if a not in self.known]
        if len(places) != 1:
            return None
        first = self.known[sources[0]]
        if name in ("add", "add_", "sub", "sub_") and others:
            return first if len(sources) == 1 and all(self._constant(o) is not None for o in others) else None
        grids: dict[fx.Node, Any] = {s: self.known[s].grid.clone() for s in sources}
        for other in others:
            constant = self._constant(other)
            if constant is None or not bool((constant == constant.flatten()[0]).all()):
                return None
            grids[other] = constant.flatten()[:1].double()
        arguments, keywords = fx.map_arg((node.args, dict(node.kwargs)), grids.__getitem__)
        grid = node.target(*arguments, **keywords)  # type: ignore[operator]
        words = tuple(w for s in sources for w in self.known[s].words)
        value = _Value(grid, first.place, (*words, name.removesuffix("_")))
        if name in ("mul", "div") and sources == [node.args[0]] and sources[0] is not node.args[1]:
            self.unscaled[node] = self.unscaled.get(sources[0], first)
        if node.target._schema.is_mutable:  # type: ignore[union-attr]
            self.known[node.args[0]] = value  # type: ignore[index]
        return value

    def _constant(self, node: fx.Node) -> Tensor | None:
        """Return the tensor of the program that a node yields, seen through views; None where it is computed."""
        while node.op == "call_function" and name_of(node) in KEEPERS | MOVERS and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        if node.op != "get_attr":
            return None
        tensor = self.program.weight(str(node.target)).detach()
        return tensor if tensor.numel() else None
