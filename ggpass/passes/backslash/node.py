"""The rate node: w → w forward, g → g + s·λ·∂R/∂w backward, with R the bits of w under its generalized Gaussian."""

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle, unserializable_hook
from torch.utils.weak import WeakIdKeyDictionary

#: What a weight's node reads, in this order.
FIELDS = ("log_factor", "shape", "epsilon", "loss_scale")


def node_values(
    log_factor: float = -math.inf, shape: float = 1.0, epsilon: float = 0.0, loss_scale: float = 1.0
) -> Tensor:
    """(ln τ, ν, ε, s) of one weight as one tensor, written in place from step to step: no graph is traced again.

    A forward copies it, and its backward computes with that copy.

    Args:
        log_factor: ln τ, the factor of sign(w)·(|w| + ε)^(ν−1); τ = λν/(α^ν ln 2) for λ in loss per bit. At −∞, as
            it is without arguments, the node adds nothing.
        shape: ν.
        epsilon: ε, in units of weight; it keeps the slope finite near 0 where ν < 1.
        loss_scale: s, by which the caller multiplies the loss: a gradient scaler's factor, 1/k for k micro-batches.

    Returns:
        (4,) float64.
    """
    return torch.tensor((log_factor, shape, epsilon, loss_scale), dtype=torch.float64)


class _RateNode(torch.autograd.Function):
    """A view forward, so that no weight is copied.

    Every backward that passes adds the slope. Gradients of gradients by the weights would pass twice and hold it twice,
    so they are refused; those by the inputs (gradient penalties) pass once, as they should.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        # What this forward takes with it: another one may write to the tensor before this one's backward.
        ctx.values = values.clone()
        return weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (weight,), gradient = ctx.saved_tensors, gradients[0]
        if gradient.is_sparse:  # rows that a batch did not read are left alone, as sparse optimizers leave them
            return gradient, None
        slope = _slope(weight, ctx.values)
        # One rounding of the sum, to the gradient's dtype.
        return (gradient.to(slope.dtype) + slope).to(gradient.dtype), None


def _slope(weight: Tensor, values: Tensor) -> Tensor:
    """s·τ·sign(w)·(|w| + ε)^(ν−1), in float32 or wider; 0 at w = 0. By exp and log, three times as fast as pow."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    log_factor, shape, epsilon, loss_scale = values.to(wide.device, wide.dtype).unbind()
    magnitude = torch.exp(log_factor + (shape - 1) * torch.log(wide.abs() + epsilon))
    return torch.where(wide == 0, 0.0, loss_scale * wide.sign() * magnitude)


def rate_node(weight: Tensor, values: Tensor) -> Tensor:
    """w → w, whose backward is g → g + s·τ·sign(w)·(|w| + ε)^(ν−1): what a graph calls between a weight and its uses.

    With τ = λν/(α^ν ln 2) this is the gradient of a term s·λ·ΣR in the loss, R as in `ggpass.ggd.smooth_bits`,
    without a change to the loss. Half dtypes are added in float32 and rounded once. A sparse gradient passes as it is.

    Args:
        weight: floating, any shape. Where it needs no gradient, nothing is computed.
        values: (ln τ, ν, ε, s) as `node_values` makes it, on any device.

    Returns:
        A view of the weight.
    """
    result: Tensor = _RateNode.apply(weight, values)
    return result


#: (ln τ, ν, ε, s) of one weight; a gradient scaler's s is a tensor, which may live on a device.
Row = tuple[float, float, float, float | Tensor]

#: What brings nodes up to date: returns the row of each weight that it feeds, in its own order.
Feeder = Callable[[], Sequence[Row]]


