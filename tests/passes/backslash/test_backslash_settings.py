"""RateSettings, Schedule, the selection of weights, and the controller: what is refused, and known answers."""

import math

import pytest
import torch
from torch import nn

from ggpass.errors import InputError, WeightError
from ggpass.passes.backslash import BackSlash
from ggpass.passes.backslash.controller import Controller, solve
from ggpass.passes.backslash.forecast import Forecast, sample_of
from ggpass.training import RateSettings, Regularizer, Schedule


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "exactly one of strength, target_bits and target_megabytes; none given"),
        ({"strength": 1.0, "target_bits": 2.0}, "strength and target_bits given"),
        ({"strength": -1.0}, "strength is a number of at least 0"),
        ({"strength": math.nan}, "strength is a number of at least 0"),
        ({"target_bits": 0.0}, "target_bits is a positive number"),
        ({"target_megabytes": math.inf}, "target_megabytes is a positive number"),
        ({"strength": 1.0, "step": 0.0}, "step is a positive number"),
        ({"strength": 1.0, "epsilon": -0.1}, "epsilon is a number of at least 0"),
        ({"strength": 1.0, "shape_max": 0.0}, "shape_max is a positive number"),
        ({"strength": 1.0, "mode": "adam"}, "mode='adam' is unknown; choose one of proximal"),
        ({"target_bits": 1.0, "mode": "coupled"}, "target_bits is reached by the proximal step"),
        ({"strength": 1.0, "mode": "paper-coupled", "shape": 1.0}, "fits ν itself"),
        ({"strength": 1.0, "refit_every": 0}, "refit_every is a count"),
        ({"strength": 1.0, "total_steps": 1.5}, "total_steps is a count"),
        ({"strength": 1.0, "schedule": Schedule(tail=5)}, "tail=5 needs total_steps="),
        ({"strength": 1.0, "schedule": Schedule(warm_up=0.5)}, "warm_up=0.5 needs total_steps="),
        ({"strength": 1.0, "total_steps": 10, "schedule": Schedule(warm_up=0.6, tail=5)}, "longer than total_steps=10"),
        ({"target_bits": 1.0, "total_steps": 10, "schedule": Schedule(tail=5)}, "ramp=0.6 is not over when tail=5"),
        ({"target_bits": 1.0, "total_steps": 10, "schedule": Schedule(ramp=7, tail=0.4)}, "shorten one of them"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings: dict[str, object], words: str) -> None:
    for kind in (RateSettings, BackSlash):
        with pytest.raises(InputError) as caught:
            kind(**settings)  # type: ignore[arg-type]
        assert words in str(caught.value)


@pytest.mark.parametrize("span", [-1, 1.5, -0.1, math.nan, True, "a"])
def test_a_span_is_a_share_or_a_number_of_steps(span: object) -> None:
    with pytest.raises(InputError, match="share of all steps"):
        Schedule(warm_up=span)  # type: ignore[arg-type]


def test_defaults_that_depend_on_the_mode() -> None:
    assert RateSettings(mode="paper-code").strength == 2000
    assert RateSettings(mode="paper-code").slope_epsilon == 1
    assert RateSettings(strength=1.0).slope_epsilon == 2**-6
    assert RateSettings(strength=1.0, only="a", skip=["b", "c"]).only == ("a",)
    assert RateSettings(strength=1.0).interval == 20
    assert RateSettings(strength=1.0, total_steps=300).interval == 3
    assert RateSettings(strength=1.0, total_steps=10).interval == 1


def test_the_schedule_rises_holds_and_ends() -> None:
    schedule = Schedule(warm_up=3, tail=0.2)
    assert [schedule.factor(step, 10) for step in range(10)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0, 0]
    assert [Schedule().factor(step, None) for step in (0, 10**6)] == [1, 1]
    assert [schedule.in_tail(step, 10) for step in (7, 8)] == [False, True]


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2, bias=False))


def test_patterns_select_weights() -> None:
    names = {
        (): ("0.weight", "2.weight"),
        ("0",): ("0.weight",),
        ("0", "1.weight"): ("0.weight", "1.weight"),  # a vector, by its full name
    }
    for only, chosen in names.items():
        assert Regularizer(small(), RateSettings(strength=1.0, only=only)).names == chosen
    assert Regularizer(small(), RateSettings(strength=1.0, skip="0.*")).names == ("2.weight",)
    with pytest.raises(WeightError, match="skip='3' matches no weight"):
        Regularizer(small(), RateSettings(strength=1.0, skip="3"))


