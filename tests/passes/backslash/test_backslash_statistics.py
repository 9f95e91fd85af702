"""Moments, fits and histograms of many tensors at once, against scipy, numpy and one-at-a-time references."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaln
from support.closeness import assert_within
from torch import Tensor, nn

from ggpass.errors import InputError, WeightError
from ggpass.ggd import SHAPE_RANGE, fit_moments
from ggpass.ggd.moments import shape_of_ratio
from ggpass.passes.backslash.priors import Priors
from ggpass.passes.backslash.statistics import moments
from ggpass.training import RateSettings, entropy_bits, histogram


def log_ratio(shape: np.ndarray) -> np.ndarray:
    return gammaln(1 / shape) + gammaln(3 / shape) - 2 * gammaln(2 / shape)


def numpy_bits(weights: list[Tensor], step: float) -> float:
    symbols = np.concatenate([np.round(w.double().numpy().ravel() / step) for w in weights])
    _, counts = np.unique(symbols, return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())


def test_shapes_of_many_ratios_are_the_inverse_of_scipys() -> None:
    # Near ν = 10 the ratio is flat (d ln ρ / d ν ≈ −2e-3), so rounding of lgamma moves ν by about 1e-12.
    shape = np.exp(np.linspace(*np.log(SHAPE_RANGE), 3001))
    found = shape_of_ratio(torch.from_numpy(np.exp(log_ratio(shape))))
    assert_within(found.log(), torch.from_numpy(np.log(shape)), 1e-11)
    assert shape_of_ratio(torch.tensor([1.0, 1e9], dtype=torch.float64)).tolist() == list(SHAPE_RANGE[::-1])


@settings(max_examples=15, deadline=None)
@given(st.floats(0.3, 4.0), st.floats(1e-4, 10.0), st.integers(0, 10**6))
def test_fits_are_those_of_each_tensor_alone(shape: float, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sample = scale * rng.gamma(1 / shape, size=3000) ** (1 / shape) * rng.choice([-1, 1], 3000)
    weights = [torch.tensor(sample, dtype=torch.float32), torch.tensor(sample[:999].reshape(27, 37) * 3)]
    weights.append(weights[0].bfloat16())
    fits = Priors(3)
    assert fits.update(weights, RateSettings(strength=1.0, shape_max=10.0)) == []
    for index, weight in enumerate(weights):
        alone = fit_moments(weight)
        assert fits.shapes[index] == pytest.approx(alone.shape, rel=1e-12)
        assert fits.scales[index] == pytest.approx(alone.scale, rel=1e-12)
        assert fits.deviations[index] == pytest.approx(float(weight.double().square().mean().sqrt()), rel=1e-12)


def test_a_held_shape_keeps_the_deviation() -> None:
    uniform = torch.rand(4000, generator=torch.manual_seed(0)).sub_(0.5).reshape(40, 100)
    fits = Priors(1)
    fits.update([uniform], RateSettings(strength=1.0))
    second = uniform.double().square().mean()
    assert fits.shapes == [1.0]
    assert fits.scales[0] == pytest.approx(math.sqrt(float(second) / 2), rel=1e-6)  # Laplace: σ² = 2α²
    assert moments([uniform]).scale(torch.tensor(2.0, dtype=torch.float64)).item() == pytest.approx(
        math.sqrt(2 * float(second)), rel=1e-12
    )


def test_tensors_without_a_fit_keep_the_one_they_have() -> None:
    good, zero, empty = torch.ones(2, 3), torch.zeros(2, 2), torch.zeros(0, 3)
    fits = Priors(3)
    broken = torch.tensor([[1.0, math.nan]])
    assert fits.update([good, zero, empty], RateSettings(strength=1.0)) == []
    assert math.isnan(fits.scales[1])
    assert math.isnan(fits.scales[2])
    assert fits.log_slope(1) == -math.inf
    before = fits.as_tensor()
    assert fits.update([broken, zero, empty], RateSettings(strength=1.0)) == [0]
    assert fits.broken == {0}
    assert torch.equal(fits.as_tensor().nan_to_num(7.0), before.nan_to_num(7.0))
    assert fits.update([broken, zero, empty], RateSettings(strength=1.0)) == []  # told once
    assert fits.update([good, zero, empty], RateSettings(strength=1.0)) == []
    assert fits.broken == set()


def test_pooled_moments_are_those_of_one_tensor() -> None:
    first, second = (
        torch.randn(30, 5, generator=torch.manual_seed(0)),
        3 * torch.randn(7, generator=torch.manual_seed(1)),
    )
    whole = torch.cat([first.flatten(), second]).double()
    pooled = moments([first, torch.tensor([math.inf]), second, torch.zeros(0)]).pooled()
    assert pooled.first.item() == pytest.approx(whole.abs().mean().item(), rel=1e-6)
    assert pooled.second.item() == pytest.approx(whole.square().mean().item(), rel=1e-6)
    assert pooled.counts.item() == whole.numel()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2.0**-8, 2.0**-6, 0.3]), st.sampled_from([0.01, 1.0, 3000.0]))
def test_entropy_is_that_of_one_pooled_histogram(seed: int, step: float, size: float) -> None:
    generator = torch.manual_seed(seed)
    weights = [
        size * torch.randn(13, 7, generator=generator).double(),
        torch.randn(3, 4, 2, generator=generator).double().permute(2, 0, 1),
        torch.randn(6, 8, generator=generator).double()[:, ::2],
        torch.zeros(0, 3).double(),
    ]
    assert entropy_bits(weights, step) == pytest.approx(numpy_bits(weights, step), abs=1e-9)
    counted = histogram(weights, step)
    assert counted.total == 13 * 7 + 24 + 24
    symbols = np.concatenate([np.round(w.numpy().ravel() / step) for w in weights])
    assert counted.zeros == pytest.approx(float((symbols == 0).mean()))
    assert counted.values.tolist() == np.unique(symbols).astype(int).tolist()


def test_entropy_of_known_answers() -> None:
    assert entropy_bits(torch.tensor([0.0, 0.24, 0.26, 0.74, -0.26, -0.24, 1.0, 1.0]), 0.5) == pytest.approx(
        # symbols 0 0 1 1 −1 0 2 2
        -(3 / 8 * math.log2(3 / 8) + 2 * 2 / 8 * math.log2(2 / 8) + 1 / 8 * math.log2(1 / 8))
    )
    assert entropy_bits([], 0.5) == 0.0
    assert entropy_bits(torch.zeros(5), 0.5) == 0.0
    assert entropy_bits(nn.Parameter(torch.tensor([-1.0, 1.0], dtype=torch.bfloat16)), 0.5) == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e30])
def test_what_has_no_symbol_is_refused(bad: float) -> None:
    with pytest.raises(WeightError, match="no symbol on the grid"):
        entropy_bits(torch.tensor([0.5, bad]), 0.01)


@pytest.mark.parametrize("step", [0.0, -1.0, math.nan, math.inf])
def test_a_step_is_a_positive_number(step: float) -> None:
    with pytest.raises(InputError, match="positive number"):
        entropy_bits(torch.ones(3), step)
