"""DeepShapePull: reshaping while a model trains, as a node on each weight's edge of its training graph."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, fx, nn

from ggpass.errors import FormatError, WeightError
from ggpass.ggd.density import GGD
from ggpass.ggd.fit import fit_moments
from ggpass.graph.edges import insert_on_weight_edges
from ggpass.graph.program import Program
from ggpass.graph.report import Change, Report, Skip
from ggpass.graph.weights import Weight, as_patterns
from ggpass.passes.deepshape.pull import PullState, pull_node, states_of
from ggpass.passes.deepshape.weights import reason_of_shape, reason_without_fit


@dataclass(frozen=True)
class DeepShapePull:
    """g → g + strength·∂/∂w ½·mean_i (w_(i) − F⁻¹((i − ½)/n))²: each weight's quantiles drawn toward a target.

    F is a generalized Gaussian of ν' = shape_ratio·ν, with ν the moment fit of each weight when its node is first
    inserted; it stays that target from then on, also where the model is traced again.

    1. One identity node for each trainable matrix that the graph uses, however many uses and names it has. The rest is
       reported with its reason: vectors, frozen weights, constant ones, a ν below 0.5.
    2. The gradient is a mean over the n weights of a tensor, as that of the loss term is: plain descent at rate η
       covers the share η·strength/n of the way at each step, so that a useful strength is of the order of n.
    3. The ranks are found anew at every `every`-th forward with gradients: a sort, 0.4 s for 10⁶ weights on one core
       and 4 s for 10⁷, so 0.4 µs·n/every a step. Between sorts a backward takes one pass more over the weight, and a
       copy of it in float32 or wider stays in memory.
    4. Strength and targets are tensors that the graph reads: `set_strength` takes effect at the next backward.

    With `ggpass.prepare(model, args, passes=[DeepShapePull(strength=…)])`, or called on a Program traced in training
    mode.

    Attributes:
        strength: s ≥ 0, in loss per squared unit of weight.
        mode: `compensated` keeps each weight's σ (the default, so that layer outputs keep their size); `paper` takes
            α' = scale_ratio·α.
        shape_ratio, scale_ratio: of the target to the fit.
        every: forwards from one sort to the next.
        only, skip: patterns on names, as in DeepShape.

    Raises:
        FormatError: a setting that is none of those.
        WeightError: NaN or infinity in a weight, or a pattern that matches none.
    """

    strength: float
    mode: Literal["paper", "compensated"] = "compensated"
    shape_ratio: float = 0.8
    scale_ratio: float = 0.6
    every: int = 50
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in ("paper", "compensated"):
            raise FormatError(f"mode is one of paper, compensated, not {self.mode!r}")
        _check_strength(self.strength)
        for name in ("shape_ratio", "scale_ratio"):
            if not 0 < getattr(self, name) < math.inf:
                raise FormatError(f"{name} is a positive number, not {getattr(self, name)!r}")
        if not (isinstance(self.every, int) and self.every >= 1):
            raise FormatError(f"every is a number of forwards, 1 or more, not {self.every!r}")
        for name in ("only", "skip"):
            object.__setattr__(self, name, as_patterns(getattr(self, name)))

    def __call__(self, program: Program) -> Report:
        report = Report("DeepShapePull")
        chosen = []
        for weight in program.weights(only=self.only, skip=self.skip, report=report):
            found = self._state_or_reason(weight)
            if isinstance(found, str):
                report.skips.append(Skip(weight.name, found))
            else:
                chosen.append(weight.name)
                what = f"pulled to ν {found.values[1]:.3g}, α {found.values[2]:.3g} from now on"
                report.changes.append(Change(weight.title, what))
        insert_on_weight_edges(program, chosen, self._make_node)
        return report

    def _state_or_reason(self, weight: Weight) -> PullState | str:
        """Return the weight's state, made if it has none yet; or the reason why it is not pulled."""
        tensor = weight.tensor
        if not tensor.requires_grad:
            return "is frozen (requires_grad is False)"
        states = states_of(tensor)
        if self not in states:
            target = self._target(weight.name, tensor.detach())
            if isinstance(target, str):
                return target
            states[self] = PullState.of(tensor, self.strength, target, self.every)
        return states[self]

    def _target(self, name: str, weight: Tensor) -> GGD | str:
        """Return the distribution to pull to, or the reason why there is none."""
        reason = reason_without_fit(name, weight, weight.numel())
        if reason:
            return reason
        fit = fit_moments(weight)
        shape = self.shape_ratio * fit.shape
        target = GGD(shape, self.scale_ratio * fit.scale) if self.mode == "paper" else GGD.of_std(shape, fit.std)
        return reason_of_shape(fit.shape) or target

    def _make_node(self, program: Program, source: fx.Node, weight: Weight) -> fx.Node:
        state = states_of(weight.tensor)[self]
        reads = []
        for what in ("anchor", "calls", "values"):
            name = program.free_name(f"ggpass_pull_{source.name}_{what}")
            program.set_weight(name, getattr(state, what), buffer=True)
            reads.append(program.get_attr(name))
        return program.graph.call_function(pull_node, (source, *reads))

    def set_strength(self, model: nn.Module, strength: float) -> None:
        """Let all nodes of this pass on the model's Parameters pull with another strength from now on; 0 is none.

        Raises:
            FormatError: no number of 0 or more.
            WeightError: the pass was never applied to a graph of this model.
        """
        _check_strength(strength)
        for state in self._states(model).values():
            state.values[0] = strength

    def state_dict(self, model: nn.Module) -> dict[str, dict[str, Tensor]]:
        """Targets, counts and anchors by the weights' names: what a resumed training needs to go on bit for bit."""
        return {
            name: {"anchor": state.anchor.clone(), "calls": state.calls.clone(), "values": state.values.clone()}
            for name, state in self._states(model).items()
        }

    def load_state_dict(self, model: nn.Module, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on where `state_dict` was taken; the pass must have been applied to a graph of the model.

        Raises:
            WeightError: the saved weights are not those that this pass pulls.
        """
        states = self._states(model)
        if states.keys() != saved.keys():
            other = sorted(states.keys() ^ saved.keys())
            raise WeightError(
                f"saved and pulled weights differ in {', '.join(other[:5])}; prepare as before, then load"
            )
        for name, state in states.items():
            for what in ("anchor", "calls", "values"):
                getattr(state, what).copy_(saved[name][what])

    def _states(self, model: nn.Module) -> dict[str, PullState]:
        found = {n: states_of(p)[self] for n, p in model.named_parameters() if self in states_of(p)}
        if not found:
            raise WeightError("this pass pulls no weight of the model; prepare(model, args, passes=[it]) first")
        return found


def _check_strength(strength: float) -> None:
    if not 0 <= strength < math.inf:
        raise FormatError(f"strength is a number of 0 or more, not {strength!r}")