@dataclass
class NodeState:
    """What the nodes of one weight share, in whichever graphs they are.

    A backward that passes several nodes of one weight must add the slope once: graphs on both sides of a graph break,
    or a loss over two forwards. So the first forward takes the slope with it, and until a gradient has arrived at the
    weight the nodes of further forwards are idle. A forward with gradients on whose backward never comes thus costs
    the next backward its slope: evaluate under `torch.no_grad()`.

    Attributes:
        values: (4,), on the weight's device.
        taken: whether a forward has taken the slope, and its backward has not come yet.
        carried: whether a backward brought the slope since the last optimizer step, which then must not add it.
        feed: asked for the values ahead of a training forward, and which of its weights this one is.
        watch: the hook on the weight.
    """

    values: Tensor
    taken: bool = False
    carried: bool = False
    feed: "tuple[weakref.WeakMethod[Feeder], int] | None" = None
    watch: RemovableHandle | None = None

    def row(self, rows: dict[Feeder, Sequence[Row]]) -> Row | None:
        """What its feeder says, each feeder asked once; None without one."""
        feeder = self.feed[0]() if self.feed is not None else None
        if feeder is None or self.feed is None:
            return None
        if feeder not in rows:
            rows[feeder] = feeder()
        return rows[feeder][self.feed[1]]

    def take(self, weight: Tensor, row: Row) -> None:
        """Write the row for the forward that comes, or idle values where another forward has the slope."""
        if self.taken:
            self.values[:1].fill_(-math.inf)
            return
        *numbers, scale = row
        if isinstance(scale, Tensor):  # nothing waits for the device where it lives
            self.values[:3].copy_(torch.tensor(numbers, dtype=self.values.dtype))
            self.values[3:].copy_(scale.reshape(1))
        else:
            self.values.copy_(torch.tensor((*numbers, scale), dtype=self.values.dtype))
        if weight.is_leaf and weight.requires_grad:
            self.taken = True
            if self.watch is None:
                self.watch = weight.register_hook(unserializable_hook(functools.partial(NodeState._arrived, self)))

    def _arrived(self, gradient: Tensor) -> None:
        """The gradient of one backward, summed over all uses, is at the weight."""
        self.carried = self.carried or (self.taken and not gradient.is_sparse)
        self.taken = False

    def stop(self) -> None:
        """Idle from now on."""
        self.feed, self.taken, self.carried = None, False, False
        self.values.copy_(node_values())
        if self.watch is not None:
            self.watch.remove()
            self.watch = None


#: Parameter -> NodeState, while the Parameter lives. Compiled graphs are shared by modules: only the tensors of a call
#: tell whose state it is.
_STATES: WeakIdKeyDictionary = WeakIdKeyDictionary()


def node_state(weight: Tensor) -> NodeState:
    """The state of a weight's nodes, made where there is none, on the device where the weight is now."""
    state: NodeState | None = _STATES.get(weight)
    if state is None:
        state = _STATES[weight] = NodeState(node_values().to(weight.device))
    elif state.values.device != weight.device:
        state.values = state.values.to(weight.device)
    return state


def feed(weights: Sequence[Tensor], feeder: Feeder) -> None:
    """Let a bound method feed the nodes of these weights, now or later in a graph; it is held weakly.

    The last one called is the one that feeds.
    """
    for index, weight in enumerate(weights):
        node_state(weight).feed = (weakref.WeakMethod(feeder), index)


def stop_feeding(weights: Sequence[Tensor], feeder: Feeder) -> None:
    """Let the nodes that this method feeds add nothing from now on."""
    for weight in weights:
        state: NodeState | None = _STATES.get(weight)
        if state is not None and state.feed is not None and state.feed[0]() == feeder:
            state.stop()


@torch.no_grad()
def ready_nodes(weights: Sequence[Tensor], alone: Callable[[], Sequence[Row]] | None = None) -> list[Tensor]:
    """Bring the nodes of these weights up to date, ahead of a training forward through them.

    Args:
        weights: those whose nodes are in the graph.
        alone: gives the rows where nothing feeds any of the weights; None: they are idle then.

    Returns:
        The values of each, which the next call writes again.
    """
    states = [node_state(weight) for weight in weights]
    asked: dict[Feeder, Sequence[Row]] = {}
    rows: Sequence[Row | None] = [state.row(asked) for state in states]
    if not asked and alone is not None:
        rows = alone()
    for weight, state, row in zip(weights, states, rows):
        if row is not None:
            state.take(weight, row)
    return [state.values for state in states]


def take_carried(weight: Tensor) -> bool:
    """Whether a node carried the weight's slope into its gradient; asked once a step."""
    state: NodeState | None = _STATES.get(weight)
    if state is None or not state.carried:
        return False
    state.carried = False
    return True
