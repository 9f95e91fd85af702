"""The Regularizer beside an optimizer: resumed bit for bit, AMP, accumulation, tails, and tensors of every odd kind."""

import io
import logging
import math
from typing import Any

import pytest
import torch
from torch import nn

from ggpass.errors import InputError, WeightError
from ggpass.passes.backslash import BackSlash
from ggpass.training import Regularizer, Schedule

Trained = tuple[nn.Module, torch.optim.Optimizer, Regularizer]


def build(dtype: torch.dtype = torch.float32, **settings: Any) -> Trained:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    return model, optimizer, BackSlash(**settings).attach(model, optimizer)


def train(trained: Trained, first: int, last: int, accumulate: int = 1) -> None:
    model, optimizer, _ = trained
    dtype = next(model.parameters()).dtype
    for step in range(first, last):
        optimizer.zero_grad()
        for part in range(accumulate):
            x = torch.randn(8, 6, generator=torch.manual_seed(step if accumulate == 1 else 100 * step + part)).to(dtype)
            (model(x).square().mean() - model(x)[:, 0].mean()).div(accumulate).backward()
        optimizer.step()


def weights_of(trained: Trained) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trained[0].parameters()]


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "strength": {"strength": 0.01},
    "target": {"target_bits": 1.5, "total_steps": 24},
    "tail": {"target_bits": 1.5, "total_steps": 24, "schedule": Schedule(warm_up=2, tail=0.25)},
    "bfloat16": {"strength": 0.003, "dtype": torch.bfloat16},
    "coupled": {"strength": 0.01, "mode": "coupled"},
    "paper-coupled": {"strength": 1.0, "mode": "paper-coupled"},
    "paper-code": {"strength": 0.1, "mode": "paper-code"},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_killed_and_resumed_gives_the_same_weights(name: str) -> None:
    settings = {"refit_every": 4, **CONFIGURATIONS[name]}
    unbroken = build(**settings)
    train(unbroken, 0, 24)
    for kill in (1, 3, 4, 5, 8, 13, 18, 19, 23):
        first = build(**settings)
        train(first, 0, kill)
        stored = io.BytesIO()
        torch.save([part.state_dict() for part in first], stored)
        stored.seek(0)
        second = build(**settings)
        for part, state in zip(second, torch.load(stored, weights_only=True)):
            part.load_state_dict(state)
        train(second, kill, 24)
        for a, b in zip(weights_of(unbroken), weights_of(second)):
            assert torch.equal(a, b), f"killed after {kill} steps"
        assert second[2].status() == unbroken[2].status()


def test_the_state_of_other_settings_is_refused() -> None:
    state = build(strength=0.01)[2].state_dict()
    with pytest.raises(InputError, match="same model and settings"):
        build(target_bits=1.0)[2].load_state_dict(state)
    with pytest.raises(InputError, match="same model and settings"):
        build(strength=0.01, only="0")[2].load_state_dict(state)


def test_accumulated_batches_are_one_step() -> None:
    trained = build(strength=0.01)
    train(trained, 0, 5, accumulate=3)
    assert trained[2].steps == 5


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", ["proximal", "coupled"])
def test_steps_that_amp_skips_do_nothing(fused: bool, mode: str) -> None:
    def run(batches: list[float], scale: float) -> tuple[list[torch.Tensor], int]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=fused)
        regularizer = BackSlash(strength=0.05, mode=mode, refit_every=2).attach(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=1.0 - 1e-9, growth_interval=1000)
        for batch in batches:
            optimizer.zero_grad()
            scaler.scale(model(torch.full((2, 4), batch)).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        return [p.detach().clone() for p in model.parameters()], regularizer.steps

    clean, steps = run([0.5, 1.0, -0.5], 1024.0)
    broken, broken_steps = run([math.inf, 0.5, math.inf, 1.0, -0.5, math.inf], 1024.0)
    assert steps == broken_steps == 3
    unscaled, _ = run([0.5, 1.0, -0.5], 1.0)
    for a, b, c in zip(clean, broken, unscaled):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # the scale backed off by 1e-9 at each skipped step
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-7)


def test_zeros_stay_zero_in_the_tail() -> None:
    trained = build(strength=0.2, total_steps=20, schedule=Schedule(tail=8), refit_every=5)
    train(trained, 0, 12)
    zero = [p == 0 for p in trained[2].weights]
    assert sum(int(z.sum()) for z in zero) > 10
    before = weights_of(trained)
    train(trained, 12, 20)
    for z, p in zip(zero, trained[2].weights):
        assert bool((p[z] == 0).all())
    assert not all(torch.equal(a, b) for a, b in zip(before, weights_of(trained)))


