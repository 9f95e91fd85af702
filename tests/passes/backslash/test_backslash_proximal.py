"""The proximal step and the slope: float64 references, the published updates, and what becomes of odd tensors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.closeness import assert_rejects_corruption, assert_within
from torch import Tensor, nn

from ggpass.ggd import log_moment_ratio
from ggpass.passes.backslash import BackSlash, proximal
from ggpass.passes.backslash.proximal import Slope, add_slope_, shrink_, slope_of

EPS32 = torch.finfo(torch.float32).eps


def slope64(weight: Tensor, slope: Slope) -> Tensor:
    magnitude = weight.double().abs() + slope.epsilon
    return math.exp(slope.log_factor) * magnitude ** (slope.shape - 1)


def shrunk64(weight: Tensor, slope: Slope) -> Tensor:
    return weight.double().sign() * (weight.double().abs() - slope64(weight, slope)).clamp(min=0)


def slope_bound(weight: Tensor, slope: Slope) -> Tensor:
    # exp(ln τ + (ν−1)·ln(|θ|+ε)): five roundings of an exponent that is at most E in size (u each), then exp's own.
    exponent = abs(slope.log_factor) + abs(slope.shape - 1) * (weight.double().abs() + slope.epsilon).log().abs()
    return slope64(weight, slope) * EPS32 * (4 + 5 * exponent)


slopes = st.builds(
    Slope,
    log_factor=st.floats(-12, -3),
    shape=st.sampled_from([0.2, 0.5, 0.9, 1.0, 1.5, 2.0]),
    epsilon=st.sampled_from([2.0**-6, 1e-3, 0.3]),
)


@settings(max_examples=25, deadline=None)
@given(slopes, slopes, st.integers(0, 10**6))
def test_the_step_is_the_shrinkage_of_each_weight(first: Slope, second: Slope, seed: int) -> None:
    generator = torch.manual_seed(seed)
    one = 0.1 * torch.randn(40, 30, generator=generator)
    two = 0.1 * torch.randn(8, 3, 5, 5, generator=generator).to(memory_format=torch.channels_last)
    gaps = 0.1 * torch.randn(9, 12, generator=generator)
    one[0, :3] = 0.0
    all_gaps = gaps.clone()
    originals = [one.clone(), two.clone(), all_gaps[:, ::3]]
    weights = [one, two, gaps[:, ::3]]
    shrink_(weights, [first, second, first])
    for weight, original, slope in zip(weights, originals, [first, second, first]):
        expected, bound = shrunk64(original, slope), slope_bound(original, slope) + EPS32 * original.double().abs()
        assert_within(weight, expected, bound)
        assert bool((weight * original >= 0).all()), "a weight crossed zero"
        # Exact zeros wherever the threshold exceeds the weight by more than rounding.
        sure = slope64(original, slope) > original.double().abs() + bound
        assert bool((weight[sure] == 0).all())
    untouched = torch.ones_like(gaps, dtype=torch.bool)
    untouched[:, ::3] = False
    assert torch.equal(gaps[untouched], all_gaps[untouched])


def test_the_bound_can_tell() -> None:
    weight, slope = torch.linspace(0.05, 0.4, 12).reshape(3, 4), Slope(-4.0, 0.5, 0.01)
    expected, bound = shrunk64(weight, slope), slope_bound(weight, slope) + EPS32 * weight.double()
    shrink_([weight], [slope])
    assert_rejects_corruption(weight, expected, bound)


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
def test_exact_zeros_and_empty_tensors_stay(shape: float, epsilon: float) -> None:
    weight, empty, gradient = torch.zeros(2, 3), torch.zeros(0, 3), torch.full((2, 3), 0.25)
    slope = Slope(0.0, shape, epsilon)
    shrink_([weight, empty], [slope, slope])
    add_slope_([gradient], [weight], [slope])
    assert torch.equal(weight, torch.zeros(2, 3))
    assert torch.equal(gradient, torch.full((2, 3), 0.25))
    assert bool(torch.isfinite(slope_of(weight, slope)).all())


def test_no_slope_changes_nothing() -> None:
    weight = torch.randn(4, 4, generator=torch.manual_seed(0)).bfloat16()
    before = weight.clone()
    shrink_([weight], [Slope(-math.inf, 0.5, 0.1)])
    assert torch.equal(weight, before)


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [0.1 * torch.randn(50, 7, generator=torch.manual_seed(i)) for i in range(3)]
    slopes = [Slope(-5.0, 0.5, 0.01), Slope(-4.0, 1.0, 0.01), Slope(-6.0, 0.7, 0.01)]
    whole = [w.clone() for w in weights]
    shrink_(whole, slopes)
    monkeypatch.setattr(proximal, "CPU_BLOCK", 16)
    shrink_(weights, slopes)
    for a, b in zip(whole, weights):
        assert_within(a, b.double(), 8 * EPS32 * b.double().abs())  # vector and scalar exp may differ in the last bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_shrink_in_the_mean(dtype: torch.dtype) -> None:
    # τ = 2^-6 of the spacing: rounded to nearest, nothing would move.
    weight = torch.full((200, 300), 1.5, dtype=dtype)
    spacing = torch.finfo(dtype).eps
    threshold = spacing / 64
    steps = 32
    for step in range(steps):
        shrink_([weight], [Slope(math.log(threshold), 1.0, 0.0)], seed=step * 1009)
    moved = 1.5 - weight.double()
    # A sum of `steps` independent roundings, each of variance at most spacing²·p(1−p) with p = 1/64.
    deviation = spacing * math.sqrt(steps / 64 / weight.numel())
    assert moved.mean().item() == pytest.approx(steps * threshold, abs=5 * deviation)
    again = torch.full((200, 300), 1.5, dtype=dtype)
    for step in range(steps):
        shrink_([again], [Slope(math.log(threshold), 1.0, 0.0)], seed=step * 1009)
    assert torch.equal(again, weight)
    zero = torch.tensor([[0.0, 1e-3]], dtype=dtype)
    shrink_([zero], [Slope(math.log(0.01), 1.0, 0.0)])
    assert zero.tolist() == [[0.0, 0.0]]


def one_step(weight: Tensor, gradient: Tensor, lr: float = 0.0, **settings: object) -> tuple[Tensor, Tensor]:
    """The weight and its gradient after one step of SGD with the rate attached."""
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    model.weight.data.copy_(weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    BackSlash(**settings).attach(model, optimizer)  # type: ignore[arg-type]
    model.weight.grad = gradient.clone()
    optimizer.step()
    return model.weight.detach(), model.weight.grad


WEIGHT = torch.tensor([[0.5, -0.25, 0.0], [1.0, -2.0, 0.125]], dtype=torch.float64)
GRADIENT = torch.tensor([[0.1, 0.2, -0.3], [0.0, 0.4, -0.5]], dtype=torch.float64)


def fitted_shape(weight: Tensor) -> float:
    """ν by bisection of the moment ratio: independent of the table."""
    target, low, high = math.log(float(weight.square().mean() / weight.abs().mean() ** 2)), 0.1, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if log_moment_ratio(middle) > target else (low, middle)
    return low


def test_l1_is_a_fixed_laplacian() -> None:
    """θ ← soft(θ, lr·λ) with ν = 1, α = 1/ln 2: the thresholds are 0.1·2 = 0.2."""
    settings = {"strength": 2.0, "shape": 1.0, "scale": 1 / math.log(2), "epsilon": 0.0}
    weight, _ = one_step(WEIGHT, torch.zeros_like(WEIGHT), lr=0.1, **settings)
    expected = torch.tensor([[0.3, -0.05, 0.0], [0.8, -1.8, 0.0]], dtype=torch.float64)
    assert_within(weight, expected, 1e-12)


def test_l2_is_a_fixed_gaussian() -> None:
    """θ ← θ·(1 − lr·λ·2/(α² ln 2)) with ν = 2, ε = 0: here 1 − 0.01·0.5·2·… with α² = 1/ln 2 is 0.99."""
    settings = {"strength": 0.5, "shape": 2.0, "scale": 1 / math.sqrt(math.log(2)), "epsilon": 0.0}
    weight, _ = one_step(WEIGHT, torch.zeros_like(WEIGHT), lr=0.01, **settings)
    assert_within(weight, 0.99 * WEIGHT, 1e-12)


def test_true_bits_slope_of_the_fitted_tensor() -> None:
    """|θ| − lr·λ·ν/(α^ν ln 2)·(|θ| + Δ)^(ν−1), ν = min(fit, 1), α from ν and E[θ²]; after the optimizer's step."""
    after = WEIGHT - 0.01 * GRADIENT
    shape = min(fitted_shape(after), 1.0)
    scale = math.sqrt(float(after.square().mean())) * math.exp((math.lgamma(1 / shape) - math.lgamma(3 / shape)) / 2)
    slope = shape / (scale**shape * math.log(2)) * (after.abs() + 2**-6) ** (shape - 1)
    expected = after.sign() * (after.abs() - 0.01 * 0.5 * slope).clamp(min=0)
    weight, gradient = one_step(WEIGHT, GRADIENT, lr=0.01, strength=0.5)
    assert_within(weight, expected, 1e-6)  # the table's ν is within 1e-5
    assert_rejects_corruption(weight, expected, 1e-6)
    assert torch.equal(gradient, GRADIENT)


