"""MergeLinears: linears that read the same input (q/k/v, gate/up) become one."""

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ggpass.lowering.lowering import Allocate
from ggpass.lowering.operators import DISPATCHED, Operators
from ggpass.graph.pipeline import Change, Report, Skip
from ggpass.graph.program import Program

aten = torch.ops.aten


def operands_of(node: fx.Node) -> dict[str, Any]:
    """The operands of a linear that have one entry (a row) for each output channel: nodes, or None for no bias."""
    if node.target is aten.linear.default:
        return {"weight": node.args[1], "bias": node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")}
    return {"codes": node.args[1], "scale": node.args[2], "bias": node.args[4]}


def may_write(target: object) -> bool:
    """Whether an operator changes one of its arguments; sub-graphs may."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    return isinstance(target, torch._ops.HigherOrderOperator)


def _is_matrix(linear: fx.Node) -> bool:
    value = next(iter(operands_of(linear).values())).meta.get("val")
    return not isinstance(value, Tensor) or value.dim() == 2


def linear_groups(graph: fx.Graph, linear: object, targets: Iterable[object]) -> list[list[fx.Node]]:
    """Two or more linears that read one input, all float or all coded with one codebook; in graph order.

    Args:
        linear: the coded linear.
        targets: which of `linear` and `aten.linear` count.
    """
    groups: dict[tuple[object, ...], list[fx.Node]] = {}
    wanted = tuple(targets)
    writes = 0
    for node in graph.nodes:
        # An in-place operator may change what the same node holds: linears on its two sides do not read one value.
        writes += node.op == "call_function" and may_write(node.target)
        if node.op == "call_function" and node.target in wanted and _is_matrix(node):
            codebook = node.args[3] if node.target is linear else None
            name = codebook.target if isinstance(codebook, fx.Node) else None
            groups.setdefault((node.args[0], node.target, name, writes), []).append(node)
    return [nodes for nodes in groups.values() if len(nodes) > 1]


def reason_to_keep(node: fx.Node, source_op: str, readers: Callable[[fx.Node], int]) -> str:
    """Why a linear stays apart; empty where it can be merged.

    Args:
        source_op: the op of nodes that yield constants: `get_attr`, or `placeholder` in a backend.
        readers: how many nodes read the tensor that such a node yields.
    """
    for role, tensor in operands_of(node).items():
        if tensor is None:
            continue
        if not isinstance(tensor, fx.Node) or tensor.op != source_op:
            return f"its {role} is computed"
        if readers(tensor) > 1:
            return f"its {role} {tensor.target} has other readers"
    return ""


def join(graph: fx.Graph, nodes: list[fx.Node], operands: dict[str, Any], rows: list[int]) -> None:
    """Put one linear with the joined operands in the place of `nodes`; must be inside an insertion point.

    Args:
        operands: as `operands_of`, of the joined linear.
        rows: output channels of each node.
    """
    first = nodes[0]
    args = list(operands.values())
    if "codes" in operands:
        args.insert(2, first.args[3])
    joined = graph.call_function(first.target, (first.args[0], *args))  # type: ignore[arg-type]
    parts = graph.call_function(aten.split_with_sizes.default, (joined, rows, -1))
    for position, node in enumerate(nodes):
        part = graph.call_function(operator.getitem, (parts, position))
        # A linear's result is contiguous, and what follows may rely on it; for one row this copies nothing.
        part = graph.call_function(aten.contiguous.default, (part,))
        part.meta["val"] = node.meta.get("val")
        node.replace_all_uses_with(part)
    for node in nodes:
        graph.erase_node(node)


def concatenate(parts: list[Tensor | None], rows: list[int], allocate: Allocate | None = None) -> Tensor | None:
    """[p₁; p₂; …] along dimension 0; (1,) scales are repeated, missing biases are zeros, all missing is None."""
    present = next((p for p in parts if p is not None), None)
    if present is None:
        return None
    full = [present.new_zeros(n) if p is None else p.expand(n) if p.dim() == 1 else p for p, n in zip(parts, rows)]
    if present.dtype is not torch.uint8 or allocate is None:
        return torch.cat(full)
    return torch.cat(full, out=allocate((sum(rows), present.shape[1]), torch.uint8))


@dataclass(frozen=True)
class MergeLinears:
    """(x·W₁ᵀ + b₁, x·W₂ᵀ + b₂, …) → split(x·[W₁; W₂; …]ᵀ + [b₁; b₂; …]).

    1. The linears read the same node, and are all float or all coded with one codebook.
    2. Weights, scales and biases are tensors of the program that no other node reads: a tied weight stays apart.
    3. A missing bias counts as zeros where another linear of the group has one; without any, there is none.
    4. Each result is contiguous, as a linear's is. Linears on two sides of an in-place operator stay apart.
    5. A group that cannot be merged is reported with its reason.

    Attributes:
        operators: whose `linear` the lowered nodes call.
        allocate: makes the memory of merged codes.
    """

    operators: Operators = DISPATCHED
    allocate: Allocate | None = None

    def __call__(self, program: Program) -> Report:
        report = Report("MergeLinears")
        reads = Counter(str(n.target) for n in program.graph.nodes if n.op == "get_attr")

        def readers(node: fx.Node) -> int:
            return max(reads[str(node.target)], len(node.users))

        linear = self.operators.linear
        for nodes in linear_groups(program.graph, linear, (linear, aten.linear.default)):
            reasons = {node: reason_to_keep(node, "get_attr", readers) for node in nodes}
            report.skips += [Skip(n.name, reason, matrix=False) for n, reason in reasons.items() if reason]
            mergeable = [n for n, reason in reasons.items() if not reason]
            if len(mergeable) > 1:
                report.changes.append(self._merge(program, mergeable))
        return report

    def _merge(self, program: Program, nodes: list[fx.Node]) -> Change:
        operands = [operands_of(n) for n in nodes]
        matrix = next(iter(operands[0]))  # "codes" or "weight"
        names = [str(o[matrix].target) for o in operands]
        what = f"{len(nodes)} linears merged"
        rows = [program.weight(name).shape[0] for name in names]
        with program.graph.inserting_before(nodes[0]):
            merged: dict[str, Any] = {}
            for role in operands[0]:
                parts = [None if o[role] is None else program.weight(str(o[role].target)).detach() for o in operands]
                value = concatenate(parts, rows, self.allocate)
                merged[role] = None
                if value is not None:
                    name = program.free_name(f"{names[0]}_merged_{role}")
                    program.set_weight(name, value, buffer=matrix == "codes")
                    merged[role] = program.get_attr(name)
            join(program.graph, nodes, merged, rows)
        program.prune()
        return Change(" + ".join(n.removesuffix("_codes") for n in names), f"{what}: {sum(rows)} channels")