class Odd(nn.Module):
    """Tied, frozen, empty, zero, unused, sparse and one-dimensional weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4, sparse=True)
        self.linear = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.linear.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(4, 4)
        self.zero = nn.Parameter(torch.zeros(4, 4))
        self.empty = nn.Parameter(torch.zeros(0, 4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.frozen(self.tied(self.linear(self.embedding(ids)))) + self.embedding(ids) @ self.zero
        return x.square().mean() + self.empty.sum()


def test_weights_of_every_odd_kind() -> None:
    torch.manual_seed(0)
    model = Odd()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = BackSlash(strength=0.05, refit_every=1).attach(model, optimizer)
    assert regularizer.names == ("zero", "empty", "embedding.weight", "linear.weight", "unused.weight")
    reasons = {skip.name: skip.reason for skip in regularizer.report.skips}
    assert "frozen" in reasons["frozen.weight"]
    assert reasons["linear.bias"].startswith("1-D (bias, norm)")
    kept = [model.frozen.weight.clone(), model.unused.weight.clone(), model.linear.bias.clone()]
    for step in range(4):
        optimizer.zero_grad()
        model(torch.tensor([step, 1])).backward()
        optimizer.step()
    assert torch.equal(model.frozen.weight, kept[0])
    assert torch.equal(model.unused.weight, kept[1]), "a weight without a gradient was stepped"
    assert bool((model.embedding.weight[9].abs() > 0).any())
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert regularizer.count == 16 + 0 + 40 + 16 + 16
    coupled = Odd()
    optimizer = torch.optim.SGD(coupled.parameters(), lr=0.1)
    BackSlash(strength=0.05, mode="coupled").attach(coupled, optimizer)
    coupled(torch.tensor([0, 1])).backward()
    with pytest.raises(InputError, match=r"embedding\.weight has a sparse gradient"):
        optimizer.step()


def test_nan_is_told_once_and_leaves_the_rest_alone(caplog: pytest.LogCaptureFixture) -> None:
    trained = build(target_bits=1.0, refit_every=1)
    train(trained, 0, 2)
    trained[0][0].weight.data[0, 0] = math.nan
    fit = trained[2].priors.as_tensor()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            trained[1].zero_grad()
            trained[0][2](torch.ones(1, 16)).sum().backward()
            trained[1].step()
    assert [r.message for r in caplog.records] == ["0.weight holds NaN or infinity: its rate is left as it was"]
    assert torch.equal(trained[2].priors.as_tensor()[0], fit[0])
    assert not torch.equal(trained[2].priors.as_tensor()[1], fit[1])
    assert math.isfinite(trained[2].strength)
    with pytest.raises(WeightError, match="no symbol"):
        trained[2].bits()


def test_a_closure_is_one_step() -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(3, 4)).square().mean()
        loss.backward()
        return loss

    with BackSlash(strength=0.01).attach(model, optimizer) as regularizer:
        optimizer.step(closure)
        assert regularizer.steps == 1
    optimizer.step(closure)
    assert regularizer.steps == 1, "detached"


def test_the_coupled_slope_joins_gradients_made_in_a_closure() -> None:
    results = []
    for in_closure in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        BackSlash(strength=0.1, mode="coupled").attach(model, optimizer)

        def closure(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> float:
            with torch.enable_grad():
                optimizer.zero_grad()
                loss = model(torch.ones(3, 4)).square().mean()
                loss.backward()
            return loss.item()

        for _ in range(3):
            if in_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        results.append(model.weight.detach().clone())
    assert torch.equal(*results)
    assert not torch.equal(results[0], torch.zeros_like(results[0]))


def test_each_weight_takes_the_rate_of_its_group() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    first, second = (layer.weight.detach().clone() for layer in model)
    optimizers = [torch.optim.SGD(model[0].parameters(), lr=0.01), torch.optim.SGD(model[1].parameters(), lr=0.03)]
    regularizer = BackSlash(strength=0.5, shape=1.0, scale=1 / math.log(2)).attach(model, *optimizers)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    for optimizer in optimizers:
        optimizer.step()
    assert regularizer.steps == 1
    for before, layer, threshold in ((first, model[0], 0.005), (second, model[1], 0.015)):
        expected = before.sign() * (before.abs() - threshold).clamp(min=0)
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=1e-7)


def test_attach_says_what_is_wrong() -> None:
    model, optimizer, regularizer = build(strength=0.1)
    with pytest.raises(InputError, match="attached already"):
        regularizer.attach(optimizer)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(InputError, match="none of the regularized weights"):
        BackSlash(strength=0.1).attach(model, other)
    with pytest.raises(InputError, match="torch optimizers"):
        BackSlash(strength=0.1).attach(model, "adam")  # type: ignore[arg-type]
    with pytest.raises(WeightError, match="nothing is left"):
        BackSlash(strength=0.1).attach(nn.LayerNorm(4), other)
