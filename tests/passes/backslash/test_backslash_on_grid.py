"""Schedule(on_grid=...): the model runs on the grid, exact weights are stepped beside it, and both resume."""

import copy
import io

import pytest
import torch
from torch import nn

from ggpass.errors import InputError
from ggpass.passes.backslash import BackSlash
from ggpass.training import Regularizer, Schedule, entropy_bits

STEP = 2.0**-3
TOTAL = 24


def build(on_grid: int | float = 0.5, mode: str = "proximal", strength: float = 0.01) -> tuple:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    settings = BackSlash(
        strength=strength, mode=mode, step=STEP, total_steps=TOTAL, refit_every=4, schedule=Schedule(on_grid=on_grid)
    )
    return model, optimizer, settings.attach(model, optimizer)


def backward(model: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(8, 6, generator=torch.manual_seed(step))
    loss = model(x).square().mean() - model(x)[:, 0].mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def off_grid(weight: torch.Tensor) -> float:
    weight = weight.detach()
    return float((weight / STEP - (weight / STEP).round()).abs().max())


def test_weights_are_on_the_grid_from_the_span_on_and_not_before() -> None:
    model, optimizer, regularizer = build(on_grid=8)
    for step in range(TOTAL):
        train(model, optimizer, step, step + 1)
        on_it = max(off_grid(model[0].weight), off_grid(model[2].weight)) == 0
        assert on_it == (step + 1 >= TOTAL - 8), step
    assert off_grid(model[0].bias) > 1e-3  # biases are no weights of the rate
    assert regularizer.bits() == entropy_bits([model[0].weight, model[2].weight], STEP)


def test_the_gradient_at_rounded_weights_steps_the_exact_ones() -> None:
    """SGD by hand: θ ← θ − lr·∇D(Δ·round(θ/Δ)), without a rate."""
    torch.manual_seed(1)
    weight = nn.Parameter(torch.randn(5, 4))
    model = nn.Module()
    model.weight = weight  # type: ignore[assignment]
    optimizer = torch.optim.SGD([weight], lr=0.01)
    settings = BackSlash(strength=0.0, step=STEP, total_steps=20, schedule=Schedule(on_grid=20))
    settings.attach(model, optimizer)
    exact, rounded = weight.detach().clone(), weight.detach().clone()
    target = torch.randn(5, 4)
    for _ in range(20):
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
        exact = exact - 0.01 * 2 * (rounded - target)
        rounded = torch.round(exact / STEP) * STEP
        torch.testing.assert_close(weight.detach(), rounded, rtol=0, atol=0)
    # 20 steps of 2 % bring the weights toward the target, less than half a cell at a time.
    assert (exact - target).square().sum() < (torch.zeros_like(target) - target).square().sum()


@pytest.mark.parametrize("mode", ["proximal", "coupled"])
def test_killed_and_resumed_on_the_grid_gives_the_same_weights(mode: str) -> None:
    unbroken = build(mode=mode)
    train(unbroken[0], unbroken[1], 0, TOTAL)
    for kill in (5, 11, 12, 13, 16, 23):
        first = build(mode=mode)
        train(first[0], first[1], 0, kill)
        stored = io.BytesIO()
        torch.save([part.state_dict() for part in first], stored)
        stored.seek(0)
        second = build(mode=mode)
        for part, state in zip(second, torch.load(stored, weights_only=True)):
            part.load_state_dict(state)
        train(second[0], second[1], kill, TOTAL)
        for a, b in zip(unbroken[0].parameters(), second[0].parameters()):
            assert torch.equal(a, b), kill


def test_a_state_without_its_exact_weights_is_refused() -> None:
    first, second = build(), build()
    train(first[0], first[1], 0, 16)
    state = copy.deepcopy(first[2].state_dict())
    del state["exact_weights"]
    with pytest.raises(InputError, match=r"after 16 steps, and the state has no exact_weights.*put"):
        second[2].load_state_dict(state)
    assert second[2].steps == 0


def test_training_on_the_grid_does_better_there_than_rounding_at_the_end() -> None:
    def quality(on_grid: int | float) -> float:
        model, optimizer, _ = build(on_grid=on_grid, strength=0.0)
        for step in range(TOTAL):
            optimizer.zero_grad()
            backward(model, step % 4)
            optimizer.step()
        with torch.no_grad():
            for layer in (model[0], model[2]):
                layer.weight.copy_((layer.weight / STEP).round() * STEP)
        return sum(float(backward(model, step)) for step in range(4))

    assert quality(0.75) < quality(0)


def test_a_step_with_a_closure_takes_its_gradient_on_the_grid() -> None:
    model, optimizer, _ = build(on_grid=TOTAL)
    seen = []

    def closure(step: int) -> torch.Tensor:
        optimizer.zero_grad()
        seen.append(off_grid(model[0].weight))
        return backward(model, step)

    for step in range(4):
        optimizer.step(lambda step=step: closure(step))
    assert seen[0] > 0
    assert seen[1:] == [0, 0, 0]
    plain, its_optimizer, _ = build(on_grid=TOTAL)
    train(plain, its_optimizer, 0, 4)
    assert torch.equal(plain[0].weight, model[0].weight)


def test_a_skipped_step_leaves_both_as_they_are() -> None:
    model, optimizer, _ = build(on_grid=TOTAL)
    train(model, optimizer, 0, 3)
    before = model[0].weight.detach().clone()
    optimizer.zero_grad()
    backward(model, 3)
    optimizer.found_inf = torch.tensor(1.0)  # as GradScaler marks a fused optimizer
    for parameter in model.parameters():
        parameter.grad = None
    optimizer.step()
    assert torch.equal(before, model[0].weight)


def test_errors_name_what_is_missing() -> None:
    with pytest.raises(InputError, match=r"on_grid=0\.5 needs total_steps="):
        BackSlash(strength=1.0, schedule=Schedule(on_grid=0.5))
    with pytest.raises(InputError, match=r"on_grid=1\.5"):
        Schedule(on_grid=1.5)
    model, optimizer, regularizer = build()
    train(model, optimizer, 0, TOTAL)
    state = regularizer.state_dict()
    state["exact_weights"]["0.weight"] = torch.zeros(3, 3)
    with pytest.raises(InputError, match=r"exact weights of 0\.weight"):
        Regularizer(model, regularizer.settings).load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_others_write_on_the_grid_are_those_that_go_on(dtype: torch.dtype) -> None:
    """Loading weights between two steps of the span, as a return to the best checkpoint does: θ of before is gone."""
    model, optimizer, _ = build(on_grid=0.5)
    model.to(dtype)
    loaded = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for step in range(TOTAL - 4):
        optimizer.zero_grad()
        x = torch.randn(8, 6, generator=torch.manual_seed(step)).to(dtype)
        model(x).square().mean().backward()
        optimizer.step()
    model.load_state_dict(loaded)
    with torch.no_grad():
        model[2].weight[0] = 7 * STEP
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    rounded = (loaded["0.weight"].float() / STEP).round() * STEP
    torch.testing.assert_close(model[0].weight.detach().float(), rounded, rtol=0, atol=0)
    assert (model[2].weight[0] == 7 * STEP).all()


def test_weights_trained_while_detached_are_those_that_go_on() -> None:
    model, optimizer, regularizer = build(on_grid=0.5)
    train(model, optimizer, 0, TOTAL - 4)
    regularizer.detach()
    train(model, optimizer, TOTAL - 4, TOTAL + 40)
    trained = model[0].weight.detach().clone()
    regularizer.attach(optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert (model[0].weight - trained).abs().max() <= STEP / 2
