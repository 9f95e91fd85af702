"""MergeLinears: linears that read the same input (q/k/v, gate/up) become one."""

import operator
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ggpass.lowering import Allocate
from ggpass.ops import DISPATCHED, Operators
from ggpass.pipeline import Change, Report, Skip
from ggpass.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeLinears:
    """(x·W₁ᵀ + b₁, x·W₂ᵀ + b₂, …) → split(x·[W₁; W₂; …]ᵀ + [b₁; b₂; …]).

    1. The linears read the same node, and are all float or all coded with one codebook.
    2. Weights, scales and biases are tensors of the program that no other node reads: a tied weight stays apart.
    3. A missing bias counts as zeros where another linear of the group has one; without any, there is none.
    4. A result is a view of the merged one: a `view` behind it becomes `reshape`, which copies where it must.
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
        groups: dict[tuple[object, ...], list[fx.Node]] = {}
        for node in program.calls(self.operators.linear, aten.linear.default):
            coded = node.target is self.operators.linear
            codebook = node.args[3].target if coded else None  # type: ignore[union-attr]
            groups.setdefault((node.args[0], node.target, codebook), []).append(node)
        for nodes in groups.values():
            if len(nodes) < 2:
                continue
            alone = [n for n in nodes if self._reason_to_keep(n, reads)]
            report.skips += [Skip(n.name, self._reason_to_keep(n, reads), matrix=False) for n in alone]
            mergeable = [n for n in nodes if n not in alone]
            if len(mergeable) > 1:
                report.changes.append(self._merge(program, mergeable))
        if report.changes:
            program.prune()
        return report

    def _tensors(self, node: fx.Node) -> dict[str, object]:
        """The operands of a linear that have one entry (a row) for each output channel."""
        if node.target is self.operators.linear:
            return {"codes": node.args[1], "scale": node.args[2], "bias": node.args[4]}
        return {"weight": node.args[1], "bias": node.args[2] if len(node.args) > 2 else None}

    def _reason_to_keep(self, node: fx.Node, reads: Counter[str]) -> str:
        for role, tensor in self._tensors(node).items():
            if tensor is None:
                continue
            if not isinstance(tensor, fx.Node) or tensor.op != "get_attr":
                return f"its {role} is computed"
            if reads[str(tensor.target)] > 1 or len(tensor.users) > 1:
                return f"its {role} {tensor.target} has other readers"
        return ""

    def _merge(self, program: Program, nodes: list[fx.Node]) -> Change:
        first = nodes[0]
        source = first.args[0]
        tensors = [self._tensors(n) for n in nodes]
        matrix = "codes" if first.target is self.operators.linear else "weight"

        def value(node: object) -> Tensor | None:
            return program.weight(str(node.target)).detach() if isinstance(node, fx.Node) else None

        matrices = [value(t[matrix]) for t in tensors]
        rows = [m.shape[0] for m in matrices if m is not None]
        prefix = str(tensors[0][matrix].target)  # type: ignore[attr-defined]
        operands = []
        with program.graph.inserting_before(first):
            for role in tensors[0]:
                parts = [value(t[role]) for t in tensors]
                merged = self._concatenate(parts, rows)
                if merged is None:
                    operands.append(None)
                    continue
                name = f"{prefix}_merged_{role}"
                program.set_weight(name, merged, buffer=matrix == "codes")
                operands.append(program.get_attr(name))
            if matrix == "codes":
                operands.insert(2, first.args[3])  # type: ignore[arg-type]
            joined = program.graph.call_function(first.target, (source, *operands))  # type: ignore[arg-type]
            parts_node = program.graph.call_function(aten.split_with_sizes.default, (joined, rows, -1))
            for position, node in enumerate(nodes):
                part = program.graph.call_function(operator.getitem, (parts_node, position))
                part.meta["val"] = node.meta.get("val")
                for user in list(node.users):
                    if user.target is aten.view.default:
                        user.target = aten.reshape.default
                node.replace_all_uses_with(part)
        for node in nodes:
            program.graph.erase_node(node)
        program.prune()
        names = [str(t[matrix].target).removesuffix("_codes") for t in tensors]  # type: ignore[attr-defined]
        return Change(" + ".join(names), f"{len(nodes)} linears read {source}: merged, {sum(rows)} channels")

    def _concatenate(self, parts: list[Tensor | None], rows: list[int]) -> Tensor | None:
        """The parts below each other; (1,) scales are repeated for their rows, missing biases are zeros."""
        present = next((p for p in parts if p is not None), None)
        if present is None:
            return None
        full = [present.new_zeros(n) if p is None else p.expand(n) if p.dim() == 1 else p for p, n in zip(parts, rows)]
        if present.dtype is not torch.uint8 or self.allocate is None:
            return torch.cat(full)
        out = self.allocate((sum(rows), present.shape[1]), torch.uint8)
        return torch.cat(full, out=out)
