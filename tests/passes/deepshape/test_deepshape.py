"""DeepShape's remap: brute-force histogram specification, monotone and odd, rare values untouched, energy kept."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import gammaln
from scipy.stats import gennorm
from torch import Tensor, nn

import ggpass
from ggpass import FormatError, Program, WeightError
from ggpass.ggd import GGD, fit_moments
from ggpass.ggd.moments import Moments
from ggpass.ggd.quantile import quantile
from ggpass.passes import DeepShape

STEP = 2.0**-13


def sample(shape: float, size: tuple[int, ...], seed: int, std: float = 0.05) -> Tensor:
    unit = GGD(shape, 1.0)
    return GGD(shape, std / unit.std).sample(size, generator=torch.Generator().manual_seed(seed))


def fit_of(values: np.ndarray) -> tuple[float, float]:
    """The moment fit by another route: scipy's root finder on ln ρ(ν)."""
    first, second = np.abs(values).mean(), (values**2).mean()
    nu = brentq(
        lambda v: gammaln(1 / v) + gammaln(3 / v) - 2 * gammaln(2 / v) - np.log(second / first**2), 0.1, 10, xtol=1e-15
    )
    return nu, math.sqrt(second * math.exp(gammaln(1 / nu) - gammaln(3 / nu)))


def brute_force(w: np.ndarray, threshold: float, shape_ratio: float, scale_ratio: float, step: float) -> np.ndarray:
    """Histogram specification of one population, a weight at a time, before the grid; NaN where a weight stays."""
    cells = np.rint(w / step)
    nu, alpha = fit_of(cells * step)
    target = gennorm(shape_ratio * nu, scale=scale_ratio * alpha)
    below = (cells[:, None] > cells).sum(axis=1)
    inside = (cells[:, None] == cells).sum(axis=1)
    low, high = (target.ppf((below + rank) / len(w)) for rank in (0.5, inside - 0.5))
    return np.where(inside >= threshold, low + (high - low) * (w / step - cells + 0.5), np.nan)


def reshaped(weight: Tensor, **settings_: object) -> Tensor:
    model = nn.Linear(1, 1, bias=False)
    model.weight = nn.Parameter(weight.clone())
    DeepShape(**settings_).on_module(model)
    return model.weight.detach()


@pytest.mark.parametrize("shape", [0.4, 0.7, 1.0, 1.36, 2.0, 5.0])
def test_quantiles_of_rows_are_scipys(shape: float) -> None:
    p = torch.cat([torch.logspace(-9, -0.31, 60, dtype=torch.float64), torch.linspace(0.5, 0.999, 60).double()])
    got = quantile(torch.tensor(shape, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64), p)
    np.testing.assert_allclose(got.numpy(), gennorm.ppf(p.numpy(), shape, scale=0.3), rtol=1e-9, atol=1e-17)
    assert quantile(shape, 1.0, torch.tensor(0.5, dtype=torch.float64)) == 0.0


def test_fits_of_rows_are_those_of_each_row() -> None:
    rows = torch.stack([sample(nu, (4000,), seed) for seed, nu in enumerate((0.6, 1.0, 1.7, 4.0))]).double()
    found = Moments(rows.abs().mean(1), rows.square().mean(1), torch.full((4,), 4000.0).double())
    shape, scale = found.shape, found.scale(found.shape)
    for row, nu, alpha in zip(rows, shape.tolist(), scale.tolist()):
        one = fit_moments(row)
        assert (nu, alpha) == (pytest.approx(one.shape, rel=1e-11), pytest.approx(one.scale, rel=1e-11))


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10**6),
    st.floats(0.8, 3.0),
    st.integers(40, 300),
    st.sampled_from([0.0, 2.0, 3.0]),
    st.sampled_from([1 / 64, 1 / 256]),
    st.sampled_from([(0.8, 0.6), (0.5, 1.0), (1.2, 0.9)]),
)
def test_it_is_brute_force_specification(
    seed: int, shape: float, n: int, rare: float, step: float, ratios: tuple[float, float]
) -> None:
    weight = sample(shape, (n, 1), seed, std=0.3)
    values = weight.double().flatten().numpy()
    rounded = np.rint(values / step) * step
    assume(1.4 < (rounded**2).mean() / np.abs(rounded).mean() ** 2 < 3)  # ν between 0.6 and 6
    want = brute_force(values, rare, *ratios, step)
    got = reshaped(weight, step=step, rare=rare, shape_ratio=ratios[0], scale_ratio=ratios[1]).double().flatten()
    stays = np.isnan(want)
    assert np.array_equal(got.numpy()[stays], values[stays])
    on_grid = got.numpy()[~stays] / step
    # float32 holds these multiples of a power of two exactly; a value within 1e-7 of a cell's edge may go either way.
    assert np.array_equal(on_grid, np.rint(on_grid))
    assert (np.abs(on_grid - want[~stays] / step) <= 0.5 + 1e-7).all()


