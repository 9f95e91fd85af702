"""The weights of a Program: which operators compute with each, and what follows them."""

import operator
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from ggpass.passes.gg_init import operators
from ggpass.passes.gg_init.follow import activations_after
from ggpass.passes.gg_init.element_places import KEEPERS, REARRANGERS, packet_of
from ggpass.passes.gg_init.reading import Reading, Use
from ggpass.graph.program import Program

#: Packet -> the position of the weight.
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


def read_graph(program: Program) -> list[Reading]:
    """The float Parameters that a graph reads, one Reading for each tensor, in the order they are met."""
    order = {node: position for position, node in enumerate(program.graph.nodes)}
    module = program.graph_module
    aliases: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    sources: dict[int, list[fx.Node]] = {}
    tensors: dict[int, Tensor] = {}
    for node in program.reads():
        tensor = program.weight(str(node.target))
        if id(tensor) in aliases and tensor.is_floating_point():
            sources.setdefault(id(tensor), []).append(node)
            tensors[id(tensor)] = tensor
    return [_read(program, tensors[key], sorted(aliases[key]), nodes, order) for key, nodes in sources.items()]


def _read(
    program: Program, tensor: Tensor, names: list[str], nodes: list[fx.Node], order: Mapping[fx.Node, int]
) -> Reading:
    if tensor.dim() < 2:
        return Reading(tuple(names), tensor, reason=f"{tensor.dim()}-D (bias, norm): stays as it is")
    uses: list[Use] = []
    others: list[str] = []
    for source, user in (pair for node in nodes for pair in _readers(node)):
        use = _use(user, source)
        if use is None:
            others.append(packet_of(user))
            continue
        uses += _with_gains(use, program, user, order)
    if not uses:
        reason = "the graph does not use it"
        if others:
            reason = f"used by {', '.join(dict.fromkeys(others))}, for which there is no rule"
        return Reading(tuple(names), tensor, reason=reason)
    return Reading(tuple(names), tensor, tuple(uses))


def _with_gains(use: Use, program: Program, node: fx.Node, order: Mapping[fx.Node, int]) -> Iterator[Use]:
    """The use once for each function that follows it; embeddings are no matmuls and need no gain."""
    if use.operator.startswith("embedding"):
        yield use
        return
    for activation in activations_after(program, node, order):
        yield replace(use, gain=activation.gain, why=activation.why)


def _readers(source: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(node that yields the weight or a part of it, node that reads it), seen through what only rearranges it."""
    for user in source.users:
        if user.target is operator.getitem or (packet_of(user) in KEEPERS | REARRANGERS and user.args[0] is source):
            yield from _readers(user)
        else:
            yield source, user


def _use(node: fx.Node, source: fx.Node) -> Use | None:
    """What a node does with the weight that `source` yields; None for an operator without a rule."""
    name = packet_of(node)
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
    """An argument of an operator's call by its name in the schema."""
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)
    return default
