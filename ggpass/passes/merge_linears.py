"""MergeLinears: linears that read the same input (q/k/v, gate/up) become one."""

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from ggpass.graph.program import Program
from ggpass.graph.report import Change, Report, Skip
from ggpass.lowering.decide import Allocate
from ggpass.lowering.operators import DISPATCHED, Operators

aten = torch.ops.aten


def operands_of(node: fx.Node) -> dict[str, Any]:
    """Return the operands of a linear with one row for each output channel: nodes, or None for no bias."""
    if node.target is aten.linear.default:
        return {"weight": node.args[1], "bias": node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")}
    return {"codes": node.args[1], "scale": node.args[2], "bias": node.args[4]}


def may_write(target: object) -> bool:
    """Return True if an operator changes one of its arguments; sub-graphs may."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    return isinstance(target, torch._ops.HigherOrderOperator)


def _is_matrix(linear: fx.Node) -> bool:
    value = next(iter(operands_of(linear).values())).meta.get("val")
    return not isinstance(value, Tensor) or value.dim() == 2


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


@dataclass(frozen=True)
class Concatenate:
    """[p₁; p₂; …] along dimension 0 for each operand of several linears.

    (1,) scales are repeated, missing biases are zeros, and if all are missing the result is None.

    Attributes:
        rows: output channels of each linear.
        allocate: makes the memory of merged codes.
    """

    rows: tuple[int, ...]
    allocate: Allocate | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """Return what decides the result beside the operands."""
        return "concatenate", self.rows

    def __call__(self, *parts: Tensor | None) -> tuple[Tensor | None, ...]:
        """Join the operands, which lie behind each other: all codes, then all scales, then all biases."""
        count = len(self.rows)
        return tuple(self._join(parts[i : i + count]) for i in range(0, len(parts), count))

    empty = __call__

    def _join(self, parts: tuple[Tensor | None, ...]) -> Tensor | None:
        present = next((part.detach() for part in parts if part is not None), None)
        if present is None:
            return None
        full = [
            present.new_zeros(n) if p is None else p.detach().expand(n) if p.dim() == 1 else p.detach()
            for p, n in zip(parts, self.rows)
        ]
        if present.dtype is not torch.uint8 or self.allocate is None or isinstance(present, FakeTensor):
            return torch.cat(full)
        return torch.cat(full, out=self.allocate((sum(self.rows), present.shape[1]), torch.uint8))


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
        floats: whether float linears are merged too.
    """

    operators: Operators = DISPATCHED
    allocate: Allocate | None = None
    floats: bool = True

    def __call__(self, program: Program) -> Report:
        report = Report("MergeLinears")
        read = {node: str(node.target) for node in program.reads()}
        readers = Counter(name for node, name in read.items() for _ in node.users)
        for nodes in self._groups(program):
            reasons = {node: _reason_to_keep(node, read, readers) for node in nodes}
            report.skips += [Skip(n.name, reason, matrix=False) for n, reason in reasons.items() if reason]
            mergeable = [n for n, reason in reasons.items() if not reason]
            if len(mergeable) > 1:
                report.changes.append(self._merge(program, mergeable))
        return report

    def _groups(self, program: Program) -> list[list[fx.Node]]:
        """Return two or more linears that read one input, all float or all coded with one codebook; in graph order."""
        groups: dict[tuple[object, ...], list[fx.Node]] = {}
        linear = self.operators.linear
        wanted = (linear, aten.linear.default) if self.floats else (linear,)
        writes = 0
        for node in program.graph.nodes:
            # An in-place operator may change what the same node holds: linears on its two sides read two values.
            writes += node.op == "call_function" and may_write(node.target)
            if node.op == "call_function" and node.target in wanted and _is_matrix(node):
                codebook = node.args[3] if node.target is linear else None
                name = codebook.target if isinstance(codebook, fx.Node) else None
                groups.setdefault((node.args[0], node.target, name, writes), []).append(node)
        return [nodes for nodes in groups.values() if len(nodes) > 1]

    def _merge(self, program: Program, nodes: list[fx.Node]) -> Change:
        operands = [operands_of(n) for n in nodes]
        roles = list(operands[0])  # "codes" or "weight" first
        names = [str(o[roles[0]].target) for o in operands]
        rows = tuple(program.weight(name).shape[0] for name in names)
        parts = [None if o[role] is None else program.weight(str(o[role].target)) for role in roles for o in operands]
        merged = {role: program.free_name(f"{names[0]}_merged_{role}") for role in roles}
        coded = roles[0] == "codes"
        program.derive(merged.values(), Concatenate(rows, self.allocate), parts, buffer=coded)
        with program.graph.inserting_before(nodes[0]):
            present = {role for role in roles if any(o[role] is not None for o in operands)}
            reads = {role: program.get_attr(name) if role in present else None for role, name in merged.items()}
            join(program.graph, nodes, reads, list(rows))
        program.prune()
        title = " + ".join(program.label(name).removesuffix("_codes") for name in names)
        return Change(title, f"{len(nodes)} linears merged: {sum(rows)} channels")


def _reason_to_keep(node: fx.Node, read: dict[fx.Node, str], readers: Counter[str]) -> str:
    """Return the reason why a linear stays apart, or ''.

    Args:
        node: the linear.
        read: the nodes that yield the program's tensors, with the tensors' names.
        readers: how many nodes read the tensor of a name.
    """
    for role, tensor in operands_of(node).items():
        if tensor is None:
            continue
        if tensor not in read:
            return f"its {role} is computed"
        if readers[read[tensor]] > 1:
            return f"its {role} {tensor.target} has other readers"
    return ""
