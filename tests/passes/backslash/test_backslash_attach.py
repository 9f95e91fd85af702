"""What attach, resuming and the end of a training tell where the rate would act otherwise than asked."""

import logging

import pytest
import torch
from torch import nn

from ggpass.passes.backslash import BackSlash
from ggpass.training import Regularizer, Schedule

STEP = 2.0**-3


def pair() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.02)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=torch.manual_seed(step))).square().mean().backward()
        optimizer.step()


def told(regularizer: Regularizer, caplog: pytest.LogCaptureFixture) -> str:
    """All warnings, which are the report's notes too."""
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == regularizer.report.notes
    return "\n".join(warnings)


def test_weights_that_no_optimizer_steps_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """They count in the bits, so that a target would crush the others."""
    model, _ = pair()
    regularizer = BackSlash(target_bits=2.0).attach(model, torch.optim.SGD(model[2].parameters(), lr=0.1))
    message = told(regularizer, caplog)
    assert "1 of 2 weights" in message
    assert "0.weight" in message
    assert "2.weight" not in message


def test_a_second_regularizer_of_the_same_weights_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = pair()
    first = BackSlash(strength=1e-3, only=("0.weight",)).attach(model, optimizer)
    other = BackSlash(strength=1e-3, only=("2.weight",)).attach(model, optimizer)
    assert not caplog.records, "each weight has one"
    other.detach()
    second = BackSlash(strength=1e-3).attach(model, optimizer)
    message = told(second, caplog)
    assert "0.weight" in message
    assert "2.weight" not in message
    caplog.clear()
    for regularizer in (first, second):
        regularizer.detach()
    BackSlash(strength=1e-3).attach(model, optimizer)
    assert not caplog.records


def test_steps_beyond_the_last_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = pair()
    regularizer = BackSlash(strength=1e-3, total_steps=5).attach(model, optimizer)
    train(model, optimizer, 5)
    assert not caplog.records
    train(model, optimizer, 3)
    assert told(regularizer, caplog).count("total_steps=5") == 1


@pytest.mark.parametrize(("steps", "off_grid"), [(0, False), (4, True), (7, False), (10, False)])
def test_an_end_ahead_of_the_grid_is_told(steps: int, off_grid: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = pair()
    schedule = Schedule(on_grid=4)
    with BackSlash(strength=1e-3, step=STEP, total_steps=10, schedule=schedule).attach(model, optimizer) as regularizer:
        train(model, optimizer, steps)
    assert ("on_grid" in told(regularizer, caplog)) == off_grid
    if steps:
        assert bool((model[0].weight / STEP % 1 != 0).any()) == off_grid


def test_a_resumed_training_takes_the_strength_that_it_is_given() -> None:
    model, optimizer = pair()
    with BackSlash(strength=1e-3).attach(model, optimizer) as regularizer:
        train(model, optimizer, 3)
    other = Regularizer(model, BackSlash(strength=5e-3))
    other.load_state_dict(regularizer.state_dict())
    assert (other.strength, other.steps) == (5e-3, 3)