@pytest.mark.parametrize("mode", ["paper", "compensated"])
@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_the_map_is_monotone_and_odd(mode: str, granularity: str) -> None:
    half = sample(1.2, (700, 1), 3)
    weight = torch.cat([half, -half])
    new = reshaped(weight, mode=mode, granularity=granularity, rare=0)
    order = weight.flatten().argsort()
    assert bool((new.flatten()[order].diff() >= 0).all())
    # f of −w is 1 − f of w to float64's rounding, so that the two may round to cells one apart at an edge.
    assert (new[:700] + new[700:]).abs().max() <= STEP * 1.01
    assert ((new[:700] + new[700:]).abs() > STEP / 2).float().mean() < 0.01


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.9, 2.5))
def test_shape_and_scale_become_what_was_asked(seed: int, shape: float) -> None:
    weight = sample(shape, (400, 250), seed)
    fit = fit_moments(weight)
    after = fit_moments(reshaped(weight, rare=0))
    # The new weights are the target's n quantiles up to half a step: E[x²] lacks the tail beyond p = 1 − 1/2n, at most
    # 2x²/n with x < 20σ for ν' ≥ 0.7, and the grid adds Δ²/12. d ln ν/d ln ρ is below 5 in this range.
    moment = 2 * 20**2 / weight.numel() + STEP**2 / 12 / after.std**2
    assert after.shape == pytest.approx(0.8 * fit.shape, rel=5 * moment)
    assert after.scale == pytest.approx(0.6 * fit.scale, rel=5 * moment)
    kept = fit_moments(reshaped(weight, mode="compensated", rare=0))
    assert kept.shape == pytest.approx(0.8 * fit.shape, rel=5 * moment)


@pytest.mark.parametrize("granularity", ["model", "tensor", "channel"])
@pytest.mark.parametrize("rare", [0, 100])
def test_compensated_keeps_the_energy_of_what_moves(granularity: str, rare: float) -> None:
    model = nn.ModuleDict({"a": nn.Linear(300, 40, bias=False), "b": nn.Conv2d(8, 16, 3, bias=False)})
    with torch.no_grad():
        for seed, (layer, std) in enumerate(zip(model.values(), (0.05, 0.02))):
            layer.weight.copy_(sample(1.4, tuple(layer.weight.shape), seed, std))
    model.double()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    report = DeepShape(mode="compensated", granularity=granularity, rare=rare, step=2.0**-9).on_module(model)
    assert report.reshaped is not None
    assert len(report.reshaped.shaped) == 2
    for name, new in model.named_parameters():
        old, new = before[name].flatten(1), new.detach().flatten(1)
        dim = 1 if granularity == "channel" else None
        torch.testing.assert_close(new.square().sum(dim), old.square().sum(dim), rtol=1e-12, atol=0)
        assert not torch.equal(new, old)


