"""lower_module: lower a module's weights without tracing it; the same class comes back."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ggpass.errors import InputError, WeightError
from ggpass.graph.pipeline import Change, Report, Skip
from ggpass.lowering.lowering import Lowering, bytes_of
from ggpass.lowering.modules import Lowered, LoweredWeight, lower_in_place, lowering_of


@dataclass(frozen=True)
class Holder:
    """One place where a module tree holds a Parameter: `parent.child.leaf`."""

    path: str
    module: nn.Module
    leaf: str

    @property
    def name(self) -> str:
        return f"{self.path}.{self.leaf}" if self.path else self.leaf


def reads_child_weight(parent: nn.Module, child: str) -> str:
    """Why a child must keep its float weight: the parent computes with it past the child's forward; else empty."""
    name = type(parent).__name__
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        return f"its parent {name} reads the weight itself, past the module's forward"
    # T5's feed-forward (and its kin: MT5, UMT5, LongT5, Switch) casts the activations to wo.weight.dtype at each call.
    if child == "wo" and name.endswith(("DenseActDense", "DenseGatedActDense")):
        return f"its parent {name} reads wo.weight at each call, which would decode it"
    return ""


def _holders(model: nn.Module) -> Iterator[tuple[Holder, Tensor]]:
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, tensor in module._parameters.items():
            if tensor is not None:
                yield Holder(path, module, leaf), tensor


def _reason_to_keep(model: nn.Module, holder: Holder) -> str:
    found = lowering_of(holder.module)
    if isinstance(found, str):
        return found
    if holder.leaf != "weight":
        return f"{holder.leaf} of {type(holder.module).__name__} has no lowering"
    if holder.path == "":
        return ""
    path, _, child = holder.path.rpartition(".")
    while True:
        reason = reads_child_weight(model.get_submodule(path), child)
        if reason or not path:
            return reason
        # TransformerEncoderLayer reads its grandchildren (self_attn.out_proj) too.
        path, _, child = path.rpartition(".")


def lower_module(model: nn.Module, lowering: Lowering, inplace: bool = False) -> tuple[nn.Module, Report]:
    """model' = model with w → codebook[codes] · scale in every module that has a lowering; nothing is traced.

    1. A tensor is lowered in all the modules that hold it or in none; tied modules share one set of codes.
    2. Linear, Embedding, Conv1d, Conv2d, Hugging Face's Conv1D; a subclass where it keeps the forward.
    3. A child whose parent reads its weight past its forward stays, with the reason.
    4. Every Parameter that stays is reported with its reason.

    Args:
        model: any module.
        inplace: change `model` itself and free each float weight as its codes exist. Otherwise `model` is not
            touched, and what stays float is copied.

    Returns:
        The lowered model, and the report.

    Raises:
        WeightError: NaN or infinity in a weight, an integer weight.
        InputError: the model is lowered already.
    """
    already = next((path for path, module in model.named_modules() if isinstance(module, Lowered)), None)
    if already is not None:
        raise InputError(
            f"module {already!r} is lowered already; compile the float model for the other target instead, or give "
            "example inputs to trace this one"
        )
    report = Report("LowerWeights")
    groups: dict[int, list[Holder]] = {}
    tensors: dict[int, Tensor] = {}
    for holder, tensor in _holders(model):
        groups.setdefault(id(tensor), []).append(holder)
        tensors[id(tensor)] = tensor
    matrices = {key: held for key, held in groups.items() if tensors[key].dim() >= 2}

    chosen: list[int] = []
    for key, held in groups.items():
        tensor = tensors[key]
        if key not in matrices:
            kept = f"{tensor.dim()}-D (bias, norm): stays as it is"
            report.skips.append(Skip(held[0].name, kept, bytes_of(tensor), matrix=False))
            continue
        reason = _reason_for_group(model, held, tensor, lowering)
        if reason:
            report.skips.append(Skip(held[0].name, reason, bytes_of(tensor)))
        else:
            chosen.append(key)

    lowering.check_values(
        (held[0].name, tensors[key], bool(lowering_of(held[0].module)[1]))
        for key, held in groups.items()
        if key in chosen
    )
    result = model
    if not inplace:
        # The weights to lower are not copied: the copy only holds them until their codes are there.
        result = copy.deepcopy(model, {key: tensors[key] for key in chosen})
    for key in sorted(chosen, key=lambda k: tensors[k].numel()):
        tensor, held = tensors.pop(key), groups.pop(key)
        report.changes.append(_swap(result, held, tensor, lowering))
        del tensor
    _refuse_save_pretrained(result)
    return result, report


def _reason_for_group(model: nn.Module, held: list[Holder], tensor: Tensor, lowering: Lowering) -> str:
    for holder in held:
        reason = _reason_to_keep(model, holder)
        if reason:
            return reason if len(held) == 1 else f"{reason} (as {holder.name})"
    reason = lowering.reason_to_skip(tuple(h.name for h in held), tensor)
    if reason:
        return reason
    orientations = {lowering_of(h.module)[1] for h in held}
    if len(orientations) > 1:
        return "used in both orientations, and a scale belongs to one"
    return "" if lowering.worth_it(tensor, orientations.pop()) else "codes and scales would be no smaller"  # type: ignore[arg-type]


def _swap(model: nn.Module, held: list[Holder], tensor: Tensor, lowering: Lowering) -> Change:
    """Let all the modules of `model` that hold `tensor` compute with its codes."""
    before, shape, dtype = bytes_of(tensor), tuple(tensor.shape), tensor.dtype
    transposed = bool(lowering_of(held[0].module)[1])
    quantized = lowering.lower(held[0].name, tensor, transposed)
    weight = LoweredWeight(quantized, lowering.format, shape, dtype, transposed, lowering.operators)
    for holder in held:
        module = model.get_submodule(holder.path)
        if isinstance(module, Lowered):
            continue  # one module under several names, lowered under the first
        found = lowering_of(module)
        if isinstance(found, str):
            raise WeightError(f"{holder.name}: {found}")
        lower_in_place(module, found[0], weight)
    name = " = ".join(h.name for h in held)
    what = f"{'×'.join(map(str, shape))} {str(dtype).removeprefix('torch.')} → {lowering.format.name}"
    return Change(name, what, before, bytes_of(quantized.codes) + bytes_of(quantized.scale))


def _refuse_to_save(*args: object, **kwargs: object) -> None:
    """Stands where `save_pretrained` was: a checkpoint of codes would load elsewhere as random weights."""
    raise NotImplementedError(
        "save_pretrained would write codes where transformers expects float weights, and the checkpoint would load "
        "as random weights; save this model with ggpass.save(model, path), or call save_pretrained on the float "
        "model before compiling it"
    )


def _refuse_save_pretrained(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "save_pretrained"):
            module.__dict__["save_pretrained"] = _refuse_to_save
