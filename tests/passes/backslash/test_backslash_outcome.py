"""What is told of a target: bits as a step leaves them, the λ that was used, and why a target was missed, once."""

import itertools
import logging
import math
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ggpass.passes.backslash import BackSlash
from ggpass.training import Regularizer, Schedule

DELTA = 2.0**-6


def entropy(regularizer: Regularizer) -> float:
    """−Σ p log2 p of round(θ/Δ), counted by a dict in float64."""
    values = torch.cat([weight.detach().double().flatten() for weight in regularizer.weights])
    counts: dict[int, int] = {}
    for symbol in (values / regularizer.settings.step).round().int().tolist():
        counts[symbol] = counts.get(symbol, 0) + 1
    return -sum(n / len(values) * math.log2(n / len(values)) for n in counts.values())


def net(width: int = 16, hidden: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 4))


class Experts(nn.Module):
    """Eight of them, of which `choose(step)` is asked."""

    def __init__(self, choose: Callable[[int], int]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(net() for _ in range(8))
        self.choose, self.calls = choose, itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.experts[self.choose(next(self.calls))](x)
        return result


def train(
    model: nn.Module,
    steps: int,
    lr: float = 0.01,
    decay: bool = True,
    watch: Callable[[Regularizer], None] = lambda regularizer: None,
    **fields: Any,
) -> Regularizer:
    generator = torch.Generator().manual_seed(0)
    width = next(model.parameters()).shape[-1]
    x = torch.randn(256, width, generator=generator)
    y = torch.tanh(x @ torch.randn(width, 4, generator=generator))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps) if decay else None
    with BackSlash(**fields).attach(model, optimizer) as regularizer:
        for step in range(steps):
            optimizer.zero_grad()
            rows = slice(64 * (step % 4), 64 * (step % 4) + 64)
            nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            watch(regularizer)
    return regularizer


@pytest.mark.parametrize(
    "fields",
    [
        {"strength": 3.0, "refit_every": 1},
        {"target_bits": 1.0, "total_steps": 6},
        {"strength": 3.0, "mode": "paper-code", "refit_every": 1},
        {"strength": 3.0, "mode": "coupled", "refit_every": 1},
        {"strength": 3.0, "refit_every": 1, "total_steps": 6, "schedule": Schedule(tail=3)},
        {"strength": 3.0, "refit_every": 1, "total_steps": 6, "schedule": Schedule(on_grid=3)},
    ],
    ids=lambda fields: "-".join(map(str, fields)),
)
def test_bits_are_those_of_the_weights_as_the_step_leaves_them(fields: dict[str, Any]) -> None:
    """At a high learning rate a step shrinks much: ahead of it there are other bits."""

    def watch(regularizer: Regularizer) -> None:
        state = regularizer.state_dict()
        assert state["measured_bits"] == pytest.approx(entropy(regularizer), rel=1e-12)
        zeros = sum(int((weight / DELTA).round().eq(0).sum()) for weight in regularizer.weights)
        assert state["measured_zeros"] == pytest.approx(zeros / regularizer.count, rel=1e-12)

    train(net(), 6, lr=0.1, decay=False, watch=watch, **fields)


def test_between_measurements_the_bits_stand_and_the_last_step_is_measured() -> None:
    seen: list[float] = []
    regularizer = train(
        net(), 23, refit_every=10, total_steps=23, strength=0.5, watch=lambda r: seen.append(r.state_dict()["steps"])
    )
    assert seen == list(range(1, 24))
    assert regularizer.state_dict()["measured_bits"] == pytest.approx(entropy(regularizer), rel=1e-12)