def test_rare_values_keep_every_bit_and_the_others_move() -> None:
    weight = sample(1.4, (300, 300), 5)
    count = torch.unique((weight.double() / STEP).round(), return_inverse=True, return_counts=True)
    often = count[2][count[1]]
    for mode in ("paper", "compensated"):
        new = reshaped(weight, mode=mode, rare=60)
        stays = often < 60
        assert 0.05 < stays.float().mean() < 0.95
        assert torch.equal(new[stays], weight[stays])
        assert (new != weight)[~stays].float().mean() > 0.9
    # In a population of its own share, `rare` shrinks with it: a tensor that is half of the model needs half as many.
    model = nn.ModuleList([nn.Linear(300, 300, bias=False) for _ in range(2)])
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(weight)
    DeepShape(granularity="tensor", rare=120).on_module(model)
    assert torch.equal(model[0].weight.detach(), reshaped(weight, granularity="tensor", rare=60))


@pytest.mark.parametrize("mode", ["paper", "compensated"])
def test_each_channel_is_reshaped_as_a_tensor_of_its_own(mode: str) -> None:
    weight = torch.stack([sample(nu, (200,), i, 0.02 * (i + 1)) for i, nu in enumerate((0.9, 1.3, 2.0, 1.1))])
    whole = reshaped(weight, mode=mode, granularity="channel", rare=0)
    for row, alone in zip(whole, weight):
        assert torch.equal(row, reshaped(alone[None], mode=mode, granularity="tensor", rare=0)[0])


def test_what_it_made_it_leaves_alone_when_asked_for_the_same_density() -> None:
    once = reshaped(sample(1.5, (300, 300), 8), rare=0)
    again = reshaped(once, rare=0, shape_ratio=1.0, scale_ratio=1.0)
    # The fit of the quantiles is the target up to the moments' error, some 1e-3 (see above), at up to 10σ; equal
    # weights of a cell get its middle rank, half a step off at most, and the grid rounds once more.
    assert (again - once).abs().max() <= 1e-2 * once.std() + STEP
    assert ((again - once).abs() <= STEP).float().mean() > 0.999


def test_low_shapes_and_flat_channels_stay() -> None:
    weight = sample(1.4, (5, 400), 9)
    weight[1] = 0
    weight[2] *= 1e-3  # a deviation below four steps
    weight[3] = 1e-3
    weight[3, :4] = 2.0  # a few outliers: ν far below 0.5
    for mode in ("paper", "compensated"):
        new = reshaped(weight, mode=mode, granularity="channel", rare=0)
        assert torch.equal(new[1:4], weight[1:4])
        assert (new[[0, 4]] != weight[[0, 4]]).float().mean() > 0.9
        assert new.abs().max() <= weight.abs().max()


def test_settings_are_checked() -> None:
    wrong = [{"mode": "x"}, {"granularity": "row"}, {"shape_ratio": 0}, {"scale_ratio": -1}, {"step": math.inf}]
    for bad in [*wrong, {"rare": -1}, {"rare": math.nan}]:
        with pytest.raises(FormatError):
            DeepShape(**bad)


