"""GGInit: first values from generalized Gaussians, at the scale that operator, fan and activation ask for."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ggpass.errors import InputError, WeightError
from ggpass.ggd.density import GGD
from ggpass.ggd.moments import moments
from ggpass.graph.program import Program
from ggpass.graph.report import Change, Report, Skip
from ggpass.graph.weights import Selection, as_patterns, check_patterns, matches
from ggpass.lowering.modules import first_lowered
from ggpass.passes.gg_init.candidate import Candidate, Group, Use
from ggpass.passes.gg_init.read_graph import read_graph
from ggpass.passes.gg_init.read_modules import read_modules
from ggpass.passes.gg_init.shapes import AUTO_SHAPES, CheckpointShapes, check_shape, is_like
from ggpass.passes.gg_init.siblings import Sibling, error_of_std, kept_ratios, shortest

Shape = float | str | Mapping[str, float]


@dataclass(frozen=True)
class Planned:
    """One weight as it is, and as it will be drawn.

    Attributes:
        candidate: the weight, its names and its uses.
        use: the one that sets the scale.
        before, std: σ now, √(mean of squares) without an embedding's padding row, and afterwards.
        ratio: σ over that of its siblings, which the model's own initializer chose and the drawing keeps; 1 for most.
        shape: ν.
        source: of ν, in words; empty if the caller gave one number.
    """

    candidate: Candidate
    use: Use
    before: float
    std: float = math.nan
    ratio: float = 1.0
    shape: float = math.nan
    source: str = ""

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
       stays as it was. In a training graph, and with `inplace` as `ggpass.init_` has it, the Parameters themselves are
       written to, so that an optimizer that holds them goes on with them.

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
        for name in ("only", "skip"):
            object.__setattr__(self, name, as_patterns(getattr(self, name)))
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
        candidates = read_modules(model)
        if program is not None:
            candidates = _joined(candidates, read_graph(program))
        report = self._run(candidates, None)
        if program is None:
            report.notes.append(f"{why}: ξ = 1 for every weight, whatever activation follows it")
        return report

    def _run(self, candidates: list[Candidate], program: Program | None) -> Report:
        report = Report("GGInit")
        names = (name for candidate in candidates if candidate.weight.is_matrix for name in candidate.names)
        known = names if program is None else program.matrix_names()
        by_pattern = self.shape if isinstance(self.shape, Mapping) else ()
        check_patterns(known, only=self.only, skip=self.skip, shape=by_pattern)
        for plan in self.plan(candidates, report.skips):
            self._write(plan, program)
            report.changes.append(Change(" = ".join(plan.candidate.names), plan.words()))
        return report

    def plan(self, candidates: Iterable[Candidate], skips: list[Skip]) -> list[Planned]:
        """What each weight will be drawn with; reasons of the others go to `skips`."""
        measured: list[Planned] = []
        drawn: list[Planned] = []
        for candidate in candidates:
            reason = self._reason_to_keep(candidate)
            measure = _measure(candidate)
            measured += [measure] if measure is not None else []
            if not reason and measure is None:
                if not bool(candidate.tensor.isfinite().all()):
                    raise WeightError(
                        f"weight {candidate.name!r} holds NaN or infinity, and GGInit reads off what is there; "
                        f"run the model's own initializer first, or leave it out with skip=[{candidate.name!r}]"
                    )
                reason = "all zero: the model starts it there (a residual branch, LoRA's B), and it stays"
            if reason:
                skips.append(Skip(candidate.name, reason, matrix=candidate.weight.is_matrix))
            elif measure is not None:
                drawn.append(measure)
        # Siblings are what the model has, whether or not only= and skip= leave them alone.
        ratios = _ratios(measured)
        return [self._completed(plan, ratios.get(plan.candidate.name, 1.0)) for plan in drawn]

    def _completed(self, plan: Planned, ratio: float) -> Planned:
        shape, source = self._shape_of(plan.candidate, plan.use)
        std = ratio * plan.use.variance**0.5
        if plan.use.group is Group.EMBEDDING:
            std = shortest(plan.before, error_of_std(plan.candidate.tensor.numel()))
        return replace(plan, std=std, ratio=ratio, shape=shape, source=source)

    def _shape_of(self, candidate: Candidate, use: Use) -> tuple[float, str]:
        if self._like is not None:
            return self._like.shape_of(candidate.names, use.group)
        if isinstance(self.shape, Mapping):
            for pattern, value in self.shape.items():
                if any(matches(name, pattern) for name in candidate.names):
                    return float(value), f"shape[{pattern!r}]"
            return AUTO_SHAPES[use.group], "no pattern matches: auto"
        if self.shape == "auto":
            return AUTO_SHAPES[use.group], "auto"
        return float(self.shape), ""

    def _reason_to_keep(self, candidate: Candidate) -> str:
        """Return the reason why a weight is not drawn, or ''.

        Raises:
            WeightError: it cannot be drawn, and nothing says to leave it alone.
        """
        weight, tensor = candidate.weight, candidate.tensor
        reason = candidate.reason or Selection(self.only, self.skip).reason(weight.names)
        if reason:
            return reason
        if tensor.device.type == "meta":
            raise WeightError(
                f"weight {candidate.name!r} is on the meta device and has no memory to write to; "
                "call model.to_empty(device=…), run the model's own initializer, and then init_"
            )
        if hasattr(tensor, "device_mesh"):  # a DTensor
            raise WeightError(f"weight {candidate.name!r} is sharded; call init_ before fully_shard")
        if not tensor.requires_grad:
            return "frozen (requires_grad=False): its values are part of the model"
        return weight.reason_of_kind()

    def _write(self, plan: Planned, program: Program | None) -> None:
        candidate = plan.candidate
        old = candidate.tensor
        values = draw(old.shape, plan.shape, plan.std, self.seed, candidate.name).to(old.device, old.dtype)
        if plan.use.padding is not None:
            values[plan.use.padding] = old.detach()[plan.use.padding]
        if program is not None and (program.training or not self.inplace):
            program.replace(candidate.weight, values, requires_grad=old.requires_grad)
            return
        with torch.no_grad():
            old.copy_(values)


def draw(size: torch.Size, shape: float, std: float, seed: int, name: str) -> Tensor:
    """w ~ GGD(ν, α = σ·√(Γ(1/ν)/Γ(3/ν))): float32 on the CPU, the same on every machine whatever the weight is on.

    The generator is seeded by SHA-256 of seed and name: module order and other weights do not matter.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return GGD.of_std(shape, std).sample(size, generator=generator)


