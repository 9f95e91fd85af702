"""Maximum-likelihood fits against scipy.stats.gennorm and scipy.stats.t, and the comparison of rivals by AIC."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import gennorm, laplace, norm
from scipy.stats import t as student

from ggpass.errors import WeightError
from ggpass.ggd import GGD, SHAPE_RANGE, best_by_aic, fit_likelihood, fit_moments, fit_rivals, magnitudes
from ggpass.ggd.magnitudes import falling_root
from ggpass.ggd.rivals import FREEDOM_RANGE

SHAPES = [0.3, 0.5, 0.85, 1.0, 1.36, 2.0, 4.0, 8.0]


def sample(shape: float, count: int, mean: float = 0.0, seed: int = 0) -> torch.Tensor:
    return GGD(shape, 0.05, mean).sample(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def student_sample(freedom: float, count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(student(freedom, scale=0.05).rvs(count, random_state=seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_fit_is_scipys_maximum_about_zero(shape: float) -> None:
    x = sample(shape, 20_000)
    fit = fit_likelihood(x)
    nu, _, alpha = gennorm.fit(x.numpy(), shape, floc=0, scale=0.05)
    # Nelder-Mead stops at relative steps of 1e-4; our maximum is never below its.
    assert (fit.shape, fit.scale) == pytest.approx((nu, alpha), rel=1e-3)
    ours, theirs = gennorm.nnlf((fit.shape, 0, fit.scale), x.numpy()), gennorm.nnlf((nu, 0, alpha), x.numpy())
    assert ours <= theirs + 1e-9 * abs(theirs)
    for factor in (0.999, 1.001):  # and it is a maximum in either parameter
        assert gennorm.nnlf((factor * fit.shape, 0, fit.scale), x.numpy()) > ours
        assert gennorm.nnlf((fit.shape, 0, factor * fit.scale), x.numpy()) > ours


@pytest.mark.parametrize("shape", [0.6, 1.0, 1.36, 2.0, 4.0])
def test_fit_with_a_free_mean_is_no_worse_than_scipys(shape: float) -> None:
    x = sample(shape, 5000, mean=0.3, seed=1)
    fit = fit_likelihood(x, free_mean=True)
    theirs = gennorm.fit(x.numpy(), shape, loc=0.3, scale=0.05)
    ours = gennorm.nnlf((fit.shape, fit.mean, fit.scale), x.numpy())
    # For ν < 1 each element is a local maximum, and Nelder-Mead may meet a luckier one of them.
    assert ours <= gennorm.nnlf(theirs, x.numpy()) + (0.1 if shape < 1 else 1e-4)
    assert fit.mean == pytest.approx(0.3, abs=5 * fit.std / math.sqrt(len(x)))
    about_zero = fit_likelihood(x)
    assert ours < gennorm.nnlf((about_zero.shape, 0, about_zero.scale), x.numpy()) - 100


def test_fit_is_more_precise_than_moments_for_heavy_tails() -> None:
    errors = [
        (fit_moments(x).shape - 0.5, fit_likelihood(x).shape - 0.5) for x in (sample(0.5, 4000, 0, i) for i in range(8))
    ]
    moments, likelihood = (math.sqrt(sum(e[k] ** 2 for e in errors) / 8) for k in (0, 1))
    assert likelihood < moments


def test_a_thinned_search_ends_at_the_maximum_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    x = sample(1.36, 50_000).view(200, 250)
    whole, rivals = fit_likelihood(x), fit_rivals(x)
    monkeypatch.setattr(magnitudes, "SEARCH_ELEMENTS", 1000)
    thinned, again = fit_likelihood(x), fit_rivals(x)
    assert (thinned.shape, thinned.scale) == pytest.approx((whole.shape, whole.scale), rel=1e-8)
    assert fit_likelihood(x) == thinned  # always the same elements
    for one, other in zip(rivals, again):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-9)
        assert (one.shape or 0) == pytest.approx(other.shape or 0, rel=1e-4)


def test_thinning_is_in_step_with_no_column() -> None:
    x = torch.arange(64.0).repeat(4096, 1)  # 2^18 elements; every fourth one would see 16 columns only
    chosen = magnitudes.Magnitudes(x, 1.0, x.numel()).thinned().weight
    assert len(chosen) == magnitudes.SEARCH_ELEMENTS
    counts = torch.bincount(chosen.long(), minlength=64)
    assert counts.min() > 0.9 * len(chosen) / 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strides_and_narrow_dtypes_change_nothing(dtype: torch.dtype) -> None:
    x = sample(1.3, 6000).view(60, 100).to(dtype)
    before = x.clone()
    for fit in (fit_likelihood, fit_rivals):
        assert fit(x) == fit(x.double())
    turned = x.t()[::2]
    assert not turned.is_contiguous()
    plain = turned.clone(memory_format=torch.contiguous_format)
    assert fit_likelihood(turned).shape == pytest.approx(fit_likelihood(plain).shape, rel=1e-9)
    for one, other in zip(fit_rivals(turned), fit_rivals(plain)):  # summed in another order
        assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-9)
    wide = x.double()
    fit_rivals(wide)
    fit_likelihood(wide, free_mean=True)
    assert torch.equal(wide, before.double())  # the weight is left as it is


def test_shapes_beyond_the_range_are_clamped() -> None:
    assert fit_likelihood(torch.tensor([-0.25, 0.25] * 50)).shape == SHAPE_RANGE[1]
    assert fit_likelihood(sample(0.05, 3000)).shape == SHAPE_RANGE[0]
    assert fit_rivals(torch.rand(3000) - 0.5)[3].shape == pytest.approx(FREEDOM_RANGE[1])


def test_what_has_no_fit_is_named() -> None:
    for wrong in (torch.zeros(4), torch.empty(0), torch.tensor([1.0, math.nan])):
        for fit in (fit_likelihood, fit_rivals):
            with pytest.raises(WeightError, match="skip"):
                fit(wrong)
    with pytest.raises(WeightError, match="free mean cannot be fitted to equal values; fit about zero"):
        fit_likelihood(torch.full((9,), 0.5), free_mean=True)
    rivals = fit_rivals(sample(1.0, 100))
    with pytest.raises(WeightError, match="give what fit_rivals returns"):
        best_by_aic(rivals[:1])
    with pytest.raises(WeightError, match="give what fit_rivals returns"):
        best_by_aic((rivals[0], fit_rivals(sample(1.0, 101))[1]))


@pytest.mark.parametrize("freedom", [0.6, 1.5, 4.0, 12.0])
def test_student_is_scipys_maximum(freedom: float) -> None:
    x = student_sample(freedom, 20_000)
    fit = fit_rivals(x)[3]
    dof, _, scale = student.fit(x.numpy(), freedom, floc=0, scale=0.05)
    assert (fit.shape, fit.scale) == pytest.approx((dof, scale), rel=1e-3 * max(1, freedom))
    theirs = -student.nnlf((dof, 0, scale), x.numpy())
    assert fit.log_likelihood >= theirs - 1e-9 * abs(theirs)
    assert fit.log_likelihood == pytest.approx(-student.nnlf((fit.shape, 0, fit.scale), x.numpy()), rel=1e-9)


@pytest.mark.parametrize("shape", [0.5, 1.36, 2.0])
def test_likelihoods_are_scipys_at_the_fitted_parameters(shape: float) -> None:
    x = sample(shape, 5000)
    gaussian, laplacian, gg, t = fit_rivals(x)
    values = x.numpy()
    assert gg.shape is not None
    expected = [
        -norm.nnlf(norm.fit(values, floc=0), values),
        -laplace.nnlf(laplace.fit(values, floc=0), values),
        -gennorm.nnlf((gg.shape, 0, gg.scale), values),
        -student.nnlf((t.shape, 0, t.scale), values),
    ]
    for rival, want, k in zip((gaussian, laplacian, gg, t), expected, (1, 1, 2, 2)):
        assert rival.log_likelihood == pytest.approx(want, rel=1e-9)
        assert rival.log_density(x).sum().item() == pytest.approx(want, rel=1e-9)
        assert (rival.parameters, rival.aic) == (k, 2 * k - 2 * rival.log_likelihood)
    assert fit_likelihood(x).shape == pytest.approx(gg.shape, rel=1e-4)


def test_the_right_rival_wins_by_its_divergence() -> None:
    count = 100_000
    cases = {
        "GG": sample(1.4, count),
        "Student-t": student_sample(5.0, count),
        "Laplace": sample(1.0, count, seed=2),
        "Gaussian": sample(2.0, count, seed=2),
    }
    for name, x in cases.items():
        verdict = best_by_aic(fit_rivals(x))
        assert verdict.best.name == name
        assert verdict.second.aic > verdict.best.aic
        gain = verdict.best.log_likelihood - verdict.second.log_likelihood
        price = verdict.second.parameters - verdict.best.parameters
        assert verdict.margin == pytest.approx((gain + price) / (count * math.log(2)), rel=1e-9)
    assert best_by_aic(fit_rivals(cases["GG"])).margin > 1e-3


def test_exact_zeros_are_left_out_of_the_comparison() -> None:
    x = student_sample(5.0, 5000)
    pruned = torch.cat([x, torch.zeros(20_000, dtype=torch.float64)])
    for with_zeros, without in zip(fit_rivals(pruned), fit_rivals(x)):
        assert with_zeros.count == 5000
        assert with_zeros.log_likelihood == pytest.approx(without.log_likelihood, rel=1e-7)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.3, 6), st.sampled_from([1e-30, 1e-3, 1.0, 1e20]))
def test_fits_scale_with_the_weight(shape: float, size: float) -> None:
    x = sample(shape, 2000)
    fit, scaled = fit_likelihood(x), fit_likelihood(x * size)
    assert (scaled.shape, scaled.scale) == pytest.approx((fit.shape, fit.scale * size), rel=1e-6)
    for one, other in zip(fit_rivals(x), fit_rivals(x * size)):
        shift = len(x) * math.log(size)
        assert other.log_likelihood + shift == pytest.approx(one.log_likelihood, rel=1e-6, abs=1e-4)


def test_the_search_finds_roots_bounds_and_survives_flat_slopes() -> None:
    bounds = (0.1, 10.0)
    assert falling_root(lambda v: (math.log(3 / v), -1.0), 1.0, bounds, 1e-9) == pytest.approx(3, rel=1e-12)
    assert falling_root(lambda v: (math.log(3 / v), 0.0), 1.0, bounds, 1e-9) == pytest.approx(3, rel=1e-9)
    assert falling_root(lambda v: (math.log(3 / v), -1e-3), 1.0, bounds, 1e-9) == pytest.approx(3, rel=1e-9)
    assert falling_root(lambda v: (1.0, 0.0), 1.0, bounds, 1e-9) == 10.0
    assert falling_root(lambda v: (-1.0, -1.0), 1.0, bounds, 1e-9) == 0.1
    assert falling_root(lambda v: (np.cbrt(2 - v), -1e-9), 9.0, bounds, 1e-9) == pytest.approx(2, rel=1e-8)