class Tied(nn.Module):
    """An embedding that is the output layer too, with a norm and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.mix = nn.Embedding(60, 40), nn.LayerNorm(40), nn.Linear(40, 40)
        self.head = nn.Linear(40, 60, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.norm(self.embed(ids))))


def test_tied_weights_once_in_a_module_and_in_a_program() -> None:
    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.arange(5)[None]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    program = Program.trace(model, (ids,)).copy()
    report = DeepShape(rare=0)(program)
    program.check()
    assert sorted(c.name.split()[0] for c in report.changes) == sorted({c.name.split()[0] for c in report.changes})
    assert len(report.changes) == 2
    assert {s.name for s in report.skips} == {"norm.weight", "norm.bias", "mix.bias"}
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())  # the source stays as it is
    parameters = {n: (p, id(p)) for n, p in model.named_parameters()}
    changed = DeepShape(rare=0).on_module(model)
    assert {c.name for c in changed.changes} == {"embed.weight = head.weight", "mix.weight"}
    assert all(id(model.get_parameter(n)) == key for n, (_, key) in parameters.items())
    assert all(p.requires_grad for p in model.parameters())
    assert not torch.equal(model.embed.weight, before["embed.weight"])
    with torch.no_grad():
        torch.testing.assert_close(program(ids), model(ids), rtol=1e-5, atol=1e-6)


def test_what_stays_is_reported_and_nan_changes_nothing() -> None:
    model = nn.ModuleDict({n: nn.Linear(64, 64) for n in ("good", "zero", "same", "small", "bf16", "left")})
    model["tiny"], model["long"] = nn.Linear(4, 4), nn.Embedding(3, 3)
    model["bf16"].bfloat16()
    with torch.no_grad():
        model["zero"].weight.zero_()
        model["same"].weight.fill_(0.25)
        model["small"].weight.mul_(1e-3)
    half = model["bf16"].weight.detach().clone()
    report = DeepShape(granularity="tensor", skip="left", rare=0).on_module(model)
    reasons = {s.name: s.reason for s in report.skips}
    assert reasons["zero.weight"] == "all of its weights are zero"
    assert reasons["same.weight"] == "all of its weights are equal"
    assert "below 4 steps" in reasons["small.weight"]
    assert reasons["tiny.weight"].startswith("has 16 weights, too few")
    assert reasons["left.weight"] == "matches skip='left'"
    assert reasons["good.bias"].startswith("1-D")
    assert {c.name for c in report.changes} == {"good.weight", "bf16.weight"}
    assert model["bf16"].weight.dtype == torch.bfloat16
    assert not torch.equal(model["bf16"].weight, half)
    assert "bits each" in report.notes[0]
    assert "rarer than" in DeepShape(only="good").on_module(model).skips[-1].reason
    with torch.no_grad():
        model["left"].weight[0, 0] = math.nan
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(WeightError, match=r"'left\.weight' holds NaN"):
        DeepShape().on_module(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n != "left.weight")
    with pytest.raises(WeightError, match="nothere"):
        DeepShape(skip="nothere").on_module(model)


def test_figures_are_those_of_the_weights() -> None:
    weight = sample(1.3, (200, 300), 12)
    model = nn.Linear(300, 200, bias=False)
    model.weight = nn.Parameter(weight.clone())
    done = DeepShape(rare=100).on_module(model).reshaped
    assert done is not None
    old, new = weight.double().numpy().ravel(), model.weight.detach().double().numpy().ravel()
    shaped = done.shaped[0]
    assert done.change == pytest.approx(((new - old) ** 2).sum() / (old**2).sum())
    # The best multiple of the old weights leaves this much of the change: numpy's least squares.
    rest = np.linalg.lstsq(old[:, None], new, rcond=None)[1][0] / (old**2).sum()
    assert done.change - done.change_of_scale == pytest.approx(rest)
    for values, bits in ((old, shaped.bits_before), (new, shaped.bits_after)):
        p = np.unique(np.rint(values / STEP), return_counts=True)[1] / len(values)
        assert bits == pytest.approx(-(p * np.log2(p)).sum())
    assert shaped.moved == (new != old).sum() or shaped.moved > 0.9 * (new != old).sum()
    assert (done.pooled_before, done.pooled_after) == (shaped.bits_before, shaped.bits_after)


def test_either_name_of_a_tied_weight_selects_it_in_a_program() -> None:
    model, ids = Tied().eval(), torch.arange(5)[None]
    for name in ("embed", "head", "head.weight"):
        program = Program.trace(model, (ids,)).copy()
        report = DeepShape(rare=0, skip=(name,))(program)
        assert [change.name for change in report.changes] == ["mix.weight"]
        assert f"matches skip={name!r}" in {skip.reason for skip in report.skips}
        lowered = ggpass.compile(model, (ids,), target="rf8-reference", passes=[DeepShape(rare=0, only=name)])
        assert "embed.weight = head.weight" in {c.name for part in lowered.report.flat() for c in part.changes}


def test_a_training_graph_is_reshaped_in_the_callers_own_parameters() -> None:
    model, ids = Tied(), torch.arange(5)[None]
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    DeepShape(rare=0, skip="mix")(Program(Program.trace(model, (ids,)).graph_module, model, training=True))
    for name, (parameter, value) in before.items():
        assert model.get_parameter(name) is parameter
        assert parameter.requires_grad
        assert torch.equal(parameter, value) == (name != "embed.weight")
