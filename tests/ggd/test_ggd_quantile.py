"""Distribution function, quantiles and the entropy on a grid, against scipy.stats.gennorm, sums and samples."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import gennorm

from ggpass.ggd import GGD, density

SHAPES = [0.2, 0.5, 1.0, 1.36, 2.0, 8.0]


@pytest.mark.parametrize("shape", SHAPES)
def test_cdf_agrees_with_scipy_in_both_tails(shape: float) -> None:
    model, reference = GGD(shape, 0.37, -0.2), gennorm(shape, loc=-0.2, scale=0.37)
    x = np.concatenate([np.linspace(-3, 3, 201), reference.ppf([1e-200, 1e-30]), [-0.2, -math.inf, math.inf]])
    # gammainc's relative error is some tens of ulps, here and in scipy.
    np.testing.assert_allclose(model.cdf(torch.from_numpy(x)).numpy(), reference.cdf(x), rtol=2e-13, atol=0)
    upper = model.cdf(2 * model.mean - torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(upper, reference.sf(x), rtol=2e-12, atol=0)  # x − μ is rounded twice on the way
    assert model.cdf(torch.tensor([-0.2], dtype=torch.float64)).item() == 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_quantiles_agree_with_scipy(shape: float) -> None:
    model, reference = GGD(shape, 0.37, -0.2), gennorm(shape, loc=-0.2, scale=0.37)
    p = np.concatenate([[1e-300, 1e-17, 0.25, 0.75, 0.5 - 1e-9, 0.5, 1 - 1e-12], np.linspace(0.001, 0.999, 97)])
    got = model.quantile(torch.from_numpy(p).reshape(2, -1)).numpy().ravel()
    np.testing.assert_allclose(got, reference.ppf(p), rtol=1e-12, atol=1e-16)
    assert model.quantile(torch.tensor([0.0, 1.0])).tolist() == [-math.inf, math.inf]
    assert bool(model.quantile(torch.tensor([-0.1, 1.1, math.nan])).isnan().all())


@settings(max_examples=60, deadline=None)
@given(st.floats(0.05, 30), st.lists(st.floats(1e-300, 1 - 1e-10), min_size=2, max_size=20))
def test_quantile_inverts_the_cdf_and_is_monotone(shape: float, values: list[float]) -> None:
    p = torch.tensor(sorted(values), dtype=torch.float64)
    x = GGD(shape, 1.0).quantile(p)
    assert bool((x.diff() >= 0).all())
    back = GGD(shape, 1.0).cdf(x)
    # ln F ≈ −s with s = x^ν ≤ 700. A rounding of x moves it by ν·s·ε; six more are made at s itself: the inverse, its
    # power 1/ν and back, twice exp(−s), and the subtraction from 1.
    np.testing.assert_allclose(back.numpy(), p.numpy(), rtol=2.3e-16 * 700 * (shape + 6))


def entropy_by_sum(model: GGD, step: float) -> float:
    reference = gennorm(model.shape, loc=model.mean, scale=model.scale)
    last = math.ceil((reference.isf(1e-18) - model.mean + abs(model.mean)) / step) + 2
    edges = (np.arange(-last, last + 1) + 0.5) * step
    low, high = edges[:-1], edges[1:]
    p = np.where(low > model.mean, reference.sf(low) - reference.sf(high), reference.cdf(high) - reference.cdf(low))
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


@pytest.mark.parametrize("mean", [0.0, 0.1, -7.03])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_entropy_is_that_of_the_cells(shape: float, mean: float) -> None:
    model = GGD(shape, 0.37, mean)
    for step in (0.01, 0.3, 1.0, 5.0):
        assert model.quantized_entropy(step) == pytest.approx(entropy_by_sum(model, step), abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_entropy_on_a_fine_grid_is_the_differential_one(shape: float) -> None:
    model = GGD(shape, 0.37)
    for step in (1e-5, 1e-9, 1e-30):
        assert model.quantized_entropy(step) == pytest.approx(model.entropy - math.log2(step), abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_entropy_falls_as_the_step_grows(shape: float) -> None:
    steps = [10**k for k in np.arange(-4, 3, 0.5)]
    bits = [GGD(shape, 0.37).quantized_entropy(step) for step in steps]
    assert all(later < earlier or earlier == 0 for earlier, later in pairwise(bits))
    assert bits[-1] >= 0


@pytest.mark.parametrize("shape", SHAPES)
def test_the_closed_tail_continues_the_sum(shape: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, step = GGD(shape, 1.0, 0.003), 0.01
    whole = model.quantized_entropy(step)
    monkeypatch.setattr(density, "MOST_CELLS", 100)
    # From x = α on, s' = ν s/x: the midpoint rule's Δ²s'²/24 (and as much for s''), where s·p still counts.
    assert model.quantized_entropy(step) == pytest.approx(whole, abs=step**2 * (1 + shape) ** 2 * 4)
    monkeypatch.setattr(density, "_tail_bits", lambda *_: torch.tensor(0.0))
    assert model.quantized_entropy(step) < whole - 0.01  # the test can tell


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_entropy_is_that_of_samples(shape: float) -> None:
    model, count = GGD(shape, 1.0), 200_000
    x = model.sample(count, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    step = 0.5 * model.std
    p = torch.unique((x / step).round(), return_counts=True)[1].double() / count
    empirical = -(p * p.log2()).sum().item()
    # Bias (K − 1)/(2n ln 2) (Miller 1955) and five standard errors of the mean of −log2 p.
    error = math.sqrt(((p * p.log2().square()).sum().item() - empirical**2) / count)
    biased = model.quantized_entropy(step) - (len(p) - 1) / (2 * count * math.log(2))
    assert abs(empirical - biased) < 5 * error
    assert 5 * error < 0.05