def test_megabytes_are_those_of_the_whole_model() -> None:
    # 48 weights are regularized; 8 + 8 + 8 others take 96 bytes. 120 bytes leave 24: 4 bits a weight.
    regularizer = Regularizer(small(), RateSettings(target_megabytes=120e-6))
    assert regularizer.target == pytest.approx(4.0)
    with pytest.raises(InputError, match="less than the tensors that stay"):
        Regularizer(small(), RateSettings(target_megabytes=96e-6))


def test_the_plan_goes_to_the_target_by_equal_factors_and_holds_it() -> None:
    controller = Controller(target=1.0, ramp=20)
    assert controller.needed_drop(10, 15, 4.0) == pytest.approx(-0.2)  # bounded: the plan asks for ln 4 / 4
    assert [controller.planned(step) for step in (10, 20, 30, 99)] == pytest.approx([4.0, 2.0, 1.0, 1.0])
    below = Controller(target=5.0, ramp=20)
    assert below.needed_drop(0, 5, 4.0) == 0.0
    assert below.planned(7) == 5.0


def test_growth_is_what_was_not_forecast() -> None:
    controller = Controller(target=1.0, ramp=0)
    controller.needed_drop(0, 1, 1.0)
    for _ in range(60):  # the training grows the bits by a tenth an interval, whatever λ does
        controller.forecast = math.exp(-0.1)
        drop = controller.needed_drop(1, 2, 1.0)
    assert controller.growth == pytest.approx(0.1, rel=1e-6)
    assert drop == pytest.approx(-0.1, rel=1e-6)
    assert controller.needed_drop(1, 2, 0.5) == 0.0  # far below the plan: no rate


@pytest.mark.parametrize("drop", [-1e-4, -0.05, -0.2])
def test_solve_finds_the_strength(drop: float) -> None:
    found = solve(lambda strength: -math.log1p(strength**1.5), drop, 10.0)
    assert -math.log1p(found**1.5) == pytest.approx(drop, rel=0.021)
    assert solve(lambda strength: -1e-6 * strength, drop, 10.0) == 10.0  # not within reach
    assert solve(lambda strength: -strength, 0.0, 10.0) == 0.0


def test_a_forecast_counts_what_a_strength_leaves() -> None:
    # Symbols 1 1 −2 4 on Δ = 0.1. λ = 1 shrinks by 0.06: 0.04, 0.04, −0.14, 0.34 are 0 0 −1 3.
    forecast = Forecast(torch.tensor([0.1, 0.1, -0.2, 0.4]), torch.full((4,), 0.06), 0.1)
    assert forecast.bits(0.0) == forecast.bits(1.0) == pytest.approx(1.5)
    # λ = 3 shrinks by 0.18: 0 0 0 2.
    assert forecast.bits(3.0) == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)))
    assert forecast.log_drop(10.0) < -10
    assert forecast.largest == pytest.approx(0.1 / 0.06)


def test_a_sample_is_every_kth_weight() -> None:
    weights = [torch.arange(100_000.0).reshape(100, 1000), torch.arange(40_000.0).bfloat16()]
    first, second = sample_of(weights)
    assert first.tolist() == list(range(0, 100_000, 3))
    assert second.dtype == torch.float32
    assert len(second) == 13_334


def test_a_target_is_met_and_a_needless_one_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def train(target: float) -> Regularizer:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
        x = torch.randn(256, 16)
        y = torch.tanh(x @ torch.randn(16, 4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
        decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, 300)
        regularizer = BackSlash(target_bits=target, total_steps=300).attach(model, optimizer)
        for step in range(300):
            rows = slice(64 * (step % 4), 64 * (step % 4) + 64)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
            decay.step()
        return regularizer

    assert train(3.0).bits() == pytest.approx(3.0, rel=0.03)
    assert not caplog.records
    regularizer = train(9.0)
    assert len([note for note in regularizer.report.notes if "at λ = 0" in note]) == 1
    assert regularizer.strength == 0


@pytest.mark.parametrize(
    ("goal", "schedule"),
    [("target_bits", Schedule(tail=4)), ("target_bits", Schedule(ramp=1.0)), ("strength", Schedule(ramp=1.0, tail=5))],
)
def test_a_ramp_that_ends_ahead_of_the_tail_or_has_no_target_is_taken(goal: str, schedule: Schedule) -> None:
    assert RateSettings(**{goal: 1.0}, total_steps=10, schedule=schedule).schedule is schedule  # type: ignore[arg-type]
