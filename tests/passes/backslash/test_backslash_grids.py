"""RateSettings(spread=...): a grid of its own for each weight, from its gradients; one grid where it is 0."""

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from ggpass.errors import InputError
from ggpass.file import Grid, pack, unpack
from ggpass.passes.backslash import BackSlash
from ggpass.passes.backslash.forecast import forecast
from ggpass.passes.backslash.grids import FOLLOW, Grids
from ggpass.passes.backslash.proximal import Slope
from ggpass.passes.backslash.settings import Mode
from ggpass.training import Regularizer, Schedule, entropy_bits, histogram

STEP = 2.0**-4
TOTAL = 20


def tensor_with_rms(rms: float, shape: tuple[int, ...] = (3, 4)) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return values * (rms / values.square().mean().sqrt())


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-8, 1e4), st.integers(1, 10**6)), min_size=1, max_size=5),
    st.floats(0, 1),
)
def test_steps_go_as_a_power_of_the_gradients_about_the_same_mean(tensors: list, spread: float) -> None:
    rms, counts = zip(*tensors)
    grids = Grids(counts, STEP, spread)
    grids.follow([tensor_with_rms(value) for value in rms])
    for value, step in zip(rms, grids.steps):
        # Δ_i·g_i^γ is one number for all.
        assert step * value**spread == pytest.approx(grids.steps[0] * rms[0] ** spread, rel=2**-22)
    mean = sum(n * math.log(step) for n, step in zip(counts, grids.steps)) / sum(counts)
    assert mean == pytest.approx(math.log(STEP), abs=2**-22)


def test_the_newest_gradients_count_by_their_share_and_those_that_tell_nothing_do_not() -> None:
    grids = Grids([12, 12, 12], STEP, 1.0)
    for bad in (None, torch.zeros(3, 4), torch.full((3, 4), math.nan)):
        grids.follow([bad, None, None])
    assert grids.steps == [STEP] * 3
    grids.follow([tensor_with_rms(1.0), tensor_with_rms(16.0), None])
    assert grids.steps == pytest.approx([4 * STEP, STEP / 4, STEP])  # the third has had none
    grids.follow([None, tensor_with_rms(1.0), None])
    assert grids.log_gradients[1] == pytest.approx((1 - FOLLOW) * math.log(16))
    again = Grids([12, 12, 12], STEP, 1.0)
    again.load_tensor(grids.as_tensor())
    assert again.steps == grids.steps


