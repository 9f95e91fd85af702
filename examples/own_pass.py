"""Two passes of your own, one for nodes and one for weights: callables that edit a Program and return a Report.

python examples/own_pass.py
"""

from dataclasses import dataclass

import torch
from rich.console import Console
from torch import nn

import ggpass
from ggpass import Change, Program, Report, Skip


@dataclass(frozen=True)
class ReluSquaredToRelu:
    """relu(x)² → relu(x): not the same function, so it is a choice of yours and no pass of ggpass.

    1. `square` (or `pow` 2) of a `relu` that nothing else reads.
    2. A `square` of anything else stays, and is reported.
    """

    def __call__(self, program: Program) -> Report:
        report = Report("ReluSquaredToRelu")
        aten = torch.ops.aten
        for node in program.calls(aten.square.default, aten.pow.Tensor_Scalar):
            source = node.args[0]
            if isinstance(source, torch.fx.Node) and source.target is aten.relu.default and len(source.users) == 1:
                node.replace_all_uses_with(source)
                program.graph.erase_node(node)
                report.changes.append(Change(node.name, f"replaced by {source.name}"))
            else:
                report.skips.append(Skip(node.name, "does not follow a relu of its own", matrix=False))
        return report


@dataclass(frozen=True)
class ClipWeights:
    """w → min(max(w, −kσ), kσ), σ² = mean w²: fewer outliers, so that a channel's scale fits the rest better.

    1. Float matrices that the graph computes with, those that `only` and `skip` choose; tied weights once.
    2. Every other float tensor stays, and is reported with its reason.

    Attributes:
        deviations: k.
        only, skip: patterns on names, as for `ggpass.compile`.
    """

    deviations: float = 3.0
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __call__(self, program: Program) -> Report:
        report = Report("ClipWeights")
        for weight in program.weights(only=self.only, skip=self.skip, report=report):
            bound = self.deviations * float(weight.tensor.detach().square().mean().sqrt())
            program.replace(weight, weight.tensor.clamp(-bound, bound))
            report.changes.append(Change(weight.title, f"clipped at ±{bound:.3g}"))
        return report


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.square(self.b(torch.square(torch.relu(self.a(x)))))


def main() -> None:
    """Run both passes ahead of those that lower the weights, and print what all of them did."""
    torch.manual_seed(0)
    x = torch.randn(3, 64)
    artifact = ggpass.compile(Squares(), (x,), target="rf8-cpu", passes=[ReluSquaredToRelu(), ClipWeights(skip=("b",))])
    Console().print(artifact.report)
    Console().print(artifact(x).shape)


if __name__ == "__main__":
    main()