def test_nan_that_comes_within_a_step_is_told_and_the_others_are_measured(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = BackSlash(strength=1e-3, mode="coupled", refit_every=1).attach(model, optimizer)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    model[0].weight.grad[0, 0] = math.nan
    optimizer.step()
    assert [r.getMessage() for r in caplog.records] == ["0.weight holds NaN or infinity: its rate is left as it was"]
    assert math.isfinite(regularizer.state_dict()["measured_bits"])


#: Case -> model, steps, how it is trained, the reason.
MISSED: dict[str, tuple[Callable[[], nn.Module], int, dict[str, Any], str]] = {
    "short": (net, 10, {"target_bits": 1.0, "total_steps": 10}, r"at most 18 %, and there were 10 in all; give more"),
    "one step": (net, 1, {"target_bits": 1.0, "total_steps": 1, "decay": False}, "give more steps"),
    "no total": (net, 30, {"target_bits": 1.5}, "ramp of 600 steps was not over; give total_steps="),
    "broken off": (net, 30, {"target_bits": 1.5, "total_steps": 100}, "ended ahead of total_steps=100"),
    "dead experts": (
        lambda: Experts(lambda step: step % 2),
        100,
        {"target_bits": 1.5, "total_steps": 100},
        r"[678]\d % of the weights had no gradient .*experts\.2\.0\.weight.*skip= them",
    ),
    "no learning rate": (net, 30, {"target_bits": 1.5, "total_steps": 30, "lr": 0.0, "decay": False}, "rate was 0"),
    "below": (net, 30, {"target_bits": 9.0, "total_steps": 30, "refit_every": 10}, "began with .* ask for fewer"),
    "tail": (
        net,
        200,
        {"target_bits": 3.0, "total_steps": 200, "schedule": Schedule(ramp=0.5, tail=0.4), "decay": False, "lr": 0.005},
        r"tail of 80 steps trains without a rate, and the bits were (2\.9|3\.0)\d ahead of it",
    ),
    "tiny": (
        lambda: nn.Linear(3, 4, bias=False),
        100,
        {"target_bits": 1.5, "total_steps": 100},
        "one weight of only 12 changes the bits by about 0.30",
    ),
}


@pytest.mark.parametrize("case", MISSED)
def test_a_missed_target_is_told_once_with_its_reason(case: str, caplog: pytest.LogCaptureFixture) -> None:
    make, steps, fields, reason = MISSED[case]
    regularizer = train(make(), steps, **fields)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == regularizer.report.notes
    assert len(warnings) == 1
    bits = regularizer.state_dict()["measured_bits"]
    start = f"asked {fields['target_bits']:.2f} bits a weight, reached {bits:.2f} after {steps} steps, because "
    assert warnings[0].startswith(start)
    assert re.search(reason, warnings[0].removeprefix(start)), warnings[0]
    if fields.get("total_steps") == steps:
        assert regularizer.status().endswith(f", asked {fields['target_bits']:.2f}")


@pytest.mark.parametrize(
    "choose", [lambda step: step % 8, lambda step: random.Random(step).randrange(8)], ids=["turns", "random"]
)
def test_a_target_is_met_where_an_expert_is_reached_at_some_steps_only(choose: Callable[[int], int]) -> None:
    regularizer = train(Experts(choose), 300, target_bits=2.0, total_steps=300)
    assert entropy(regularizer) == pytest.approx(2.0, rel=0.03)
    assert not regularizer.report.notes


def test_a_target_that_is_met_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    regularizer = train(net(), 200, target_bits=3.0, total_steps=200)
    assert entropy(regularizer) == pytest.approx(3.0, rel=0.03)
    assert not caplog.records
    assert "asked" not in regularizer.status()


def test_a_training_that_broke_off_is_not_judged(caplog: pytest.LogCaptureFixture) -> None:
    def stop(regularizer: Regularizer) -> None:
        if regularizer.steps == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(net(), 10, target_bits=1.0, total_steps=10, watch=stop)
    assert not caplog.records


def test_the_end_shows_the_strength_that_was_used() -> None:
    strengths: list[float] = []
    regularizer = train(
        net(), 40, target_bits=3.0, total_steps=40, watch=lambda regularizer: strengths.append(regularizer.strength)
    )
    assert strengths[-1] == 0, "where the learning rate ends, nothing is left to undo"
    used = [strength for strength in strengths if strength][-1]
    assert f"λ {used:.2g}," in regularizer.status()


def test_a_needless_rate_shows_zero_while_it_lasts() -> None:
    shown: list[str] = []
    train(net(), 20, target_bits=9.0, total_steps=100, watch=lambda regularizer: shown.append(regularizer.status()))
    assert all("λ 0," in line for line in shown)
