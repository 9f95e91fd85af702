"""Regularizer: the rate term beside an optimizer: when it acts, on which weights, and what of it is kept."""

import logging
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ggpass.errors import InputError
from ggpass.ggd.grid import Histogram
from ggpass.passes.backslash.attached import (
    after_closure,
    check_parameters,
    check_still_there,
    enter,
    gradient_scale,
    learning_rates,
    leave,
    skipped,
)
from ggpass.passes.backslash.on_grid import ExactWeights
from ggpass.passes.backslash.priors import Priors
from ggpass.passes.backslash.rate import Rate
from ggpass.passes.backslash.selection import bits_of_megabytes, select
from ggpass.passes.backslash.settings import RateSettings
from ggpass.passes.backslash.sharded import local_part
from ggpass.passes.backslash.state import check_state, plain_name, tensors_of
from ggpass.passes.backslash.statistics import histogram

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
        optimizers: those that it is attached to.
        automatic: whether it was attached without the caller's word, and gives way to one that he attaches.
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
        self.names, self.weights, self.report = selection.names, selection.weights, selection.report
        self.automatic = False
        self.count = sum(weight.numel() for weight in self.weights)
        target = settings.target_bits
        if settings.target_megabytes is not None:
            target = bits_of_megabytes(model, selection, settings.target_megabytes)
        self._rate = Rate(self.names, self.weights, settings, target)
        self._zeros: list[tuple[nn.Parameter, Tensor]] = []
        self._exact = ExactWeights()
        self.optimizers: tuple[Optimizer, ...] = ()
        self._handles: list[RemovableHandle] = []

    # The optimizer.

    def attach(self, *optimizers: Optimizer) -> "Regularizer":
        """Act at every `step()` of these optimizers; each weight takes the learning rate of its own param group.

        Several optimizers (one for embeddings, say) are stepped in the order given; the first one's steps are counted.

        Returns:
            Itself; as a context manager it detaches at the end.

        Raises:
            InputError: no optimizer, already attached, none of the regularized weights is theirs, they are no longer
                the model's.
        """
        if not optimizers or not all(isinstance(optimizer, Optimizer) for optimizer in optimizers):
            raise InputError("attach takes torch optimizers: attach(optimizer)")
        if self._handles:
            raise InputError("this Regularizer is attached already; call detach() first")
        check_parameters(self._model(), self.weights)
        stepped = learning_rates(optimizers, self.weights)
        if not stepped:
            raise InputError(
                "the optimizer holds none of the regularized weights; give the one that trains this model, made after "
                "fully_shard if the model is sharded"
            )
        self.optimizers = optimizers
        for message in enter(self, self.names, self.weights, stepped):
            self._warn(message)
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))
        return self

    def _warn(self, message: str) -> None:
        """Report and log a message, if there is one."""
        if message:
            self.report.notes.append(message)
            log.warning(message)

    def detach(self, *, finished: bool = True) -> None:
        """Remove the hooks; the state stays.

        Args:
            finished: False if the training broke off and may be resumed: a missed target is not reported then.
        """
        total = self.settings.total_steps
        if finished and self._handles and self.steps and (total is None or self.steps < total):
            self._warn(self._rate.missed())
        if self._handles and self.settings.schedule.on_grid and not self._exact and 0 < self.steps < (total or 0):
            self._warn(
                f"detached after {self.steps} of total_steps={total}, ahead of the span on_grid: the weights are not "
                "on the grid; give the real number of optimizer steps"
            )
        for handle in self._handles:
            handle.remove()
        self._handles, self.optimizers = [], ()
        leave(self, self.weights)

    def __enter__(self) -> "Regularizer":
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self.detach(finished=kind is None)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return a hook ahead of `step`; what it returns are the arguments in place of those given."""
        if skipped(optimizer):
            return None
        waits = None
        if self._exact or (self.coupled and not self._rate.in_tail):  # both need the gradients
            waits = after_closure(args, kwargs, lambda: self.before_step(optimizer))
        if waits is None:
            self.before_step(optimizer)
        return waits

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not skipped(optimizer):
            self.step(optimizer)

    # One step.

    @property
    def coupled(self) -> bool:
        """Return True if the slope joins the gradient, ahead of the optimizer's step."""
        return "coupled" in self.settings.mode

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Act ahead of an optimizer's step: the coupled modes' gradient, a note of the zeros; `attach` calls it.

        Args:
            optimizer: that is about to step, its gradients being there.
        """
        rates = learning_rates((optimizer,), self.weights)
        if self.steps % self.settings.interval == 0:
            check_still_there(self._model(), self.names, self.weights)
        if self.steps == self.settings.total_steps and self._is_clock(optimizer):
            self._warn(
                f"all total_steps={self.steps} are done and the optimizer goes on: the rate acts no more, zeros stay; "
                "give the real number of optimizer steps"
            )
        self._exact.restore_(self._on_grids(rates))
        if self._is_clock(optimizer) and not self._exact:
            self._rate.follow()
        if self._rate.in_tail:
            self._zeros = [(weight, local_part(weight.detach()) == 0) for _, weight in self._rate.held_by(rates)]
        elif self.coupled:
            self._refit(optimizer)
            self._rate.join_gradients(rates, gradient_scale(optimizer))

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> None:
        """Act behind an optimizer's step; `attach` calls it. Without `attach`, call `before_step` and this.

        Args:
            optimizer: that has stepped; weights take its learning rates.
        """
        rates = learning_rates((optimizer,), self.weights)
        if self._rate.in_tail:
            for weight, zero in self._zeros:
                local_part(weight).masked_fill_(zero, 0.0)
            self._zeros = []
        elif not self.coupled:
            self._refit(optimizer)
            self._rate.step_weights(rates)
        if self.settings.schedule.on_grid_after(self.steps, self.settings.total_steps):
            self._exact.round_(self._on_grids(rates))
        if self._is_clock(optimizer):
            self._warn(self._rate.end_step())

    def _is_clock(self, optimizer: Optimizer) -> bool:
        """Return True if this optimizer's steps are the ones that are counted."""
        return not self.optimizers or optimizer is self.optimizers[0]

    def _on_grids(self, rates: dict[int, float]) -> list[tuple[str, nn.Parameter, float]]:
        return [(self.names[i], weight, self._rate.grids.steps[i]) for i, weight in self._rate.held_by(rates)]

    def _refit(self, optimizer: Optimizer) -> None:
        """Fit all weights and move λ if that is due; `optimizer` is the one that steps."""
        if self._is_clock(optimizer):
            self._warn(self._rate.refit(learning_rates(self.optimizers or (optimizer,), self.weights)))

    # For the user.

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return self._rate.steps

    @property
    def priors(self) -> Priors:
        """ν and α of each weight, as of the last fit."""
        return self._rate.priors

    @property
    def grid_steps(self) -> dict[str, float]:
        """Δ of each weight's grid, by name: the settings' step for all, unless `spread` is above 0."""
        return dict(zip(self.names, self._rate.grids.steps))

    @property
    def target(self) -> float | None:
        """Return bits a weight that λ is controlled to reach; None if λ is given."""
        return None if self._rate.controller is None else self._rate.controller.target

    @property
    def strength(self) -> float:
        """λ in force, before the schedule's factor."""
        return self._rate.strength

    def histogram(self) -> Histogram:
        """Return the symbols of all regularized weights on their grids, counted now.

        Raises:
            WeightError: NaN or infinity in a weight.
        """
        return histogram(self.weights, self._rate.grids.steps)

    def bits(self) -> float:
        """Zero-order entropy now, exactly: bits a weight over all regularized weights on their grids."""
        return self.histogram().bits

    def status(self) -> str:
        """Return one line for a progress bar: `1.53 bits/weight, λ 0.0012, 43 % zeros`.

        As of the last measurement: after every `refit_every`-th step, and the last. Once the rate has ended the λ is
        the one used last, and a target that was missed is shown beside it.
        """
        return self._rate.status()

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return all that a continuation bit for bit needs beside the weights: plain numbers and tensors.

        On the grid, the exact weights too.
        """
        state = {"tensors": tensors_of(self.names, self.weights)} | self._rate.state_dict()
        if self._exact:
            state["exact_weights"] = {plain_name(n): t for n, t in self._exact.tensors.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; the weights and the optimizer load their own.

        The settings stay as they are: a λ given as `strength` is the settings', not the state's.

        Raises:
            InputError: the state is of another model or of other settings; it names the weight that differs.
        """
        check_state(state, self.names, self.weights, self.settings)
        self._rate.load_state_dict(state)
        names = {plain_name(name): name for name in self.names}
        exact = {names.get(name, name): tensor for name, tensor in state.get("exact_weights", {}).items()}
        self._exact.load(exact, dict(zip(self.names, self.weights)))