def _joined(modules: list[Candidate], graph: list[Candidate]) -> list[Candidate]:
    """What the graph knows of each weight of a module; what the module itself knows if the graph has no rule."""
    traced = {id(candidate.tensor): candidate for candidate in graph}
    joined = []
    for known in modules:
        found = traced.get(id(known.tensor))
        if found is not None and (found.uses or not known.uses):
            joined.append(found)
        else:
            why = found.reason if found is not None else "the graph does not use it"
            joined.append(replace(known, uses=tuple(replace(use, why=why) for use in known.uses)))
    return joined


def _measure(candidate: Candidate) -> Planned | None:
    """Return a weight's use and its σ as it is; None if it has no use, no values, only zeros, or NaN or infinity."""
    tensor = candidate.tensor.detach()
    if not candidate.uses or tensor.device.type == "meta":
        return None
    use = candidate.decide()
    if use.padding is not None:
        tensor = torch.cat([tensor[: use.padding], tensor[use.padding + 1 :]])
    found = moments([tensor])
    return Planned(candidate, use, math.sqrt(found.second.item())) if found.usable else None


def _ratios(measured: list[Planned]) -> dict[str, float]:
    """Return the ratios to keep, found among the weights of each kind of operator."""
    found: dict[str, float] = {}
    for group in (Group.LINEAR, Group.CONV):
        siblings = [
            Sibling(m.candidate.name, m.before, m.candidate.tensor.numel(), *m.use.declared, m.use.variance**0.5)
            for m in measured
            if m.use.group is group
        ]
        found.update(kept_ratios(siblings))
    return found
