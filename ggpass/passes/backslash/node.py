"""The rate node: w → w, the mark in a training graph of a weight that the rate's slope acts on."""

import torch
from torch import Tensor


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
