"""BackSlash: rate-constrained training, as a regularizer beside an optimizer or as nodes of a training graph."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ggpass.graph.edges import insert_on_weight_edges
from ggpass.graph.program import Program
from ggpass.graph.report import Change, Report, Skip
from ggpass.passes.backslash.regularizer import Regularizer
from ggpass.passes.backslash.selection import select
from ggpass.passes.backslash.settings import RateSettings


@dataclass(frozen=True)
class BackSlash(RateSettings):
    """min D(θ) + λ·R(θ), R the bits of the weights under a generalized Gaussian fitted to each tensor.

    After "BackSlash: Rate Constrained Optimized Training of Large Language Models" (arXiv 2504.16968), with a proximal
    step, a slope in true bits, and λ that can follow a target. The fields are those of `RateSettings`.

    `attach(model, optimizer)` works beside any training loop: BackSlash(target_bits=1.5).attach(model, optimizer).
    """

    def __call__(self, program: Program) -> Report:
        """Insert a node on each regularized weight's edge of a training graph, in the coupled modes.

        1. One node for each weight, however many uses and names. It is the identity in both directions: it marks
           where λ·m·ρ'(|w|)·sign(w) joins the gradient.
        2. From `attach` on the optimizer's step adds this slope once: whatever number of forwards and backwards led
           to it, and whatever the loss was multiplied by. Without `attach` nothing is added.
        3. The proximal modes act after the optimizer's step: no node, and the report says so.

        Raises:
            WeightError: nothing to regularize, or a pattern that matches nothing.
        """
        report = Report("BackSlash")
        if "coupled" not in self.mode:
            report.notes.append(f"mode={self.mode!r} acts after the optimizer's step: attach(optimizer); no node")
            return report
        selection = select(program.graph_module, self)
        report.skips += selection.report.skips
        used = {id(weight.tensor) for weight in program.tensors()}
        chosen = []
        for name, tensor in zip(selection.names, selection.weights):
            if id(tensor) in used:
                chosen.append(name)
                report.changes.append(Change(name, "the rate's gradient joins its own"))
            else:
                report.skips.append(Skip(name, "the graph does not use it"))
        insert_on_weight_edges(program, chosen, lambda _, source, __: program.graph.call_function(rate_node, (source,)))
        report.notes.append("attach(optimizer): its step adds the slope of the marked weights, once")
        return report

    def attach(self, model: nn.Module, *optimizers: Optimizer) -> Regularizer:
        """Regularize a model's matrices at every step of its optimizer.

        Args:
            model: any module; its Parameters stay its own.
            optimizers: those that train it, usually one.

        Returns:
            The attached Regularizer: `status()`, `bits()`, `state_dict()`, `detach()`.

        Raises:
            WeightError: nothing to regularize, or a pattern that matches nothing.
            InputError: the optimizers hold none of the weights, or the settings do not fit the model.
        """
        return Regularizer(model, self).attach(*optimizers)


def rate_node(weight: Tensor) -> Tensor:
    """w → w forward, g → g backward: marks a weight's edge in a training graph.

    The slope λ·∂R/∂w joins the gradient at the optimizer's step, once. A node cannot add it exactly: it is passed as
    often as forwards and backwards are run for a step, and does not see the factor of the loss (1/k of micro-batches,
    the scale of a gradient scaler).

    Args:
        weight: floating, any shape.

    Returns:
        A view of the weight.
    """
    alias: Tensor = torch.ops.aten.alias(weight)  # unlike a view, it passes sparse gradients
    return alias