def build(spread: float, mode: Mode = "proximal") -> tuple[nn.Module, torch.optim.Optimizer, Regularizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    schedule = Schedule(on_grid=TOTAL // 2)
    strength = 0.01 if mode == "proximal" else 1e-5
    rate = BackSlash(
        strength=strength, mode=mode, step=STEP, spread=spread, total_steps=TOTAL, refit_every=3, schedule=schedule
    )
    return model, optimizer, rate.attach(model, optimizer)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        x = torch.randn(8, 6, generator=torch.manual_seed(step))
        (model(x).square().mean() - model(x)[:, 0].mean()).backward()
        optimizer.step()


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() > 1]


@pytest.mark.parametrize("mode", ["proximal", "coupled"])
def test_each_weight_ends_on_its_own_grid_which_stays_once_the_model_is_on_it(mode: Mode) -> None:
    model, optimizer, regularizer = build(0.7, mode)
    train(model, optimizer, 0, TOTAL // 2)
    steps = regularizer.grid_steps
    assert list(steps) == ["0.weight", "2.weight", "4.weight"]
    assert steps["4.weight"] < steps["0.weight"]  # the loss feels the head most
    train(model, optimizer, TOTAL // 2, TOTAL)
    assert regularizer.grid_steps == steps
    for name, step in steps.items():
        symbols = model.get_parameter(name).detach() / step
        assert (symbols - symbols.round()).abs().max() < 1e-4
        assert symbols.abs().max() >= 1
    assert regularizer.bits() == entropy_bits(matrices(model), list(steps.values()))


def test_a_file_holds_the_grids_and_gives_the_same_weights(tmp_path: Path) -> None:
    model, optimizer, regularizer = build(0.7)
    train(model, optimizer, 0, TOTAL)
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    report = pack(tmp_path / "plain.safetensors", tmp_path / "packed.safetensors", Grid(steps=regularizer.grid_steps))
    assert [t.kind for t in report.tensors if t.name.endswith("weight")] == ["grid"] * 3
    unpack(tmp_path / "packed.safetensors", tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_without_spread_there_is_one_step_and_nothing_new_in_the_state() -> None:
    model, optimizer, regularizer = build(0.0)
    train(model, optimizer, 0, TOTAL)
    assert set(regularizer.grid_steps.values()) == {STEP}
    assert "grids" not in regularizer.state_dict()


@pytest.mark.parametrize("shape", [1.0, 0.5])
def test_the_proximal_step_counts_in_steps_of_the_weights_own_grid(shape: float) -> None:
    """One step: θ ← soft(θ, lr·λ·Δ_i/Δ·ν/(α^ν ln 2)·(|θ| + Δ_i)^(ν−1)), the optimizer's own step being nothing."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    regularizer = BackSlash(strength=0.01, shape=shape, scale=1.0, step=STEP, spread=1.0).attach(model, optimizer)
    before = [p.detach().clone() for p in matrices(model)]
    for weight, rms in zip(matrices(model), (1e-9, 4e-9)):
        weight.grad = tensor_with_rms(rms, tuple(weight.shape)).float()
    optimizer.step()
    steps = list(regularizer.grid_steps.values())
    assert steps[0] == pytest.approx(4 * steps[1])
    for old, weight, step in zip(before, matrices(model), steps):
        threshold = 0.01 * step / STEP * shape / math.log(2) * (old.abs() + step) ** (shape - 1)
        expected = old.sign() * (old.abs() - threshold).clamp_min(0)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("killed_at", [7, 13])
def test_killed_and_resumed_gives_the_same_grids_and_weights(killed_at: int) -> None:
    whole, optimizer, regularizer = build(0.7)
    train(whole, optimizer, 0, TOTAL)
    first, optimizer, before = build(0.7)
    train(first, optimizer, 0, killed_at)
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), before.state_dict()))
    again, optimizer, after = build(0.7)
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    after.load_state_dict(saved[2])
    train(again, optimizer, killed_at, TOTAL)
    assert after.grid_steps == regularizer.grid_steps
    for one, other in zip(whole.parameters(), again.parameters()):
        assert torch.equal(one, other)


def test_a_target_is_met_in_symbols_of_all_grids() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rate = BackSlash(target_bits=1.0, step=STEP, spread=0.6, total_steps=300)
    regularizer: Regularizer = rate.attach(model, optimizer)
    for step in range(300):
        optimizer.zero_grad()
        x = torch.randn(32, 16, generator=torch.manual_seed(step))
        (model(x) - x[:, :4].sin()).square().mean().backward()
        optimizer.step()
    assert len(set(regularizer.grid_steps.values())) == 3
    assert regularizer.bits() == pytest.approx(1.0, rel=0.03)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.01, 2), min_size=1, max_size=4), st.integers(0, 99))
def test_entropy_with_a_table_each_is_the_mean_and_never_more_than_with_one(steps: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(5 + 7 * i, generator=generator) for i in range(len(steps))]
    each = sum(w.numel() * entropy_bits(w, step) for w, step in zip(weights, steps)) / sum(w.numel() for w in weights)
    assert entropy_bits(weights, steps, tables="each") == pytest.approx(each)
    assert each <= entropy_bits(weights, steps) + 1e-9
    symbols = torch.cat([(w / step).round() for w, step in zip(weights, steps)])
    values, counts = symbols.unique(return_counts=True)
    counted = histogram(weights, steps)
    assert counted.values.tolist() == values.tolist()
    assert counted.counts.tolist() == counts.tolist()


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_forecast_counts_each_weight_on_its_own_grid(strength: float) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(400, generator=generator), 5 * torch.randn(300, generator=generator)]
    thresholds, steps = (0.2, 0.9), (0.1, 0.7)
    slopes = [Slope(math.log(threshold), 1.0, 0.0) for threshold in thresholds]
    shrunk = [w.sign() * (w.abs() - strength * t).clamp_min(0) for w, t in zip(weights, thresholds)]
    # A symbol may fall on the other side of a rounding: one of 700 is 0.02 bits at most.
    assert forecast(weights, slopes, steps).bits(strength) == pytest.approx(entropy_bits(shrunk, steps), abs=0.02)


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(InputError, match="spread"):
        BackSlash(strength=1.0, spread=1.5)
    with pytest.raises(InputError, match="2 steps for 1 weights"):
        histogram([torch.ones(3)], [0.5, 0.5])
    with pytest.raises(InputError, match="positive number"):
        histogram([torch.ones(3)], [0.0])
