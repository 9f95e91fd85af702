"""What is run for each task: as many settings for the baselines as for BackSlash."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from .jobs import Job

Settings = tuple[dict[str, Any], ...]

#: Every method of the tables, in their order: a name in words for each.
METHODS = {
    "adamw": "AdamW",
    "l1": "proximal L1",
    "l1-grid": "proximal L1, ending on the grid",
    "backslash": "BackSlash, proximal",
    "backslash-grid": "BackSlash, ending on the grid",
    "paper-code": "BackSlash, published update",
}


@dataclass(frozen=True)
class Plan:
    """The settings of one task.

    Attributes:
        task: its name.
        seeds: how many.
        settings: those of each method.
        targets: bits a weight that the controller is asked for, with the grid's step of `controlled`.
        controlled: the other numbers of those runs.
        inits: learning rates of the comparison of initializers; none where it is not made.
        init_epochs: their length.
        steps: Δ to measure models on that end on no grid of their own; None: all of `grid_points.STEPS`.
        spreads: γ of the grids to measure those models on; 0 is one grid for all.
        tables: whether all matrices are counted with one table or each with its own.
    """

    task: str
    seeds: int
    settings: dict[str, Settings]
    targets: tuple[float, ...] = ()
    controlled: dict[str, Any] | None = None
    inits: tuple[float, ...] = ()
    init_epochs: int = 0
    init_seeds: int = 0
    steps: tuple[float, ...] | None = None
    spreads: tuple[float, ...] = (0.0,)
    tables: Literal["one", "each"] = "one"

    def curves(self) -> list[Job]:
        """Every setting of every method with every seed; the first seed of all comes first."""
        return [
            Job(self.task, method, setting, seed)
            for seed in range(self.seeds)
            for method, settings in self.settings.items()
            for setting in settings
        ]

    def control(self) -> list[Job]:
        """One run for each target."""
        return [Job(self.task, "controller", {**(self.controlled or {}), "target_bits": bits}) for bits in self.targets]

    def initializers(self) -> list[Job]:
        """Every initializer with every learning rate and seed."""
        return [
            Job(self.task, "init", {"lr": lr, **init}, seed, self.init_epochs)
            for seed in range(self.init_seeds)
            for lr in self.inits
            for init in INITIALIZERS
        ]


INITIALIZERS: Settings = (
    {"init": "default"},
    {"init": "xavier"},
    {"init": "kaiming"},
    {"init": "normal 0.02"},
    {"init": "gg", "shape": 2.0},
    {"init": "gg", "shape": 1.0},
    {"init": "gg", "shape": 0.7},
)


def quick(plan: Plan) -> Plan:
    """One seed, every second setting, one target, one learning rate of the initializers."""
    return replace(
        plan,
        seeds=1,
        settings={method: settings[::2] for method, settings in plan.settings.items() if method != "paper-code"},
        targets=plan.targets[-1:],
        inits=plan.inits[-1:],
        init_seeds=min(plan.init_seeds, 1),
    )


def _each(strengths: tuple[float, ...], **others: Any) -> Settings:
    return tuple({"strength": strength, **others} for strength in strengths)


PLANS = {
    "mlp": Plan(
        task="mlp",
        seeds=5,
        settings={
            "adamw": tuple({"lr": lr, "weight_decay": wd} for lr in (1e-3, 3e-3) for wd in (0.01, 0.3, 1.0)),
            "l1": (*_each((0.03, 0.05, 0.07, 0.1, 0.14), lr=3e-3), {"strength": 0.07, "lr": 1e-3}),
            "backslash": _each((0.0004, 0.0008, 0.0012), lr=3e-3, weight_decay=1.0, step=2**-5),
            "paper-code": _each((20.0, 100.0), lr=1e-3),
            "backslash-grid": (
                *_each((0.0005, 0.0008, 0.0012, 0.0016), lr=3e-3, weight_decay=0.3, step=2**-4, grid=0.5),
                *_each((0.0005, 0.001), lr=3e-3, weight_decay=0.3, step=2**-3.5, grid=0.5),
            ),
            "l1-grid": _each((0.04, 0.07, 0.1), lr=3e-3, step=2**-4, grid=0.5),
        },
        targets=(2.0, 1.0, 0.5),
        controlled={"lr": 3e-3, "step": 2**-5},
    ),
    "cnn": Plan(
        task="cnn",
        seeds=3,
        settings={
            "adamw": tuple(
                {"lr": lr, "weight_decay": wd} for lr, wd in ((1e-3, 0.3), (3e-3, 0.01), (3e-3, 0.3), (3e-3, 1.0))
            ),
            "l1": _each((0.03, 0.05, 0.07, 0.1), lr=3e-3),
            "backslash-grid": (
                *_each((0.0008, 0.0012, 0.0018), lr=3e-3, weight_decay=0.3, step=2**-4, grid=0.5),
                {"strength": 0.0015, "lr": 3e-3, "weight_decay": 0.3, "step": 2**-3.5, "grid": 0.5},
            ),
            "l1-grid": _each((0.05,), lr=3e-3, step=2**-4, grid=0.5),
        },
        targets=(2.0, 1.0, 0.5),
        controlled={"lr": 3e-3, "step": 2**-5},
        inits=(1e-3, 3e-3),
        init_epochs=3,
        init_seeds=5,
    ),
    "byte-lm": Plan(
        task="byte-lm",
        seeds=3,
        settings={
            "adamw": tuple({"lr": 1e-2, "weight_decay": decay} for decay in (1.0, 2.0)),
            "l1": _each((0.003, 0.001), lr=1e-2, weight_decay=1.0),
            "backslash-grid": tuple(
                {"strength": 0.0002, "lr": 1e-2, "weight_decay": 1.0, "step": step, "spread": 0.6, "grid": 0.5}
                for step in (2**-3.5, 2**-4)
            ),
            "l1-grid": _each((0.005,), lr=1e-2, weight_decay=1.0, step=2**-3.5, spread=0.6, grid=0.5),
        },
        targets=(2.0, 0.5),
        controlled={"lr": 1e-2, "step": 2**-5},
        inits=(6e-3,),
        init_epochs=1,
        init_seeds=3,
        steps=tuple(2.0**-e for e in (5, 5.25, 5.5, 5.75, 6, 6.25, 6.5, 6.75, 7, 7.5)),
        spreads=(0.0, 0.75),
        tables="each",
    ),
    "minilm-classifier": Plan(
        task="minilm-classifier",
        seeds=1,
        settings={
            "adamw": ({"lr": 1e-4, "weight_decay": 0.01}, {"lr": 2e-4, "weight_decay": 1.0}),
            "l1": _each((0.03, 0.1), lr=2e-4, weight_decay=1.0),
            "backslash-grid": tuple(
                {"strength": 0.0005, "lr": lr, "weight_decay": 1.0, "step": 2**-4, "spread": 0.5, "grid": 0.5}
                for lr in (2e-4, 4e-4)
            ),
            "l1-grid": _each((0.03,), lr=2e-4, weight_decay=1.0, step=2**-4, spread=0.5, grid=0.5),
        },
        targets=(1.0,),
        controlled={"lr": 2e-4, "step": 2**-5},
        # Its evaluation takes as long as a seventh of its training.
        steps=tuple(2.0**-e for e in (4.25, 4.75, 5.5, 7, 9)),
        spreads=(0.0, 0.5),
        tables="each",
    ),
}
