"""w → w forward, g → g + s·∂R/∂w backward, R = ½·mean_i (w_(i) − F⁻¹((i − ½)/n))²: the quantile pull.

w_(1) ≤ … ≤ w_(n) are the sorted weights and F the target's distribution: 2R is the squared 2-Wasserstein distance of
the weights to the target's n quantiles. The permutation that sorts them is constant almost everywhere, so that
∂R/∂w_j = (w_j − a_j) / n with the anchor a_j = F⁻¹((r_j − ½)/n), r_j the rank of w_j.

The anchors take a sort, n log n, and are kept for `every` calls in a tensor as large as the weight; between two sorts a
step costs one pass over both. Equal weights have neighbouring ranks in the order of their places.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils.weak import WeakIdKeyDictionary

from ggpass.ggd.density import GGD

#: Above so many weights their quantiles are interpolated between these numbers of exact ones.
EXACT_QUANTILES = 1 << 14
KNOTS = 1 << 12


@dataclass
class PullState:
    """What the nodes of one weight share, in whichever graphs they are; written in place, never traced again.

    Attributes:
        anchor: a, like the weight, in float32 or wider.
        calls: () int64 on the CPU, how many forwards with gradients there were.
        values: (4,) float64 on the CPU: strength s, ν and α of the target, and the calls from one sort to the next.
    """

    anchor: Tensor
    calls: Tensor
    values: Tensor

    @classmethod
    def of(cls, weight: Tensor, strength: float, target: GGD, every: int) -> "PullState":
        """Return a state whose first forward sorts."""
        with torch.inference_mode(False):
            anchor = torch.zeros_like(weight.detach(), dtype=torch.promote_types(weight.dtype, torch.float32))
            values = torch.tensor((strength, target.shape, target.scale, every), dtype=torch.float64)
            return cls(anchor, torch.zeros((), dtype=torch.int64), values)


def target_quantiles(target: GGD, n: int) -> Tensor:
    """F⁻¹((i − ½)/n) for i = 1 … n, (n,) float64.

    Exact up to EXACT_QUANTILES. Above, x(p) is interpolated linearly between KNOTS values of x, spaced as squares so
    that they are dense at the peak, whose probabilities are exact: within 1e-5 of the target's deviation for ν ≥ 0.3.
    """
    half = n // 2
    p = 1 - (torch.arange(half, dtype=torch.float64) + 0.5) / n  # the upper half, from the top
    if n <= EXACT_QUANTILES:
        upper = target.quantile(p)
    else:
        top = target.quantile(p[:1])
        x = top * torch.linspace(0, 1, KNOTS, dtype=torch.float64).square()
        below = target.cdf(-x).flip(0)  # 1 − F(x) with the digits of the tail, rising
        q, x = 1 - p, x.flip(0)
        at = torch.searchsorted(below, q).clamp(1, KNOTS - 1)
        share = ((q - below[at - 1]) / (below[at] - below[at - 1])).clamp(0.0, 1.0)
        upper = torch.lerp(x[at - 1], x[at], share)
    middle = torch.zeros(n % 2, dtype=torch.float64)
    return torch.cat([-upper, middle, upper.flip(0)])


def is_due(calls: Tensor, values: Tensor) -> bool:
    """Return True if this call sorts: calls 0, k, 2k, …"""
    return int(calls) % int(values[3]) == 0


def anchors(weight: Tensor, values: Tensor) -> Tensor:
    """a_j = F⁻¹((r_j − ½)/n), of the weight's shape, float32 or wider; r_j the rank of w_j."""
    target = GGD(float(values[1]), float(values[2]))
    order = weight.detach().flatten().argsort(stable=True)
    found = torch.empty_like(order, dtype=torch.promote_types(weight.dtype, torch.float32))
    found[order] = target_quantiles(target, weight.numel()).to(found)
    return found.view(weight.shape)


@torch.library.custom_op("ggpass::next_anchor", mutates_args=())
def next_anchor(weight: Tensor, anchor: Tensor, calls: Tensor, values: Tensor) -> Tensor:
    """The anchor that this call computes with, new or a copy: an operator, so that no compiler looks into the choice.

    It writes nothing. Declared as writing into `anchor` it would save the copy, but inductor (torch 2.13) then hands
    it memory that was never filled, which calls that are not due leave so.
    """
    return anchors(weight, values) if is_due(calls, values) else anchor.clone()


@next_anchor.register_fake
def _(weight: Tensor, anchor: Tensor, calls: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(anchor)


@torch.no_grad()
def _refresh(weight: Tensor, anchor: Tensor, calls: Tensor, values: Tensor) -> None:
    """a ← the anchors of this call, calls ← calls + 1."""
    if torch.compiler.is_compiling() or is_fake(weight) or is_fake(calls):
        anchor.copy_(torch.ops.ggpass.next_anchor(weight.detach(), anchor, calls, values))
    elif is_due(calls, values):
        anchor.copy_(anchors(weight, values))
    calls.add_(1)


class _PullNode(torch.autograd.Function):
    """A view forward, so that no weight is copied."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, anchor: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        # Beside autograd's own: what the next forward writes there must not count as a change of a saved tensor.
        ctx.anchor, ctx.values = anchor, values
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (weight,), gradient = ctx.saved_tensors, gradients[0]
        if gradient.is_sparse:  # rows that a batch did not read are left alone, as sparse optimizers leave them
            return gradient, None, None
        strength = ctx.values[0].to(ctx.anchor.dtype)
        pull = (weight.to(ctx.anchor.dtype) - ctx.anchor) * (strength / weight.numel())
        # One rounding of the sum, to the gradient's dtype.
        return (gradient.to(pull.dtype) + pull).to(gradient.dtype), None, None


def pull_node(weight: Tensor, anchor: Tensor, calls: Tensor, values: Tensor) -> Tensor:
    """w → w, whose backward is g → g + s·(w − a)/n: what a graph calls between a weight and its uses.

    Args:
        weight: floating, any shape. A sparse gradient passes as it is.
        anchor, calls, values: as in PullState. Without gradients nothing is counted and nothing sorted.

    Returns:
        A view of the weight.
    """
    if torch.is_grad_enabled():
        _refresh(weight, anchor, calls, values)
    result: Tensor = _PullNode.apply(weight, anchor, values)
    return result


#: Parameter -> {what asked for it: its PullState}, while the Parameter lives: a graph that is traced anew goes on with
#: the target that the first one found.
_STATES: WeakIdKeyDictionary = WeakIdKeyDictionary()


def states_of(weight: Tensor) -> dict[Any, PullState]:
    """Return the states of a weight's nodes, by what asked for them; the caller may add to it."""
    states: dict[Any, PullState] = _STATES.setdefault(weight, {})
    return states
