"""DeepShape: the pass that remaps trained weights onto a generalized Gaussian of lower shape: fewer bits."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ggpass.graph.program import Program
from ggpass.graph.report import Change, Report, Skip
from ggpass.graph.weights import Selection, Weight, as_patterns, weights_of_module
from ggpass.passes.deepshape.figures import Reshaped, in_words, summary
from ggpass.passes.deepshape.specification import Shaping
from ggpass.passes.deepshape.weights import Source, reshape


@dataclass
class ShapeReport(Report):
    """A Report that also holds the figures of each reshaped weight.

    Attributes:
        reshaped: ν, σ, bits and squared change of each weight, and of all together.
    """

    reshaped: Reshaped | None = field(default=None, repr=False)

    def add(self, reshaped: Reshaped, step: float, weights: Iterable[Weight]) -> None:
        """Add what became of these weights on a grid of this step."""
        chosen = {weight.name: weight for weight in weights}
        self.skips += [Skip(name, reason, chosen[name].nbytes) for name, reason in reshaped.skipped]
        self.changes += [Change(chosen[shaped.name].title, in_words(shaped)) for shaped in reshaped.shaped]
        self.notes.append(summary(reshaped, step))
        self.reshaped = reshaped


@dataclass(frozen=True)
class DeepShape(Shaping):
    """w' = Δ·round(Q(p(w); 0.8ν, 0.6α) / Δ), p(w) the rank of w among all weights and ν, α their fit.

    DeepShape of arXiv 2506.00486 (v1 to v3): all weights quantized at Δ = 2^-13, a generalized Gaussian fitted, ν and α
    lowered, and the weights' ranks mapped onto the target's histogram. What its text leaves open is decided so:

    1. Histogram specification is by rank, in the order of the values: equal weights go to one value, the different
       weights that share a cell are spread over the target's cells, the map is monotone, and it is odd where the
       histogram is symmetric (`deepshape.specification.specify` has the formula). The target's histogram is exact, the
       integral of its density over each cell.
    2. A value that occurs fewer than `rare` = 1000 times keeps its weights, to the last bit; ranks count them
       nevertheless. `rare` is a count in all weights together: a tensor or a channel has it in proportion to its size.
    3. Matrices only: biases, norms and whatever has less than two dimensions stay, as do weights that are empty,
       constant, too small for the grid or of ν < 0.5. Each is reported.
    4. `mode="compensated"`: the target's scale is not 0.6α but such that Σw² over the remapped weights of each tensor
       (each output channel with `granularity="channel"`) stays as it is, and with it the power of the layer's outputs
       on inputs without correlation: E‖Wx‖² = E[x²]·Σw². Rare values stay here too; where the heavier target crosses
       them the whole is not monotone, and `rare=0` makes it so.
    5. Tied weights are reshaped once, by tensor identity.
    6. In a Program the weights are replaced by frozen ones and the model it was traced from stays as it is. In a
       training graph, and in a module (`on_module`), the Parameters themselves are written to, so that an optimizer
       that holds them goes on with them.

    Attributes:
        mode, granularity, shape_ratio, scale_ratio, step, rare: as in `deepshape.specification.Shaping`.
        only: patterns on names; where there are any, a weight must match one of them.
        skip: patterns of weights to leave alone; stronger than `only`.

    Raises:
        FormatError: a setting that is none of those.
        WeightError: NaN or infinity in a weight, or a pattern that matches none; nothing was changed then.
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("only", "skip"):
            object.__setattr__(self, name, as_patterns(getattr(self, name)))

    def __call__(self, program: Program) -> ShapeReport:
        """Reshape the matrices that a graph uses."""
        report = ShapeReport("DeepShape")
        weights = program.weights(only=self.only, skip=self.skip, report=report)
        return self._run(weights, report, program.replace)

    def on_module(self, model: nn.Module) -> ShapeReport:
        """Return the same on a module, in place: its Parameters keep their identity and their requires_grad.

        Args:
            model: any module that holds float Parameters.

        Raises:
            WeightError: as above; the model is as it was then.
        """
        report, selection, weights = ShapeReport("DeepShape"), Selection(self.only, self.skip), weights_of_module(model)
        selection.check(name for weight in weights if weight.is_matrix for name in weight.names)
        return self._run(selection.choose(weights, report), report, lambda weight, new: weight.tensor.copy_(new))

    def _run(
        self, weights: Sequence[Weight], report: ShapeReport, write: Callable[[Weight, Tensor], Any]
    ) -> ShapeReport:
        chosen = {weight.name: weight for weight in weights}
        with torch.inference_mode(False), torch.no_grad():
            reshaped = reshape(
                [_source(weight) for weight in weights], self, lambda source, new: write(chosen[source.name], new)
            )
        report.add(reshaped, self.step, chosen.values())
        return report


def _source(weight: Weight) -> Source:
    transposed = any(use.transposed for use in weight.uses)
    return Source(weight.name, weight.tensor.numel(), lambda: weight.tensor, transposed)
