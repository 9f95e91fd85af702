"""DeepShape: the pass that remaps trained weights onto a generalized Gaussian of lower shape: fewer bits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ggpass.errors import WeightError
from ggpass.graph.report import Change, Report, Skip
from ggpass.graph.program import Program
from ggpass.passes.deepshape.figures import Reshaped, in_words, summary
from ggpass.passes.deepshape.specification import Shaping
from ggpass.passes.deepshape.weights import Source, reshape
from ggpass.graph.weights import bytes_of, check_patterns, matches

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class ShapeReport(Report):
    """A Report that also holds the figures of each reshaped weight.

    Attributes:
        reshaped: ν, σ, bits and squared change of each weight, and of all together.
    """

    reshaped: Reshaped | None = field(default=None, repr=False)


@dataclass(frozen=True)
class _Candidate:
    """A tensor of a model with all its names; `transposed` as in Source."""

    names: tuple[str, ...]
    tensor: Tensor
    transposed: bool = False


@dataclass(frozen=True)
class DeepShape(Shaping):
    """w' = Δ·round(Q(p(w); 0.8ν, 0.6α) / Δ), p(w) the rank of w among all weights and ν, α their fit.

    DeepShape of arXiv 2506.00486 (v1 to v3): all weights quantized at Δ = 2^-13, a generalized Gaussian fitted, ν and α
    lowered, and the weights' ranks mapped onto the target's histogram. What its text leaves open is decided so:

    1. Histogram specification is by rank, in the order of the values: equal weights go to one value, the different
       weights that share a cell are spread over the target's cells, the map is monotone, and it is odd where the
       histogram is symmetric (`shaping.specification.specify` has the formula). The target's histogram is exact, the
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
    6. In a Program the weights are replaced by frozen ones and the model it was traced from stays as it is. `on_module`
       writes into a module's own Parameters instead, so that an optimizer that holds them goes on with them.

    Attributes:
        mode, granularity, shape_ratio, scale_ratio, step, rare: as in `shaping.specification.Shaping`.
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
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))

    def __call__(self, program: Program) -> ShapeReport:
        weights = {w.names: w for w in program.tensors() if isinstance(w.tensor, nn.Parameter)}
        candidates = [_Candidate(w.names, w.tensor, any(use.transposed for use in w.uses)) for w in weights.values()]

        def write(candidate: _Candidate, new: Tensor) -> None:
            program.replace(weights[candidate.names], new)

        return self._run(candidates, write)

    def on_module(self, model: nn.Module) -> ShapeReport:
        """The same on a module, in place: its Parameters keep their identity and their requires_grad.

        Args:
            model: any module that holds float Parameters.

        Raises:
            WeightError: as above; the model is as it was then.
        """
        names: dict[int, list[str]] = {}
        tensors: dict[int, tuple[Tensor, bool]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            for leaf, tensor in module._parameters.items():
                if tensor is not None:
                    names.setdefault(id(tensor), []).append(f"{path}.{leaf}" if path else leaf)
                    # Hugging Face's Conv1D computes x·W: its output channels are the second dimension.
                    tensors.setdefault(id(tensor), (tensor, type(module).__name__ == "Conv1D" and tensor.dim() == 2))
        candidates = [_Candidate(tuple(names[key]), *tensors[key]) for key in names]

        def write(candidate: _Candidate, new: Tensor) -> None:
            with torch.no_grad():
                candidate.tensor.copy_(new)

        return self._run(candidates, write)

    def _run(self, candidates: Sequence[_Candidate], write: Callable[[_Candidate, Tensor], None]) -> ShapeReport:
        report = ShapeReport("DeepShape")
        names = [name for c in candidates if c.tensor.dim() >= 2 for name in c.names]
        check_patterns(names, only=self.only, skip=self.skip)
        chosen: dict[str, _Candidate] = {}
        for candidate in candidates:
            reason = self._reason_to_keep(candidate)
            if reason:
                matrix = candidate.tensor.dim() >= 2
                report.skips.append(Skip(candidate.names[0], reason, bytes_of(candidate.tensor), matrix=matrix))
            else:
                chosen[candidate.names[0]] = candidate
        with torch.inference_mode(False), torch.no_grad():
            sources = [_source(candidate) for candidate in chosen.values()]
            reshaped = reshape(sources, self, lambda source, new: write(chosen[source.name], new))
        report.skips += [Skip(name, reason, bytes_of(chosen[name].tensor)) for name, reason in reshaped.skipped]
        for shaped in reshaped.shaped:
            report.changes.append(Change(" = ".join(chosen[shaped.name].names), in_words(shaped)))
        report.notes.append(summary(reshaped, self.step))
        report.reshaped = reshaped
        return report

    def _reason_to_keep(self, candidate: _Candidate) -> str:
        """Why a tensor is not for this pass, by its kind or its name; empty where it is."""
        names, weight = candidate.names, candidate.tensor
        if weight.dim() < 2:
            return f"{weight.dim()}-D (bias, norm): stays as it is"
        if weight.device.type == "meta":
            raise WeightError(f"weight {names[0]!r} is on the meta device and has no values; load the model first")
        if weight.dtype not in FLOATS:
            return f"is {str(weight.dtype).removeprefix('torch.')}, not a float weight"
        return reason_by_name(names, self.only, self.skip)


def reason_by_name(names: Sequence[str], only: Sequence[str], skip: Sequence[str]) -> str:
    """Why patterns leave a weight out; empty where they do not."""
    for pattern in skip:
        if any(matches(name, pattern) for name in names):
            return f"matches skip={pattern!r}"
    if only and not any(matches(name, pattern) for name in names for pattern in only):
        return "matches none of only=" + ", ".join(map(repr, only))
    return ""


def _source(candidate: _Candidate) -> Source:
    return Source(candidate.names[0], candidate.tensor.numel(), lambda: candidate.tensor, candidate.transposed)
