"""GGInit: first values from generalized Gaussians, at the scale that operator, fan and activation ask for."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ggpass.errors import InputError, WeightError
from ggpass.passes.gg_init.draw import draw, rms
from ggpass.passes.gg_init.read_graph import read_graph
from ggpass.passes.gg_init.read_modules import read_modules
from ggpass.passes.gg_init.reading import Group, Reading, Use
from ggpass.passes.gg_init.shapes import AUTO_SHAPES, CheckpointShapes, check_shape, is_like
from ggpass.passes.gg_init.siblings import Sibling, error_of_std, kept_ratios, shortest
from ggpass.graph.weights import Weight, matches
from ggpass.lowering.modules import first_lowered
from ggpass.graph.report import Change, Report, Skip
from ggpass.graph.program import Program, owner_of

Shape = float | str | Mapping[str, float]


@dataclass(frozen=True)
class Measured:
    """One weight as it is: its deciding use and its σ, √(mean of squares) without an embedding's padding row."""

    reading: Reading
    use: Use
    std: float


@dataclass(frozen=True)
class Planned:
    """One weight as it will be drawn.

    Attributes:
        reading: the weight, its names and its uses.
        use: the one that sets the scale.
        before, std: σ now and afterwards.
        ratio: σ over that of its siblings, which the model's own initializer chose and the drawing keeps; 1 for most.
        shape: ν.
        source: where ν comes from, in words; empty where the caller gave one number.
    """

    reading: Reading
    use: Use
    before: float
    std: float
    ratio: float
    shape: float
    source: str

    def words(self) -> str:
        """Operator, ξ and why, n, ν, σ before → after."""
        use = self.use
        if use.group is Group.EMBEDDING:
            scale = f"{use.operator}: {use.why}"
        else:
            scale = f"{use.operator}: ξ = {use.gain:.4g} ({use.why}), n = {use.fan:g}"
        kept = f", kept at {self.ratio:.2g} of its siblings' σ" if self.ratio != 1 else ""
        source = f" ({self.source})" if self.source else ""
        return f"{scale}{kept}, ν = {self.shape:.3g}{source}, σ {self.before:.2g} → {self.std:.2g}"


