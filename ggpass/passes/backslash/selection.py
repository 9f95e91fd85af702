"""Which Parameters the rate regularizes: matrices and larger that train, each tensor once, minus the patterns."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ggpass.errors import InputError, WeightError
from ggpass.graph.report import Report, Skip
from ggpass.passes.backslash.parametrizations import factors_of
from ggpass.passes.backslash.settings import RateSettings
from ggpass.graph.weights import check_patterns, matches

#: What a step can be computed in and written back to.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    """The Parameters of two and more dimensions that are floating and train.

    Raises:
        WeightError: nothing is left to regularize, a pattern matches no weight, or a weight has no data yet.
    """
    aliases: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(name)
    check_patterns([name for names in aliases.values() for name in names], only=settings.only, skip=settings.skip)
    report = Report("BackSlash")
    factors = factors_of({name: parameter for parameter, names in aliases.items() for name in names})
    chosen: list[tuple[str, nn.Parameter]] = []
    for parameter, names in aliases.items():
        reason = reason_to_skip(names, parameter, settings, factors)
        if reason:
            report.skips.append(Skip(names[0], reason, matrix=parameter.dim() >= 2))
        else:
            chosen.append((names[0], parameter))
    if not sum(parameter.numel() for _, parameter in chosen):
        why = "; ".join(f"{s.name}: {s.reason}" for s in report.skips[:3]) or "the model has no parameters"
        raise WeightError(f"nothing is left to regularize ({why}); give another model, or other only= and skip=")
    return Selection(tuple(n for n, _ in chosen), tuple(p for _, p in chosen), report)


def reason_to_skip(
    names: list[str], parameter: nn.Parameter, settings: RateSettings, factors: Mapping[str, str]
) -> str:
    """Why a Parameter is left alone; empty where it is regularized.

    Args:
        names: all of its names.
        parameter: itself.
        settings: with `only` and `skip`.
        factors: of `factors_of`.

    Raises:
        WeightError: it is on the meta device.
    """
    for pattern in settings.skip:
        if any(matches(name, pattern) for name in names):
            return f"matches skip={pattern!r}"
    if settings.only and not any(matches(name, pattern) for name in names for pattern in settings.only):
        return "matches none of only=" + ", ".join(map(repr, settings.only))
    if not parameter.requires_grad:
        return "is frozen (requires_grad is False)"
    if parameter.dtype not in DTYPES:
        return f"is {str(parameter.dtype).removeprefix('torch.')}; the rate steps float64 to bfloat16"
    reason = next((factors[name] for name in names if name in factors), "")
    if reason and not set(names) & set(settings.only):
        return reason
    if parameter.dim() < 2 and not set(names) & set(settings.only):
        return "is a vector, as norms and biases are; give its full name in only= to regularize it"
    if parameter.device.type == "meta":
        raise WeightError(f"weight {names[0]!r} is on the meta device and has no values; load the model first")
    return ""


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
