"""Var[x] needs two values: batch norms in training mode refuse a batch that gives each channel one, in graphs too."""

import torch
from torch import Tensor, fx

from ggpass.errors import InputError
from ggpass.graph.program import Program

#: How torch's own batch norm begins its refusal, which torch.export leaves out of a graph.
REFUSAL = "Expected more than 1 value per channel when training"

REMEDY = (
    "give a batch of two or more (drop_last=True in the DataLoader for the last one), or put the batch norms into "
    "eval()"
)


def explained(reason: str) -> str:
    """Return the remedy for torch's refusal, or '' if an error is another."""
    return f"{reason.partition(REFUSAL)[1]}; {REMEDY}" if REFUSAL in reason else ""


def guard_batch_norms(program: Program) -> None:
    """batch_norm(x) -> batch_norm(more_than_one(x)) wherever the mean and variance are the batch's.

    Without it a graph that was traced with a larger batch takes one of 1: the output is the bias alone, and the running
    variance becomes NaN.

    Args:
        program: a graph as torch.export traces it; edited in place.
    """
    for node in program.calls(torch.ops.aten.batch_norm.default):
        source, uses_batch = node.args[0], node.args[5]
        if not (isinstance(source, fx.Node) and uses_batch):
            continue
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        name = stack[-1][0] if stack else node.name
        with program.graph.inserting_before(node):
            guard = program.graph.call_function(more_than_one, (source, name))
        guard.meta["val"] = source.meta.get("val")
        node.update_arg(0, guard)


def more_than_one(x: Tensor, name: str) -> Tensor:
    """x itself, of shape (B, C, …).

    Args:
        x: what a batch norm in training mode reads.
        name: of the batch norm, for the error.

    Raises:
        InputError: one value for each channel.
    """
    if x.numel() == x.shape[1]:
        raise InputError(
            f"{name!r} normalizes by the batch's own variance, and an input of shape {tuple(x.shape)} has one value "
            f"for each channel; {REMEDY}"
        )
    return x