@dataclass(frozen=True)
class GGInit:
    """w ~ GGD(ν, α), α = √(ξ/n · Γ(1/ν)/Γ(3/ν)), so that Var(w) = ξ/n whatever ν (arXiv 2506.00486, section 3).

    1. Weights of linear, matmul with a constant, convolutions and transposed ones, attention projections: n is the
       number of terms in one element of the result, ξ the gain of the activation that follows (`follow.py`, `gain.py`).
    2. Embeddings keep the model's own σ: a table look-up adds nothing up, and the rest of the model is made for
       the size of its rows. So does a table that is tied with a head. Its padding row stays.
    3. A weight that the model's own initializer made smaller than its siblings stays smaller by the same ratio
       (`siblings.py`); one that is all zero stays zero.
    4. Norms, biases, buffers and frozen Parameters stay bit for bit.
    5. Each weight has a generator of its own, from the seed and the first of its sorted names: neither order nor
       other weights matter, tied weights are one weight, and a module and its Program get the same values.
    6. On a Program new Parameters take the old ones' place, ties and `requires_grad` kept, so that the traced model
       stays as it was; in a training graph, and with `inplace`, the Parameters themselves are written to.

    Attributes:
        shape: ν as a number, `{pattern: ν}` (the first pattern that matches counts), `auto`, or `like:FILE`.
        seed: any int.
        only, skip: patterns, as for `compile`.
        inplace: whether to write into the Program's own tensors, which may be the caller's.

    Raises:
        WeightError: a weight on the meta device or sharded, NaN in one, ν out of range, a pattern without a match.
    """

    shape: Shape = "auto"
    seed: int = 0
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    inplace: bool = False
    _like: CheckpointShapes | None = field(init=False, default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise InputError(f"seed is an int, not {self.seed!r}")
        if is_like(self.shape):
            like = CheckpointShapes.read(str(self.shape).removeprefix("like:"))
            object.__setattr__(self, "_like", like)
        elif isinstance(self.shape, Mapping):
            for pattern, value in self.shape.items():
                check_shape(value, f"of {pattern!r}")
        elif self.shape != "auto":
            check_shape(self.shape, "of shape=")  # type: ignore[arg-type]

    def __call__(self, program: Program) -> Report:
        """Draw every weight that the graph uses."""
        return self._run(read_graph(program), program)

    def on_module(self, model: nn.Module, program: Program | None = None, why: str = "no example inputs") -> Report:
        """Draw a module's weights in place.

        Args:
            model: the module.
            program: its trace, whose tensors are the module's own; without one ξ = 1 for all.
            why: there is no trace, for the report.

        Raises:
            InputError: a module is lowered.
        """
        lowered = first_lowered(model)
        if lowered is not None:
            raise InputError(
                f"module {lowered!r} is lowered, and its codes have no first values; init_ the float model, then "
                "lower it"
            )
        readings = read_modules(model)
        if program is not None:
            readings = _joined(readings, read_graph(program))
        report = self._run(readings, None)
        if program is None:
            report.notes.append(f"{why}: ξ = 1 for every weight, whatever activation follows it")
        return report

    def _run(self, readings: list[Reading], program: Program | None) -> Report:
        report = Report("GGInit")
        self._check_patterns(readings)
        for plan in self.plan(readings, report.skips):
            self._write(plan, program)
            report.changes.append(Change(" = ".join(plan.reading.names), plan.words()))
        return report

    def plan(self, readings: Iterable[Reading], skips: list[Skip]) -> list[Planned]:
        """What each weight will be drawn with; reasons of the others go to `skips`."""
        measured: list[Measured] = []
        drawn: list[Measured] = []
        for reading in readings:
            reason = reading.reason or self._reason_to_skip(reading)
            measure = _measure(reading)
            measured += [measure] if measure is not None else []
            if not reason and measure is None:
                if not bool(reading.tensor.isfinite().all()):
                    raise WeightError(
                        f"weight {reading.name!r} holds NaN or infinity, and GGInit reads off what is there; "
                        f"run the model's own initializer first, or leave it out with skip=[{reading.name!r}]"
                    )
                reason = "all zero: the model starts it there (a residual branch, LoRA's B), and it stays"
            if reason:
                skips.append(Skip(reading.name, reason, matrix=reading.tensor.dim() >= 2))
            elif measure is not None:
                drawn.append(measure)
        # Siblings are what the model has, whether or not only= and skip= leave them alone.
        ratios = _ratios(measured)
        return [self._planned(m, ratios.get(m.reading.name, 1.0)) for m in drawn]

    def _planned(self, measured: Measured, ratio: float) -> Planned:
        reading, use, before = measured.reading, measured.use, measured.std
        shape, source = self._shape_of(reading, use)
        std = ratio * use.variance**0.5
        if use.group is Group.EMBEDDING:
            std = shortest(before, error_of_std(reading.tensor.numel()))
        return Planned(reading, use, before, std, ratio, shape, source)

    def _shape_of(self, reading: Reading, use: Use) -> tuple[float, str]:
        if self._like is not None:
            return self._like.shape_of(reading.names, use.group)
        if isinstance(self.shape, Mapping):
            for pattern, value in self.shape.items():
                if any(matches(name, pattern) for name in reading.names):
                    return float(value), f"shape[{pattern!r}]"
            return AUTO_SHAPES[use.group], "no pattern matches: auto"
        if self.shape == "auto":
            return AUTO_SHAPES[use.group], "auto"
        return float(self.shape), ""

    def _reason_to_skip(self, reading: Reading) -> str:
        for pattern in self.skip:
            if any(matches(name, pattern) for name in reading.names):
                return f"matches skip={pattern!r}"
        if self.only and not any(matches(name, pattern) for name in reading.names for pattern in self.only):
            return "matches none of only=" + ", ".join(map(repr, self.only))
        tensor = reading.tensor
        if tensor.device.type == "meta":
            raise WeightError(
                f"weight {reading.name!r} is on the meta device and has no memory to write to; "
                "call model.to_empty(device=…), run the model's own initializer, and then init_"
            )
        if hasattr(tensor, "device_mesh"):  # a DTensor
            raise WeightError(f"weight {reading.name!r} is sharded; call init_ before fully_shard")
        if not tensor.requires_grad:
            return "frozen (requires_grad=False): its values are part of the model"
        if tensor.numel() == 0:
            return "is empty"
        return ""

    def _check_patterns(self, readings: list[Reading]) -> None:
        """Raise WeightError where a pattern selects no weight: a typo would go unseen."""
        known = [name for reading in readings if reading.tensor.dim() >= 2 for name in reading.names]
        options = {"only": self.only, "skip": self.skip, "shape": self.shape if isinstance(self.shape, Mapping) else ()}
        for option, patterns in options.items():
            for pattern in patterns:
                if not any(matches(name, pattern) for name in known):
                    some = ", ".join(known[:5]) + (", …" if len(known) > 5 else "")
                    raise WeightError(f"{option}: {pattern!r} matches no weight of the model; its weights are {some}")

    def _write(self, plan: Planned, program: Program | None) -> None:
        old = plan.reading.tensor
        values = draw(old.shape, plan.std, plan.shape, self.seed, plan.reading.name).to(old.device, old.dtype)
        if plan.use.padding is not None:
            values[plan.use.padding] = old.detach()[plan.use.padding]
        if program is not None and program.training:
            program.replace(Weight(plan.reading.names, old), values)
            return
        with torch.no_grad():
            if program is None or self.inplace:
                old.copy_(values)
                return
        parameter = nn.Parameter(values, requires_grad=old.requires_grad)
        for name in plan.reading.names:
            module, leaf = owner_of(program.graph_module, name)
            module._parameters[leaf] = parameter


def _joined(modules: list[Reading], graph: list[Reading]) -> list[Reading]:
    """What the graph knows of each weight of a module; what the module itself knows where the graph has no rule."""
    traced = {id(reading.tensor): reading for reading in graph}
    joined = []
    for known in modules:
        found = traced.get(id(known.tensor))
        if found is not None and (found.uses or not known.uses):
            joined.append(replace(found, names=known.names))
        else:
            why = found.reason if found is not None else "the example inputs do not reach it"
            joined.append(replace(known, uses=tuple(replace(use, why=why) for use in known.uses)))
    return joined


def _measure(reading: Reading) -> Measured | None:
    """A weight's use and its σ as it is; None where it has no use, no values, only zeros, or NaN or infinity."""
    tensor = reading.tensor.detach()
    if not reading.uses or tensor.numel() == 0 or tensor.device.type == "meta":
        return None
    use = reading.decide()
    if use.padding is not None:
        tensor = torch.cat([tensor[: use.padding], tensor[use.padding + 1 :]])
    std = rms(tensor)
    return Measured(reading, use, std) if 0 < std < float("inf") else None


def _ratios(measured: list[Measured]) -> dict[str, float]:
    """The ratios to keep, found among the weights of each kind of operator."""
    found: dict[str, float] = {}
    for group in (Group.LINEAR, Group.CONV):
        siblings = [
            Sibling(m.reading.name, m.std, m.reading.tensor.numel(), *m.use.declared, m.use.variance**0.5)
            for m in measured
            if m.use.group is group
        ]
        found.update(kept_ratios(siblings))
    return found
