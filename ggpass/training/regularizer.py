"""Regularizer: the rate term beside an optimizer: fits, steps, measures its bits, and holds its state."""

import logging
import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ggpass.errors import InputError
from ggpass.pipeline import Report
from ggpass.training.controller import Controller, solve
from ggpass.training.fits import Fits
from ggpass.training.forecast import forecast
from ggpass.training.grid import GridHistogram, histogram
from ggpass.training.node import feed, stop_feeding, take_carried
from ggpass.training.on_grid import ExactWeights
from ggpass.training.optimizers import after_closure, gradient_scale, has_closure, learning_rates, skipped
from ggpass.training.proximal import Slope, add_slope_, shrink_
from ggpass.training.selection import bits_of_megabytes, select
from ggpass.training.settings import RateSettings
from ggpass.training.sharded import local_part

log = logging.getLogger(__name__)


class Regularizer:
    """Trains a model's matrices toward few bits, beside any torch optimizer.

    `attach(optimizer)` hooks it into `optimizer.step()`, so that a training loop stays as it is: gradient accumulation
    counts as one step, and a step that AMP skipped as none. Weights whose `.grad` is None are left alone in that step,
    as weight decay leaves them.

    Attributes:
        settings: as given.
        names: of the regularized weights, tied ones once.
        weights: these Parameters.
        report: which Parameters were left alone, and why.
        steps: optimizer steps so far.
        strength: λ in force, before the schedule's factor.
    """

    def __init__(self, model: nn.Module, settings: RateSettings) -> None:
        """Select the weights; nothing is changed before `attach` or `step`.

        Raises:
            WeightError: nothing to regularize, or a pattern that matches nothing.
            InputError: a size in megabytes that the other tensors alone exceed.
        """
        selection = select(model, settings)
        self.settings = settings
        self._model = weakref.ref(model)
        self.names = selection.names
        self.weights = selection.weights
        self.report: Report = selection.report
        self.steps = 0
        self.count = sum(weight.numel() for weight in self.weights)
        self.fits = Fits(len(self.weights))
        self._measured = (math.nan, math.nan)
        self._fitted_at = -1
        self._scaler: GradScaler | None = None
        self._micro_batches = 1
        self._controller: Controller | None = None
        if settings.has_target:
            target = settings.target_bits or bits_of_megabytes(model, selection, settings.target_megabytes or 0.0)
            self._controller = Controller(target, settings.schedule.steps(settings.schedule.ramp, settings.total_steps))
        self._strength = settings.strength or 0.0
        self._zeros: list[tuple[nn.Parameter, Tensor]] = []
        self._exact = ExactWeights()
        self._optimizers: tuple[Optimizer, ...] = ()
        self._handles: list[RemovableHandle] = []

    # The optimizer.

    def attach(self, *optimizers: Optimizer) -> "Regularizer":
        """Act at every `step()` of these optimizers; each weight takes the learning rate of its own param group.

        Several optimizers (one for embeddings, say) are stepped in the order given; the first one's steps are counted.

        Returns:
            Itself; as a context manager it detaches at the end.

        Raises:
            InputError: no optimizer, already attached, none of the regularized weights is theirs, or they are no
                longer the model's.
        """
        if not optimizers or not all(isinstance(optimizer, Optimizer) for optimizer in optimizers):
            raise InputError("attach takes torch optimizers: attach(optimizer)")
        if self._handles:
            raise InputError("this Regularizer is attached already; call detach() first")
        model = self._model()
        if model is not None and not {id(w) for w in self.weights} <= {id(p) for p in model.parameters()}:
            raise InputError(
                "the model's Parameters were replaced since this Regularizer was made, as sharding does; make it and "
                "the optimizer after fully_shard"
            )
        stepped = learning_rates(optimizers, self.weights)
        if not stepped:
            raise InputError(
                "the optimizer holds none of the regularized weights; give the one that trains this model, made after "
                "fully_shard if the model is sharded"
            )
        self._tell_what_is_off(optimizers, stepped)
        self._optimizers = optimizers
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))
        if self.coupled:
            feed(self.weights, self.before_forward)
        return self

    def _tell_what_is_off(self, optimizers: tuple[Optimizer, ...], stepped: dict[int, float]) -> None:
        """Warn of weights that no optimizer steps, and of those that another Regularizer steps too."""
        idle = [name for name, weight in zip(self.names, self.weights) if id(weight) not in stepped]
        if idle:
            self._warn(
                f"{len(idle)} of {len(self.names)} weights are in none of the optimizers ({_some(idle)}): they count "
                "in the bits, and the others make up for them; freeze them first, or skip= them"
            )
        hooks = [hook for optimizer in optimizers for hook in optimizer._optimizer_step_post_hooks.values()]
        others = [other for hook in hooks if isinstance(other := getattr(hook, "__self__", None), Regularizer)]
        held = {id(weight) for other in others for weight in other.weights}
        twice = [name for name, weight in zip(self.names, self.weights) if id(weight) in held]
        if twice:
            self._warn(
                f"{_some(twice)}: another Regularizer is attached to this optimizer, and the rate of both acts; "
                "detach() it, or skip= these weights in one"
            )

    def _warn(self, message: str) -> None:
        self.report.notes.append(message)
        log.warning(message)

    def detach(self) -> None:
        """Remove the hooks; the state stays."""
        total = self.settings.total_steps
        if self._handles and self.settings.schedule.on_grid and not self._exact and 0 < self.steps < (total or 0):
            self._warn(
                f"detached after {self.steps} of total_steps={total}, ahead of the span on_grid: the weights are not "
                "on the grid; give the real number of optimizer steps"
            )
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizers = [], ()
        stop_feeding(self.weights, self.before_forward)

    def __enter__(self) -> "Regularizer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A hook ahead of `step`; what it returns are the arguments in place of those given."""
        if skipped(optimizer):
            return None
        in_tail = self.settings.schedule.in_tail(self.steps, self.settings.total_steps)
        inside = (self.coupled and not in_tail) or self._exact  # what has to wait for the closure's gradients
        if inside and has_closure(args, kwargs):
            return after_closure(args, kwargs, lambda: self.before_step(optimizer))
        self.before_step(optimizer)
        return None

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not skipped(optimizer):
            self.step(optimizer)

    # One step.

    @property
    def coupled(self) -> bool:
        """Whether the slope joins the gradient: in a node of a training graph where there is one, else in a step."""
        return "coupled" in self.settings.mode

    @torch.no_grad()
    def before_forward(self) -> list[tuple[float, float, float, float | Tensor]]:
        """(ln τ, ν, ε, s) of each weight, for the nodes that this step's backward runs through; they ask for it."""
        if self._due() and not self.settings.schedule.in_tail(self.steps, self.settings.total_steps):
            self._refit(learning_rates(self._optimizers, self.weights))
        scale: float | Tensor = 1 / self._micro_batches
        if self._scaler is not None:
            # The scaler itself multiplies, on the device, so that nothing waits for it.
            scale = self._scaler.scale(torch.tensor(scale, device=self.weights[0].device))
        epsilon = self.settings.slope_epsilon
        return [(self._log_factor(i), self.fits.shapes[i], epsilon, scale) for i in range(len(self.weights))]

    def scale_nodes(self, scaler: GradScaler | None = None, micro_batches: int = 1) -> "Regularizer":
        """Tell the nodes of training graphs by what the caller multiplies the loss, which they cannot see.

        A step that adds the slope itself, without a graph, needs no telling.

        Args:
            scaler: the gradient scaler, whose scale is read ahead of each forward.
            micro_batches: k of gradient accumulation: the slope is added in k backwards, 1/k of it in each, as the
                loss of each micro-batch is divided by k.

        Returns:
            Itself.

        Raises:
            InputError: fewer than one micro-batch.
        """
        if micro_batches < 1:
            raise InputError(f"micro_batches is a count of backwards in a step, at least 1, not {micro_batches!r}")
        self._scaler, self._micro_batches = scaler, micro_batches
        return self

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """What belongs before an optimizer's step: the coupled modes' gradient, a note of the zeros; `attach` calls it.

        Args:
            optimizer: that is about to step, its gradients being there.
        """
        rates = learning_rates((optimizer,), self.weights)
        if self.steps == self.settings.total_steps and self._is_clock(optimizer):
            self._warn(
                f"all total_steps={self.steps} are done and the optimizer goes on: the rate acts no more, zeros stay; "
                "give the real number of optimizer steps"
            )
        self._exact.restore_(((self.names[i], weight) for i, weight in self._of(rates)), self.settings.step)
        if self.settings.schedule.in_tail(self.steps, self.settings.total_steps):
            self._zeros = [(weight, local_part(weight.detach()) == 0) for _, weight in self._of(rates)]
        elif self.coupled:
            if self._is_clock(optimizer) and self._due():
                self._refit(rates)
            self._join_gradients(rates, math.log(gradient_scale(optimizer)))

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> None:
        """What belongs after an optimizer's step; `attach` calls it. Without `attach`, call `before_step` and this.

        Args:
            optimizer: that has stepped; weights take its learning rates.
        """
        rates = learning_rates((optimizer,), self.weights)
        if self.settings.schedule.in_tail(self.steps, self.settings.total_steps):
            for weight, zero in self._zeros:
                local_part(weight).masked_fill_(zero, 0.0)
            self._zeros = []
        elif not self.coupled:
            if self._is_clock(optimizer) and self._due():
                self._refit(rates)
            self._step_weights(rates)
        if self.settings.schedule.on_grid_after(self.steps, self.settings.total_steps):
            self._exact.round_(((self.names[i], weight) for i, weight in self._of(rates)), self.settings.step)
        self.steps += self._is_clock(optimizer)

    def _is_clock(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer's steps are the ones that are counted."""
        return not self._optimizers or optimizer is self._optimizers[0]

    def _of(self, rates: dict[int, float]) -> list[tuple[int, nn.Parameter]]:
        return [(index, weight) for index, weight in enumerate(self.weights) if id(weight) in rates]

    def _due(self) -> bool:
        if self.steps == self._fitted_at:
            return False
        return self.steps % self.settings.interval == 0 or self.settings.mode == "paper-coupled"

    def _log_factor(self, index: int, rate: float = 1.0) -> float:
        """ln of what multiplies (|θ|+ε)^(ν−1): lr·λ·m·ν/(α^ν ln 2); −∞ where there is nothing to do."""
        schedule, total = self.settings.schedule, self.settings.total_steps
        strength = rate * self.strength * schedule.factor(self.steps, total)
        return self.fits.log_slope(index) + _log(strength)

    def _slope(self, index: int, log_factor: float) -> Slope:
        return Slope(log_factor, self.fits.shapes[index], self.settings.slope_epsilon)

    def _join_gradients(self, rates: dict[int, float], log_scale: float) -> None:
        """The coupled modes: g ← g + e^log_scale·λ·m·ρ'(|θ|)·sign(θ), where no node of a graph has carried it."""
        chosen = [(i, w, w.grad) for i, w in self._of(rates) if w.grad is not None and not take_carried(w)]
        for index, _, gradient in chosen:
            if gradient.is_sparse:
                raise InputError(
                    f"{self.names[index]} has a sparse gradient, which mode={self.settings.mode!r} would fill up; skip "
                    "it, train it with sparse=False, or use mode='proximal'"
                )
        slopes = [self._slope(index, self._log_factor(index) + log_scale) for index, _, _ in chosen]
        add_slope_([local_part(g) for _, _, g in chosen], [local_part(w) for _, w, _ in chosen], slopes)

    def _step_weights(self, rates: dict[int, float]) -> None:
        """The modes that step the weights themselves, after the optimizer."""
        chosen = [(i, w) for i, w in self._of(rates) if w.grad is not None]
        weights = [local_part(weight) for _, weight in chosen]
        seed = self.steps * 2_654_435_761  # far from that of any other step, modulo 2^32
        if self.settings.is_paper:
            add_slope_(weights, weights, [self._slope(i, self._log_factor(i)) for i, _ in chosen], sign=-1, seed=seed)
            return
        epsilon = self.settings.slope_epsilon
        factors = [min(self._log_factor(i, rates[id(w)]), self.fits.log_largest_factor(i, epsilon)) for i, w in chosen]
        shrink_(weights, [self._slope(i, factor) for (i, _), factor in zip(chosen, factors)], seed)

    # Fits and bits.

    def _refit(self, rates: dict[int, float]) -> None:
        """Fit ν and α, measure the bits, move λ."""
        self._fitted_at = self.steps
        for index in self.fits.update(self.weights, self.settings):
            log.warning("%s holds NaN or infinity: its rate is left as it was", self.names[index])
        if self.steps % self.settings.interval:
            return
        counted = histogram(self._usable(), self.settings.step)
        self._measured = (counted.bits, counted.zeros)
        if self._controller is not None:
            every = learning_rates(self._optimizers, self.weights) if self._optimizers else rates
            self._strength = self._lead(self._controller, counted.bits, every)
            if self._controller.needs_no_rate(self.steps, counted.bits, self._strength):
                self._warn(self._controller.surplus(counted.bits))

    def _lead(self, controller: Controller, bits: float, rates: dict[int, float]) -> float:
        """The λ that is forecast to take the bits where the plan wants them at the next measurement."""
        interval, total = self.settings.interval, self.settings.total_steps
        if total is not None:
            interval = min(interval, max(1, total - self.steps))
        mean_rate = sum(rates.values()) / max(1, len(rates))
        drop = controller.needed_drop(self.steps, self.steps + interval, bits, mean_rate)
        factor = interval * self.settings.schedule.factor(self.steps, total)
        chosen = [(i, w) for i, w in self._of(rates) if i not in self.fits.broken and w.grad is not None]
        slopes = [self._slope(i, self.fits.log_slope(i) + _log(factor * rates[id(w)])) for i, w in chosen]
        expected = forecast([weight for _, weight in chosen], slopes, self.settings.step)
        strength = solve(expected.log_drop, drop, expected.largest)
        controller.expect(bits, expected.log_drop(strength))
        return strength

    def _usable(self) -> list[Tensor]:
        return [weight for index, weight in enumerate(self.weights) if index not in self.fits.broken]

    @property
    def strength(self) -> float:
        """λ in force, before the schedule's factor."""
        return self._strength

    def histogram(self) -> GridHistogram:
        """The symbols of all regularized weights on the settings' grid, counted now.

        Raises:
            WeightError: NaN or infinity in a weight.
        """
        return histogram(self.weights, self.settings.step)

    def bits(self) -> float:
        """Zero-order entropy now, exactly: bits a weight over all regularized weights on the settings' grid."""
        return self.histogram().bits

    def status(self) -> str:
        """One line for a progress bar, as of the last measurement: `1.53 bits/weight, λ 0.0012, 43 % zeros`."""
        bits, zeros = self._measured
        if math.isnan(bits):
            return "not measured yet"
        return f"{bits:.2f} bits/weight, λ {self.strength:.2g}, {100 * zeros:.0f} % zeros"

    # State.

    def state_dict(self) -> dict[str, Any]:
        """All that a continuation bit for bit needs beside the weights: plain numbers and tensors.

        On the grid, the exact weights too.
        """
        state: dict[str, Any] = {
            "steps": self.steps,
            "weights": self.count,
            "strength": self._strength,
            "measured_bits": self._measured[0],
            "measured_zeros": self._measured[1],
            "fits": self.fits.as_tensor(),
        }
        if self._controller is not None:
            state["controller"] = self._controller.state_dict()
        if self._exact:
            state["exact_weights"] = dict(self._exact.tensors)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; the weights and the optimizer load their own.

        The settings stay as they are: a λ given as `strength` is the settings', not the state's.

        Raises:
            InputError: the state is of another model or of other settings.
        """
        found, wanted = (len(state["fits"]), state["weights"]), (len(self.weights), self.count)
        if found != wanted or ("controller" in state) != (self._controller is not None):
            raise InputError(
                f"this state is of {found[1]} weights in {found[0]} tensors, the model has {wanted[1]} in {wanted[0]}; "
                "load the state that was saved with the same model and settings"
            )
        self.steps = int(state["steps"])
        if self.settings.has_target:
            self._strength = float(state["strength"])
        self._measured = (float(state["measured_bits"]), float(state["measured_zeros"]))
        self.fits.load_tensor(state["fits"])
        self._fitted_at = -1
        if self._controller is not None:
            self._controller.load_state_dict(state["controller"])
        self._exact.load(state.get("exact_weights", {}), dict(zip(self.names, self.weights)))


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