def test_coupled_adds_the_same_slope_to_the_gradient() -> None:
    shape = min(fitted_shape(WEIGHT), 0.8)
    scale = math.sqrt(float(WEIGHT.square().mean())) * math.exp((math.lgamma(1 / shape) - math.lgamma(3 / shape)) / 2)
    slope = shape / (scale**shape * math.log(2)) * (WEIGHT.abs() + 2**-6) ** (shape - 1)
    expected = GRADIENT + 0.5 * WEIGHT.sign() * slope
    weight, gradient = one_step(WEIGHT, GRADIENT, lr=0.01, strength=0.5, mode="coupled", shape_max=0.8)
    assert_within(gradient, expected, 1e-5)
    assert_rejects_corruption(gradient, expected, 1e-5)
    assert_within(weight, WEIGHT - 0.01 * expected, 1e-6)


def test_paper_coupled_is_algorithm_1() -> None:
    """g ← g + λ·ν/N·sign(θ)(|θ| + ε)^(ν−1), ν as fitted, N = 6, λ = 30."""
    shape = fitted_shape(WEIGHT)
    expected = GRADIENT + 30 * shape / 6 * WEIGHT.sign() * (WEIGHT.abs() + 1e-3) ** (shape - 1)
    _, gradient = one_step(WEIGHT, GRADIENT, strength=30.0, epsilon=1e-3, mode="paper-coupled")
    assert_within(gradient, expected, 1e-3)  # ν within 1e-5, times ln(ε), times slopes of up to 30
    assert_rejects_corruption(gradient, expected, 1e-3)


