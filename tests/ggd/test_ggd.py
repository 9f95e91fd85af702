"""The generalized Gaussian against scipy.stats.gennorm, and its moment fit against samples of known shape."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import gennorm

from ggpass.errors import GgpassError, WeightError
from ggpass.ggd import GGD, SHAPE_RANGE, fit_moments, log_moment_ratio, shape_of_moment_ratio
from ggpass.ggd import blocks as ggd_blocks

SHAPES = [0.3, 0.5, 0.85, 1.0, 1.36, 1.74, 2.0, 4.0]


def quantiles(shape: float, scale: float, count: int) -> torch.Tensor:
    """A sample without sampling noise: the quantiles at (i + 1/2)/count."""
    return torch.from_numpy(gennorm(shape, scale=scale).ppf((np.arange(count) + 0.5) / count))


@pytest.mark.parametrize("shape", SHAPES)
def test_density_std_and_entropy_agree_with_scipy(shape: float) -> None:
    model, reference = GGD(shape, 0.37, -0.2), gennorm(shape, loc=-0.2, scale=0.37)
    x = torch.linspace(-3, 3, 301, dtype=torch.float64)
    np.testing.assert_allclose(model.density(x).numpy(), reference.pdf(x.numpy()), rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(model.log_density(x).numpy(), reference.logpdf(x.numpy()), rtol=1e-12, atol=1e-300)
    assert model.std == pytest.approx(reference.std(), rel=1e-12)
    assert model.entropy == pytest.approx(reference.entropy() / math.log(2), rel=1e-9)


def test_density_keeps_float64_and_widens_half() -> None:
    model = GGD(1.0, 1.0)
    for given_dtype, dtype in [(torch.float64, torch.float64), (torch.float32, torch.float32)] + [
        (half, torch.float32) for half in (torch.bfloat16, torch.float16)
    ]:
        assert model.density(torch.zeros(3, dtype=given_dtype)).dtype == dtype
    assert model.density(torch.zeros(1)).item() == pytest.approx(0.5)  # the Laplacian's peak, 1/(2α)


@pytest.mark.parametrize("wrong", [(0.0, 1.0, 0.0), (1.0, -1.0, 0.0), (math.nan, 1.0, 0.0), (1.0, math.inf, 0.0)])
def test_impossible_parameters_are_refused(wrong: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="positive number, not"):
        GGD(*wrong)
    with pytest.raises(ValueError, match=r"mean .* finite"):
        GGD(1.0, 1.0, math.nan)


def test_moment_ratio_has_its_known_values() -> None:
    assert math.exp(log_moment_ratio(2.0)) == pytest.approx(math.pi / 2, rel=1e-12)  # Gaussian
    assert math.exp(log_moment_ratio(1.0)) == pytest.approx(2.0, rel=1e-12)  # Laplacian
    assert math.exp(log_moment_ratio(200.0)) == pytest.approx(4 / 3, rel=1e-3)  # uniform


@given(st.floats(*SHAPE_RANGE))
def test_shape_of_moment_ratio_is_the_inverse(shape: float) -> None:
    # Near ν = 10 the ratio is flat (d ln ρ / d ν ≈ −2e-3), so rounding of lgamma moves ν by about 1e-12.
    assert shape_of_moment_ratio(math.exp(log_moment_ratio(shape))) == pytest.approx(shape, rel=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_fit_finds_shape_and_scale_of_quantiles(shape: float) -> None:
    # Cutting the tails off at 1/(2·200000) leaves out most mass of E[x²] where they are heaviest.
    fit = fit_moments(quantiles(shape, 0.05, 200_000))
    tolerance = 0.01 if shape < 0.5 else 1e-3
    assert fit.shape == pytest.approx(shape, rel=tolerance)
    assert fit.scale == pytest.approx(0.05, rel=3 * tolerance)
    assert fit.mean == 0.0


@pytest.mark.parametrize("shape", [0.5, 1.36, 2.0])
def test_fit_of_a_random_sample_lies_within_its_standard_error(shape: float) -> None:
    # Five standard errors by the delta method: Var(ν̂) = Var(ψ)/(n·(dρ/dν)²), ψ the influence of x on ρ.
    count = 200_000
    reference = gennorm(shape)
    x = reference.rvs(count, random_state=7)
    second, first = np.mean(x**2), np.mean(np.abs(x))
    ratio = second / first**2
    influence = (x**2 - second) / first**2 - 2 * ratio / first * (np.abs(x) - first)
    step = 1e-4
    slope = (math.exp(log_moment_ratio(shape + step)) - math.exp(log_moment_ratio(shape - step))) / (2 * step)
    error = np.std(influence) / abs(slope) / math.sqrt(count)
    assert abs(fit_moments(torch.from_numpy(x)).shape - shape) < 5 * error
    assert 5 * error < 0.05 * shape  # the test itself can tell


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fit_of_a_narrow_dtype_is_that_of_its_values_in_float64(dtype: torch.dtype) -> None:
    narrow = quantiles(1.3, 0.05, 100_000).to(dtype)
    assert fit_moments(narrow) == fit_moments(narrow.double())


def test_many_elements_do_not_lose_the_small_ones() -> None:
    # A float32 running sum of 2^25 times 1 stops at 2^24; bfloat16 stops at 256.
    weight = torch.ones(1, dtype=torch.bfloat16).expand(1 << 25)
    assert fit_moments(weight).std == pytest.approx(1.0, rel=1e-12)


def test_fit_ignores_strides_and_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.randn(6, 64, 33, dtype=torch.float64)
    views = [
        base[:, ::2],
        base.transpose(0, 2),
        base[1:5, :, 3:20].permute(2, 0, 1),
        base[:, :, 0],
        base[::3],
    ]
    expected = [fit_moments(view.clone(memory_format=torch.contiguous_format)) for view in views]
    monkeypatch.setattr(ggd_blocks, "CPU_BLOCK", 50)
    for view, want in zip(views, expected):
        assert not view.is_contiguous()
        got = fit_moments(view)
        assert (got.shape, got.scale) == pytest.approx((want.shape, want.scale), rel=1e-12)
        assert sum(block.numel() for block in ggd_blocks.blocks(view)) == view.numel()


def test_a_parameter_and_a_scalar_can_be_fitted() -> None:
    parameter = torch.nn.Parameter(torch.randn(10, 10))
    assert fit_moments(parameter).std == pytest.approx(parameter.square().mean().sqrt().item(), rel=1e-6)
    assert fit_moments(torch.tensor(-3.0)).std == pytest.approx(3.0)


def test_shapes_beyond_the_range_are_clamped_and_keep_sigma() -> None:
    constant = torch.full((100,), -0.25)
    assert fit_moments(constant).shape == SHAPE_RANGE[1]
    assert fit_moments(constant).std == pytest.approx(0.25, rel=1e-12)
    spike = torch.zeros(10_000)
    spike[0] = 4.0
    assert fit_moments(spike).shape == SHAPE_RANGE[0]
    assert fit_moments(spike).std == pytest.approx(0.04, rel=1e-12)


@pytest.mark.parametrize("size", [1e-40, 1e-20, 1e30])
def test_extreme_magnitudes_keep_their_shape(size: float) -> None:
    sample = quantiles(1.0, 1.0, 20_000)
    scaled = (sample * size).float() if size > 1e-38 else sample * size
    assert fit_moments(scaled).shape == pytest.approx(fit_moments(sample).shape, rel=1e-5)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.empty(0, 4), "empty tensor; skip"),
        (torch.zeros(3, 4), "zeros only; skip"),
        (torch.tensor([1.0, math.nan]), "NaN.*repair or skip"),
        (torch.tensor([1.0, -math.inf]), "infinity.*repair or skip"),
        (torch.tensor([1e200], dtype=torch.float64), "beyond float64.*repair or skip"),
        (torch.ones(3, dtype=torch.int64), "not int64; skip"),
    ],
)
def test_what_has_no_fit_is_named_with_the_next_action(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(WeightError, match=message) as caught:
        fit_moments(weight)
    assert isinstance(caught.value, GgpassError)
