"""Which Parameters the rate regularizes: float matrices that train, each tensor once, less what the patterns skip."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ggpass.errors import InputError, WeightError
from ggpass.graph import weights
from ggpass.graph.report import Report, Skip
from ggpass.graph.weights import Weight, weights_of_module
from ggpass.passes.backslash.settings import RateSettings

#: What torch.nn.utils.parametrize calls the Parameters behind a weight w = f(θ₁, θ₂, …), whose bits are not theirs.
PARAMETRIZED = re.compile(r"(?:^|\.)parametrizations\.([^.]+)\.original\d*$")

REMEDY = (
    "a rate would not act on the weight that is stored; remove the parametrization first, or give the full name in "
    "only="
)


@dataclass(frozen=True)
class Selection:
    """The regularized Parameters.

    Attributes:
        names: of each, the first under which the model holds it.
        weights: the Parameters, in the model's order; tied ones once.
        report: what was left alone, and why.
    """

    names: tuple[str, ...]
    weights: tuple[nn.Parameter, ...]
    report: Report


def select(model: nn.Module, settings: RateSettings) -> Selection:
    """Return the Parameters of two and more dimensions that are floating and train.

    Raises:
        WeightError: nothing is left to regularize, a pattern matches no weight, or a weight has no data yet.
    """
    report = Report("BackSlash")
    chosen: list[Weight] = []
    for weight, reason in reasons_to_skip(weights_of_module(model), settings):
        if reason:
            report.skips.append(Skip(weight.name, reason, matrix=weight.is_matrix))
        else:
            chosen.append(weight)
    if not any(weight.tensor.numel() for weight in chosen):
        why = "; ".join(f"{s.name}: {s.reason}" for s in report.skips[:3]) or "the model has no parameters"
        raise WeightError(f"nothing is left to regularize ({why}); give another model, or other only= and skip=")
    return Selection(tuple(w.name for w in chosen), tuple(w.tensor for w in chosen), report)  # type: ignore[misc]


def reasons_to_skip(found: Sequence[Weight], settings: RateSettings) -> list[tuple[Weight, str]]:
    """Return each weight with the reason why the rate leaves it alone, or ''.

    A vector, and a Parameter that a parametrization makes a weight from, is regularized if `only` gives its full name.

    Args:
        found: all Parameters of a model.
        settings: with `only` and `skip`.

    Raises:
        WeightError: a pattern matches none of them, or one that is chosen is on the meta device.
    """
    selection = weights.Selection(settings.only, settings.skip)
    selection.check(name for weight in found for name in weight.names)
    parts = parts_of_weights({name: weight.tensor for weight in found for name in weight.names})

    def reason(weight: Weight) -> str:
        named = bool(set(weight.names) & set(settings.only))
        reason = selection.reason(weight.names) or weight.reason_frozen()
        if not reason and not named:
            reason = next((parts[name] for name in weight.names if name in parts), "")
        if reason or not weight.tensor.numel() or (named and not weight.is_matrix):
            return reason
        reason = weight.reason_of_kind()
        return reason if weight.is_matrix else f"{reason}; give its full name in only= to regularize it"

    return [(weight, reason(weight)) for weight in found]


def parts_of_weights(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names of the Parameters that a weight is made from, each with the reason to leave it alone.

    With w = g·v/‖v‖ (`weight_norm`) the size of v is of no effect at all and a small g needs no fewer bits in w. Their
    names show them, which traced graphs keep: `parametrizations.*.original*`, and the pair `*_g`, `*_v` of the older
    hook, g being v's norms.

    Args:
        tensors: a model's Parameters under all of their names.
    """
    found = {}
    for name, tensor in tensors.items():
        match = PARAMETRIZED.search(name)
        if match:
            found[name] = f"is a part that a parametrization makes {match[1]} from; {REMEDY}"
        elif name.endswith("_g") and _are_norms(tensor, tensors.get(name[:-2] + "_v")):
            weight = name[:-2].rpartition(".")[2]
            for part in (name, name[:-2] + "_v"):
                found[part] = f"is a part that weight_norm makes {weight} from; {REMEDY}"
    return found


def _are_norms(g: Tensor, v: Tensor | None) -> bool:
    """Return True if g has the shape of v's norms: of all of v, or over all dimensions but one."""
    if v is None or v.dim() < 2:
        return False
    kept = [size for size, whole in zip(g.shape, v.shape) if size == whole and whole > 1]
    return g.dim() == 0 or (g.dim() == v.dim() and g.numel() == (kept[0] if kept else 1))


def bits_of_megabytes(model: nn.Module, selection: Selection, megabytes: float) -> float:
    """Bits a regularized weight that a size of the whole model leaves, its other tensors being stored as they are.

    Raises:
        InputError: those other tensors alone exceed it.
    """
    regularized = {id(weight) for weight in selection.weights}
    others = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in regularized}.values()
    rest = sum(tensor.numel() * tensor.element_size() for tensor in others)
    if rest >= megabytes * 1e6:
        raise InputError(
            f"target_megabytes={megabytes} is less than the tensors that stay as they are ({rest / 1e6:.3f} MB); ask "
            "for more, or regularize more of the model"
        )
    return 8 * (megabytes * 1e6 - rest) / sum(weight.numel() for weight in selection.weights)
