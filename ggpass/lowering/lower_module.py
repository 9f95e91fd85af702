"""lower_module: lower a module's weights without tracing it; the same class comes back."""

import copy

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ggpass.errors import InputError
from ggpass.graph.report import Report
from ggpass.graph.weights import weights_of_module
from ggpass.lowering.decide import Lowering, decide
from ggpass.lowering.encode import check_values, encode, release
from ggpass.lowering.modules import first_lowered, replace


def lower_module(model: nn.Module, lowering: Lowering, inplace: bool = False) -> tuple[nn.Module, Report]:
    """model' = model with w → codebook[codes] · scale in every module that has a lowering; nothing is traced.

    1. A tensor is lowered in all the modules that hold it or in none; tied modules share one set of codes.
    2. Linear, Embedding, Conv1d, Conv2d, Hugging Face's Conv1D compute with the codes, if they keep the forward.
    3. Any other module (attention, LSTM, experts) keeps its forward, and its matrices are decoded as it reads them.
    4. Every Parameter that stays is reported with its reason.

    Args:
        model: any module.
        lowering: what to lower, and into what.
        inplace: change `model` itself and free each float weight as its codes exist. Otherwise `model` is not
            touched, and what stays float is copied.

    Returns:
        The lowered model, and the report.

    Raises:
        WeightError: NaN or infinity in a weight, an integer weight, a pattern that matches nothing.
        InputError: the model is lowered already.
    """
    already = first_lowered(model)
    if already is not None:
        raise InputError(
            f"module {already!r} is lowered already; compile the float model for the other target instead, or give "
            "example inputs to trace this one"
        )
    report = Report("LowerWeights")
    weights = weights_of_module(model)
    lowering.selection.check(name for weight in weights if weight.is_matrix for name in weight.names)
    chosen = decide(weights, lowering, report)
    check_values(chosen, lowering)
    # The weights to lower are not copied: the copy only holds them until their codes are there.
    kept = {id(weight.tensor): weight.tensor for weight in chosen}
    result = model if inplace else copy.deepcopy(model, {**_computed_tensors(model), **kept})
    for weight in chosen:
        report.changes.append(lowering.change(weight))
        replace(result, weight, encode(weight, lowering), lowering)
        release(weight, lowering)
    refuse_save_pretrained(result)
    return result, report


def _computed_tensors(model: nn.Module) -> dict[int, Tensor]:
    """Return copies of the tensors that torch refuses to copy: sparse ones, and results that a forward left in it."""
    found = [value for module in model.modules() for value in pytree.tree_leaves(module.__dict__)]
    tensors = [t for t in found if isinstance(t, Tensor) and (not t.is_leaf or t.layout is not torch.strided)]
    copies = {id(t): t.detach().clone() for t in tensors}
    return {id(t): nn.Parameter(copies[id(t)]) if isinstance(t, nn.Parameter) else copies[id(t)] for t in tensors}


def _refuse_to_save(*args: object, **kwargs: object) -> None:
    """Raise in the place of `save_pretrained`: a checkpoint of codes would load elsewhere as random weights."""
    raise NotImplementedError(
        "save_pretrained would write codes where transformers expects float weights, and the checkpoint would load "
        "as random weights; save this model with ggpass.save(model, path), or call save_pretrained on the float "
        "model before compiling it"
    )


def refuse_save_pretrained(model: nn.Module) -> None:
    """Let `save_pretrained` of a lowered model, and of its parts, raise."""
    for module in model.modules():
        if hasattr(module, "save_pretrained"):
            module.__dict__["save_pretrained"] = _refuse_to_save
