"""The rate of a generalized Gaussian against quadrature and scipy, its gradients, and the smooth rate of training."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import gammaincc
from scipy.stats import gennorm, norm
from support.closeness import assert_rejects_corruption, assert_within

from ggpass.ggd import GGD, rate, rate_slope, smooth_bits, smooth_rate
from ggpass.ggd.cells import log_upper

LN2 = math.log(2)
SHAPES = [0.2, 0.5, 1.0, 1.36, 2.0, 8.0]


def bits_by_quadrature(x: float, model: GGD, step: float) -> float:
    """−log2 ∫_cell f with the largest value of the integrand taken out, so that nothing underflows.

    For ν < 1 over s = (t/α)^ν, dt = α s^(1/ν − 1)/ν ds, which has no cusp at 0.
    """
    shape, alpha = model.shape, model.scale
    low, high = (abs(x) - step / 2) / alpha, (abs(x) + step / 2) / alpha
    peak = max(low, 0.0) ** shape
    if shape >= 1 and peak > 0:  # behind 60 decay lengths nothing is left
        high = min(high, low + 60 * low / (shape * peak))
    parts = [(0.0, -low), (0.0, high)] if low < 0 else [(low, high)]
    if shape < 1:
        parts = [(start**shape, end**shape) for start, end in parts]

    def integrand(t: float) -> float:
        return math.exp(peak - t) * t ** (1 / shape - 1) / shape if shape < 1 else math.exp(peak - t**shape)

    area = sum(quad(integrand, *part, epsabs=0, epsrel=1e-10, limit=200)[0] for part in parts)
    constant = math.log(shape / 2) - math.lgamma(1 / shape)
    return (peak - constant - math.log(area)) / LN2


# Beyond s = 1e6 the rounding of the exponents shows in the integrand; the tolerance knows.
@pytest.mark.filterwarnings("ignore::scipy.integrate.IntegrationWarning")
@settings(max_examples=150, deadline=None)
@given(st.floats(0.2, 8), st.floats(-3, 1), st.floats(0, 40), st.sampled_from([1e-6, 1.0, 1e4]))
def test_rate_is_the_integral_over_the_cell(shape: float, log_step: float, place: float, alpha: float) -> None:
    model, step, x = GGD(shape, alpha), alpha * 10**log_step, alpha * place
    expected = bits_by_quadrature(x, model, step)
    # The quadrature's 1e-10; the ends' rounding, ε·x/Δ of the area; and ε of each power, once in peak and once in s.
    tolerance = 2e-10 + 1e-15 * (place / 10**log_step + abs(expected) * (1 + shape))
    got = rate(torch.tensor([x, -x], dtype=torch.float64), model, step)
    assert got[0].item() == pytest.approx(expected, abs=tolerance)
    assert got[1] == got[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_rate_agrees_with_differences_of_scipys_distribution(shape: float) -> None:
    model, reference = GGD(shape, 0.37, 0.05), gennorm(shape, loc=0.05, scale=0.37)
    x = torch.linspace(-1.1, 1.2, 47, dtype=torch.float64)
    x = x[reference.pdf(x.numpy()) > 1e-12]
    for step in (0.01, 0.3, 2.0):
        low, high = x.numpy() - step / 2, x.numpy() + step / 2
        share = np.where(low > 0.05, reference.sf(low) - reference.sf(high), reference.cdf(high) - reference.cdf(low))
        expected = torch.from_numpy(-np.log2(share))
        # A difference of shares below 1 has an absolute error of some ulps (gammainc is good to 32 of them).
        bound = 32 * 2.0**-52 / torch.from_numpy(share) / LN2 + 1e-13
        assert_within(rate(x, model, step), expected, bound)
        if shape < 8:  # there the bound is loose: it is 1e-3 of a share of 1e-11
            assert_rejects_corruption(rate(x, model, step), expected, bound)


@pytest.mark.parametrize("shape", SHAPES)
def test_probabilities_of_all_cells_sum_to_one(shape: float) -> None:
    for step in (0.05, 0.7, 5.0):
        end = gennorm(shape).isf(1e-14)
        count = math.ceil(end / step) + 1
        if count > 2_000_000:
            continue
        cells = torch.arange(-count, count + 1, dtype=torch.float64) * step
        total = torch.exp2(-rate(cells, GGD(shape, 1.0), step)).sum().item()
        assert total == pytest.approx(1, abs=1e-12)


def test_shape_two_is_the_gaussian_far_into_its_tail() -> None:
    x = torch.cat([torch.linspace(0, 30, 61), torch.tensor([100.0, 1e3, 1e5])]).double()
    for step in (0.01, 1.0, 4.0):
        low, high = norm.logsf(x.numpy() - step / 2), norm.logsf(x.numpy() + step / 2)
        expected = torch.from_numpy(-(low + np.log1p(-np.exp(high - low))) / LN2)
        # Where logsf(high) − logsf(low) is small, its rounding ε·|logsf| is amplified by its inverse.
        bound = torch.from_numpy(1e-14 * (1 + np.abs(low)) / -np.expm1(high - low)) + 1e-12
        assert_within(rate(x, GGD(2.0, math.sqrt(2)), step), expected, bound)


def test_the_continued_fraction_meets_the_incomplete_gamma_function() -> None:
    for order in (0.1, 0.5, 1.0, 3.7, 10.0):
        s = torch.tensor([100.0, 199.9, 200.1, 300.0, 600.0], dtype=torch.float64)
        np.testing.assert_allclose(log_upper(order, s).numpy(), np.log(gammaincc(order, s.numpy())), rtol=1e-13)
    assert log_upper(2.0, torch.tensor([math.inf], dtype=torch.float64)).item() == -math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float64_and_returned_in_float32(dtype: torch.dtype) -> None:
    x = torch.linspace(-2, 2, 41).to(dtype)
    got = rate(x, GGD(1.36, 0.3), 2**-6)
    assert got.dtype == torch.float32
    assert torch.equal(got, rate(x.double(), GGD(1.36, 0.3), 2**-6).float())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", [0.01, 1.0, 3.0])
def test_gradient_of_the_rate(shape: float, step: float) -> None:
    model = GGD(shape, 0.7, 0.1)
    x = torch.tensor([-3.0, -0.43, 0.03, 0.1, 0.21, 0.9, 2.0], dtype=torch.float64, requires_grad=True)
    # No cell ends at μ: there f has a cusp, and a difference quotient of R is no derivative.
    assert torch.autograd.gradcheck(lambda x: rate(x, model, step), (x,), eps=1e-7, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_the_rate_is_finite_everywhere(shape: float) -> None:
    step = 0.25
    x = torch.tensor([0.0, step / 2, -step / 2, 1e-30, 50.0, -1e4], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(rate(x, GGD(shape, 1.0), step).sum(), x)
    assert slope[0] == 0
    assert bool(slope.isfinite().all())
    assert slope[4] > 0 > slope[5]


@pytest.mark.parametrize("shape", SHAPES)
def test_smooth_rate_is_the_rate_of_a_small_cell(shape: float) -> None:
    model, step = GGD(shape, 0.37, 0.05), 1e-5
    x = 0.05 + torch.tensor([-1.0, -0.3, -0.02, 0.02, 0.2, 0.9], dtype=torch.float64)
    # ln of a cell's mean is off by Δ²(s'² − s'')/24 with s' ≤ ν s/x.
    u = (x - 0.05).abs()
    first = shape * (u / 0.37) ** shape / u
    bound = step**2 * (first**2 + (abs(shape - 1) + 1) * first / u) / 12 + 1e-9
    assert_within(smooth_rate(x, model, step), rate(x, model, step), bound)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.2, 8), st.floats(0.01, 2), st.floats(1e-4, 0.5))
def test_slope_is_the_published_formula_and_the_gradient(shape: float, alpha: float, epsilon: float) -> None:
    x = torch.tensor([-1.5, -0.1, 0.0, 0.02, 0.7], dtype=torch.float64, requires_grad=True)
    expected = shape / (alpha**shape * LN2) * x.detach().sign() * (x.detach().abs() + epsilon) ** (shape - 1)
    bound = 1e-13 * expected.abs()
    assert_within(rate_slope(x.detach(), shape, alpha, epsilon), expected, bound)
    (gradient,) = torch.autograd.grad(smooth_bits(x, shape, alpha, 0.01, epsilon).sum(), x)
    assert_within(gradient, expected, bound)
    nu, scale = torch.tensor(shape, dtype=torch.float64), torch.tensor(alpha, dtype=torch.float64)
    assert_within(rate_slope(x.detach(), nu, scale, torch.tensor(epsilon, dtype=torch.float64)), expected, bound)
    of_tensors = smooth_bits(x, nu, scale, 0.01, epsilon)
    assert_within(
        of_tensors, smooth_bits(x, shape, alpha, 0.01, epsilon).detach(), 1e-12 * (1 + of_tensors.detach().abs())
    )


def test_shapes_one_and_two_are_l1_and_l2() -> None:
    x = torch.tensor([-2.0, 0.0, 0.5], dtype=torch.float64)
    assert torch.allclose(rate_slope(x, 1.0, 0.5), x.sign() / (0.5 * LN2), rtol=1e-14)
    assert torch.allclose(rate_slope(x, 2.0, 0.5), 2 * x / (0.25 * LN2), rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_slope_keeps_the_dtype_and_is_finite_at_zero(shape: float, dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -0.0, 0.05, -0.05], dtype=dtype)
    for nu, alpha in ((shape, 0.05), (torch.tensor(shape), torch.tensor(0.05))):
        slope = rate_slope(x, nu, alpha, 0.01)
        assert slope.dtype == dtype
        assert bool((slope[:2] == 0).all())
        wide = rate_slope(x.double(), shape, 0.05, 0.01)
        # A power in float32: ν·ε of the base's rounding and a few ulps more; then one rounding to the dtype.
        relative = (8 + 4 * shape) * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
        assert_within(slope, wide, relative * wide.abs())
    assert bool((rate_slope(x[:2], shape, 0.05) == 0).all())  # ε = 0 too


def test_large_shapes_and_small_scales_stay_in_float32() -> None:
    alpha = torch.tensor(1e-6)  # α^8 = 1e-48 is no float32
    got = rate_slope(torch.tensor([1e-6]), torch.tensor(8.0), alpha)
    assert got.item() == pytest.approx(8 / (1e-6 * LN2), rel=1e-5)


@pytest.mark.parametrize("step", [0.0, -1.0, math.nan, math.inf])
def test_a_step_that_is_none_is_refused(step: float) -> None:
    for call in (rate, smooth_rate):
        with pytest.raises(ValueError, match="step of a grid is a positive number, not"):
            call(torch.zeros(2), GGD(1.0, 1.0), step)
    with pytest.raises(ValueError, match="step of a grid is a positive number, not"):
        GGD(1.0, 1.0).quantized_entropy(step)
