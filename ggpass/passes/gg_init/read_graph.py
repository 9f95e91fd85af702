"""The weights of a Program: which operators compute with each, and what follows them."""

import operator
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from ggpass.graph.program import Program
from ggpass.graph.weights import Weight
from ggpass.passes.gg_init import operators
from ggpass.passes.gg_init.candidate import Candidate, Use
from ggpass.passes.gg_init.follow import activations_after
from ggpass.passes.gg_init.operator_names import KEEPERS, REARRANGERS, name_of

#: Operator -> the position of the weight.
WEIGHT_AT = {
    "linear": (1,),
    "matmul": (0, 1),
    "mm": (0, 1),
    "bmm": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
    "embedding": (0,),
    "embedding_bag": (0,),
    "conv1d": (1,),
    "conv2d": (1,),
    "conv3d": (1,),
    "convolution": (1,),
    "conv_transpose1d": (1,),
    "conv_transpose2d": (1,),
    "conv_transpose3d": (1,),
}


def read_graph(program: Program) -> list[Candidate]:
    """Return the float Parameters that a graph reads, one Candidate for each tensor, in the order they are met."""
    order = {node: position for position, node in enumerate(program.graph.nodes)}
    reads: dict[int, list[fx.Node]] = {}
    for node in program.reads():
        reads.setdefault(id(program.weight(str(node.target))), []).append(node)
    weights = [w for w in program.tensors() if isinstance(w.tensor, nn.Parameter) and w.tensor.is_floating_point()]
    return [_read(program, weight, reads[id(weight.tensor)], order) for weight in weights]


def _read(program: Program, weight: Weight, nodes: list[fx.Node], order: Mapping[fx.Node, int]) -> Candidate:
    if not weight.is_matrix:
        return Candidate(weight, reason=weight.reason_of_kind())
    uses: list[Use] = []
    others: list[str] = []
    for source, user in (pair for node in nodes for pair in _readers(node)):
        use = _use(user, source)
        if use is None:
            others.append(name_of(user))
            continue
        uses += _with_gains(use, program, user, order)
    if not uses:
        reason = f"used by {', '.join(dict.fromkeys(others))}, for which there is no rule"
        reason = reason if others else "the graph does not use it"
        return Candidate(weight, reason=reason)
    return Candidate(weight, tuple(uses))


def _with_gains(use: Use, program: Program, node: fx.Node, order: Mapping[fx.Node, int]) -> Iterator[Use]:
    """Yield the use once for each function that follows it; embeddings are no matmuls and need no gain."""
    if use.operator.startswith("embedding"):
        yield use
        return
    for activation in activations_after(program, node, order):
        yield replace(use, gain=activation.gain, why=activation.why)


def _readers(source: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(node that yields the weight or a part of it, node that reads it), seen through what only rearranges it."""
    for user in source.users:
        if user.target is operator.getitem or (name_of(user) in KEEPERS | REARRANGERS and user.args[0] is source):
            yield from _readers(user)
        else:
            yield source, user


def _use(node: fx.Node, source: fx.Node) -> Use | None:
    """What a node does with the weight that `source` yields; None for an operator without a rule."""
    name = name_of(node)
    positions = [i for i in WEIGHT_AT.get(name, ()) if i < len(node.args) and node.args[i] is source]
    value = source.meta.get("val")
    if len(positions) != 1 or not isinstance(value, Tensor) or value.dim() < 2:
        return None
    shape = [int(size) for size in value.shape]
    if name == "linear":
        return operators.linear(shape)
    if name in ("embedding", "embedding_bag"):
        padding = _argument(node, "padding_idx", -1)
        return operators.embedding(shape, padding if padding is not None and padding >= 0 else None, name)
    if "conv" not in name:
        right = positions[0] == WEIGHT_AT[name][-1]
        return operators.matmul(shape, name) if right else operators.linear(shape, name)
    if "transpose" in name or _argument(node, "transposed", False):
        return operators.transposed_convolution(shape, _argument(node, "stride", [1]), _argument(node, "groups", 1))
    return operators.convolution(shape)


def _argument(node: fx.Node, name: str, default: Any) -> Any:
    """Return an argument of an operator's call by its name in the schema."""
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)
    return default
