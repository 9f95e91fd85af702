"""CleanUp: nodes that compute nothing, and tensors that nothing reads, go."""

from dataclasses import dataclass

import torch

from ggpass.graph.program import Program
from ggpass.graph.report import Change, Report

aten = torch.ops.aten


@dataclass(frozen=True)
class CleanUp:
    """f(x) → f(x), with fewer nodes.

    1. `dropout` at inference, `alias` and `detach` are the identity: their users read their input.
    2. Nodes whose results nobody reads are erased; nodes with effects stay.
    3. Tensors that no node reads are unbound.
    """

    def __call__(self, program: Program) -> Report:
        report = Report("CleanUp")
        before = len(program.graph.nodes)
        for node in program.calls(aten.dropout.default, aten.alias.default, aten.detach.default):
            if node.target is not aten.dropout.default or node.args[2] is False:
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
                program.graph.erase_node(node)
        program.graph.eliminate_dead_code()
        unread = program.prune()
        erased = before - len(program.graph.nodes)
        if erased:
            report.changes.append(Change("graph", f"{erased} of {before} nodes erased"))
        report.changes += [Change(name, "unbound: nothing reads it") for name in unread]
        return report
