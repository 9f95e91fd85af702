"""w = f(θ₁, θ₂, …): Parameters from which a parametrization makes a weight, whose bits are not the weight's."""

import re
from collections.abc import Mapping

from torch import Tensor

#: What torch.nn.utils.parametrize calls the Parameters behind a weight.
PARAMETRIZED = re.compile(r"(?:^|\.)parametrizations\.([^.]+)\.original\d*$")

REMEDY = (
    "a rate would not act on the weight that is stored; remove the parametrization first, or give the full name in "
    "only="
)


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
