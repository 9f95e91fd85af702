"""Where a graph uses its weights, grouped by tensor identity: tied weights are one tensor with several uses."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx

from ggpass.errors import WeightError

aten = torch.ops.aten


class Kind(Enum):
    """What a node does with a weight that a format can hold."""

    LINEAR = "linear"  # y = x · Wᵀ (+ b), W (N, K)
    MATMUL = "matmul"  # y = x · W (+ b), W (K, N): Hugging Face's Conv1D, or a parameter that the code multiplies by
    EMBEDDING = "embedding"  # y = W[ids], W (N, K)
    CONV = "conv"  # y = x ∗ W (+ b), W (N, C/groups, …)


#: (operator, argument that holds the weight) -> what it is there.
OPERATORS: dict[Any, tuple[int, Kind]] = {
    aten.linear.default: (1, Kind.LINEAR),
    aten.matmul.default: (1, Kind.MATMUL),
    aten.mm.default: (1, Kind.MATMUL),
    aten.addmm.default: (2, Kind.MATMUL),
    aten.embedding.default: (0, Kind.EMBEDDING),
    aten.conv1d.default: (1, Kind.CONV),
    aten.conv1d.padding: (1, Kind.CONV),
    aten.conv2d.default: (1, Kind.CONV),
    aten.conv2d.padding: (1, Kind.CONV),
    aten.convolution.default: (1, Kind.CONV),
}

TRANSPOSES = (aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default)


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern selects a weight: a shell pattern on its full name, or the name of a module above it."""
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.") or fnmatchcase(name, f"{pattern}.*")


def check_patterns(names: Iterable[str], only: Iterable[str], skip: Iterable[str]) -> None:
    """Raise WeightError where a pattern of `only` or `skip` selects no weight: a typo would go unseen."""
    known = list(names)
    for option, patterns in (("only", only), ("skip", skip)):
        for pattern in patterns:
            if not any(matches(name, pattern) for name in known):
                some = ", ".join(known[:5]) + (", …" if len(known) > 5 else "")
                raise WeightError(f"{option}={pattern!r} matches no weight of the model; its weights are {some}")


@dataclass(frozen=True)
class WeightUse:
    """One place where a weight is used.

    Attributes:
        node: the node that consumes it.
        kind: what the node is; None where no format can stand in for the weight, and then `reason` says why.
        transposed: whether the output channels are the weight's second dimension.
        reason: why this use cannot be lowered; empty where it can.
    """

    node: fx.Node
    kind: Kind | None
    transposed: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Weight:
    """One tensor of a graph, all its names and all its uses.

    Attributes:
        names: every name it is read under, in graph order; the first is the one reports use.
        tensor: the tensor itself.
        uses: every node that consumes it, seen through transposes.
    """

    names: tuple[str, ...]
    tensor: Tensor
    uses: tuple[WeightUse, ...]

    @property
    def name(self) -> str:
        return self.names[0]


def _is_matrix_transpose(node: fx.Node) -> bool:
    """Whether a node swaps the two dimensions of a matrix and does nothing else."""
    if node.target not in TRANSPOSES:
        return False
    if node.target is aten.transpose.int:
        return {d % 2 for d in node.args[1:]} == {0, 1}  # type: ignore[operator]
    if node.target is aten.permute.default:
        return [d % 2 for d in node.args[1]] == [1, 0]  # type: ignore[operator, union-attr]
    return True


def _classify(node: fx.Node, source: fx.Node, weight: Tensor, transposed: bool) -> WeightUse:
    if node.op == "output":
        return WeightUse(node, None, reason="the model returns it")
    entry = OPERATORS.get(node.target)
    if entry is None:
        return WeightUse(node, None, reason=f"used by {node.target}, which has no lowering")
    position, kind = entry
    if [a for a in node.all_input_nodes if a is source] != [source] or node.args[position] is not source:
        return WeightUse(node, None, reason=f"used by {node.target} as something other than its weight")
    if kind is Kind.CONV:
        if transposed or (node.target is aten.convolution.default and node.args[6]):
            return WeightUse(node, None, reason="a transposed convolution has no lowering")
        return WeightUse(node, kind)
    if weight.dim() != 2:
        return WeightUse(node, None, reason=f"used by {node.target} with {weight.dim()} dimensions, not 2")
    if kind is Kind.EMBEDDING and transposed:
        return WeightUse(node, None, reason="an embedding of a transposed weight has no lowering")
    if node.target is aten.addmm.default and not _adds_a_bias(node, weight.shape[0 if transposed else 1]):
        return WeightUse(node, None, reason="addmm with alpha, beta or more than a bias to add has no lowering")
    # linear multiplies by Wᵀ, matmul by W: one more transpose turns one into the other.
    return WeightUse(node, kind, transposed=transposed ^ (kind is Kind.MATMUL))


def _adds_a_bias(addmm: fx.Node, channels: int) -> bool:
    """Whether an addmm is x · W + b with one b for each output channel and no factors."""
    added = addmm.args[0]
    value = added.meta.get("val") if isinstance(added, fx.Node) else None
    return (
        isinstance(value, Tensor)
        and tuple(value.shape) == (channels,)
        and all(addmm.kwargs.get(factor, 1) == 1 for factor in ("alpha", "beta"))
    )


def uses_of(source: fx.Node, weight: Tensor) -> list[WeightUse]:
    """Every use of the weight that `source` yields, seen through transposes."""
    found = []
    work = [(source, False)]
    while work:
        node, transposed = work.pop()
        for user in node.users:
            if weight.dim() == 2 and _is_matrix_transpose(user):
                work.append((user, not transposed))
            else:
                found.append(_classify(user, node, weight, transposed))
    return found


def group_weights(sources: Iterable[fx.Node], tensor_of: Callable[[fx.Node], Tensor]) -> list[Weight]:
    """The weights behind `sources`, one entry for each tensor.

    Args:
        sources: the nodes that yield weights: `get_attr` in a Program, placeholders in a torch.compile backend.
        tensor_of: the tensor that such a node yields.
    """
    groups: dict[int, list[fx.Node]] = {}
    for source in sources:
        groups.setdefault(id(tensor_of(source)), []).append(source)
    weights = []
    for nodes in groups.values():
        tensor = tensor_of(nodes[0])
        names = tuple(dict.fromkeys(str(n.target) for n in nodes if n.users)) or (str(nodes[0].target),)
        weights.append(Weight(names, tensor, tuple(u for n in nodes for u in uses_of(n, tensor))))
    return weights