def test_paper_code_is_the_published_update() -> None:
    """θ ← θ − λ·ν/N·sign(θ)(|θ| + 1)^(ν−1) with λ = 2000 and N = 6, whatever the learning rate: θ may cross zero."""
    shape = fitted_shape(WEIGHT)
    expected = WEIGHT - 2000 * shape / 6 * WEIGHT.sign() * (WEIGHT.abs() + 1) ** (shape - 1)
    weight, _ = one_step(WEIGHT, torch.zeros_like(WEIGHT), lr=0.0, mode="paper-code")
    assert_within(weight, expected, 0.05)  # ν within 1e-5, times updates of up to 400·(1 + ln 3)
    assert_rejects_corruption(weight, expected, 0.05)
    assert weight[0, 0] < 0 < WEIGHT[0, 0]


def test_paper_modes_fit_one_shape_to_all_weights() -> None:
    model = nn.Sequential(nn.Linear(40, 30, bias=False), nn.Linear(30, 20, bias=False))
    nn.init.normal_(model[0].weight, std=3.0, generator=torch.manual_seed(0))
    nn.init.uniform_(model[1].weight, -0.1, 0.1, generator=torch.manual_seed(0))
    whole = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    regularizer = BackSlash(mode="paper-coupled", strength=1.0).attach(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert regularizer.priors.shapes == pytest.approx([fitted_shape(whole)] * 2, rel=1e-4)
    for index in (0, 1):
        assert regularizer.priors.log_slope(index) == pytest.approx(math.log(fitted_shape(whole) / 1800), abs=1e-4)


def test_a_step_that_would_diverge_is_bounded() -> None:
    """However large λ is, a weight of size σ moves by σ/4 at most."""
    weight = torch.randn(30, 40, generator=torch.manual_seed(0), dtype=torch.float64)
    after, _ = one_step(weight, torch.zeros_like(weight), lr=1.0, strength=1e9)
    deviation = float(weight.square().mean().sqrt())
    large = weight.abs() > deviation
    moved = (weight - after)[large].abs()
    assert float(moved.max()) <= 0.25 * deviation * (1 + 1e-6)
    assert float(moved.max()) >= 0.2 * deviation
