"""The comparison helper itself: what it accepts, what it must reject, and that its bound holds."""

import math

import pytest
import torch

from support.closeness import assert_rejects_corruption, assert_within, dot_bound, store_bound


def linear_case(m: int, k: int, n: int) -> tuple[torch.Tensor, ...]:
    x, w = torch.randn(m, k), torch.randn(n, k)
    scale, bias = torch.rand(n) + 0.5, torch.randn(n)
    expected = x.double() @ w.double().T * scale.double() + bias.double()
    actual = x @ w.T * scale + bias
    return actual, expected, dot_bound(x, w, scale, bias)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (1, 17, 5), (3, 384, 31), (8, 4096, 64)])
def test_accepts_a_right_product_and_rejects_every_corruption(m: int, k: int, n: int) -> None:
    actual, expected, bound = linear_case(m, k, n)
    assert_within(actual, expected, bound)
    assert_rejects_corruption(actual, expected, bound)


def test_bound_holds_for_the_worst_order_and_is_not_far_from_it() -> None:
    # Onto 1, each term is just below half an ulp and vanishes: the error grows linearly, as γ_n says.
    k = 4096
    x = torch.ones(1, k)
    w = torch.full((1, k), 0.99 * 2.0**-24)
    w[0, 0] = 1.0
    total = torch.zeros(1)
    for term in (x * w)[0]:
        total = total + term
    expected = x.double() @ w.double().T
    bound = dot_bound(x, w)
    assert_within(total[:, None], expected, bound)
    error = (total.double() - expected).abs().item()
    assert error > 0.95 * bound.item()


def test_lanes_tighten_the_bound_as_the_path_shortens() -> None:
    x, w = torch.ones(1, 1024), torch.ones(1, 1024)
    ratio = dot_bound(x, w, lanes=32).item() / dot_bound(x, w).item()
    assert ratio == pytest.approx((1024 / 32 + 32 + 2) / (1024 + 3), rel=1e-3)


def test_store_bound_covers_a_bfloat16_output() -> None:
    actual, expected, bound = linear_case(4, 64, 16)
    stored = actual.bfloat16()
    with pytest.raises(AssertionError):
        assert_within(stored, expected, bound)
    assert_within(stored, expected, store_bound(expected, bound, torch.bfloat16))


def test_message_names_the_worst_element_and_its_ratio() -> None:
    expected = torch.zeros(3, 4, dtype=torch.float64)
    actual = expected.float()
    actual[1, 2], actual[2, 0] = 5.0, 2.0
    with pytest.raises(AssertionError, match=r"y\[1, 2\] = 5, .* 5 x the bound 1; 2 of 12"):
        assert_within(actual, expected, 1.0, name="y")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_never_pass(bad: float) -> None:
    expected = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_within(torch.tensor([0.0, bad]), expected, 1e30)


def test_zero_bound_asks_for_equality() -> None:
    expected = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert_within(expected.float(), expected, 0.0)
    with pytest.raises(AssertionError, match="inf x the bound 0"):
        assert_within(torch.tensor([1.0, 1e-30]), expected, 0.0)


def test_wrong_shape_and_wrong_reference_are_refused() -> None:
    expected = torch.zeros(2, 1, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"shape \(1, 2\), expected \(2, 1\)"):
        assert_within(torch.zeros(1, 2), expected, 1.0)
    with pytest.raises(TypeError, match="float64"):
        assert_within(torch.zeros(2, 1), expected.float(), 1.0)
    with pytest.raises(ValueError, match="negative"):
        assert_within(torch.zeros(2, 1), expected, -1.0)


def test_a_loose_bound_is_found_out() -> None:
    actual, expected, bound = linear_case(3, 64, 8)
    for loosened, accepted in ((bound + 0.02 * expected.abs().max(), "1.01"), (bound + 1e9, "1.01")):
        with pytest.raises(AssertionError, match=accepted):
            assert_rejects_corruption(actual, expected, loosened)
    # Constant along the last dimension: no bound can tell a roll, and the helper says so.
    constant = torch.ones(2, 3)
    with pytest.raises(AssertionError, match="rolled"):
        assert_rejects_corruption(constant, constant.double(), 1e-6)


def test_a_wrong_result_is_not_taken_for_a_corruptible_one() -> None:
    actual, expected, bound = linear_case(3, 64, 8)
    with pytest.raises(AssertionError, match="bound"):
        assert_rejects_corruption(actual * 1.01, expected, bound)
    with pytest.raises(ValueError, match="empty"):
        assert_rejects_corruption(actual[:0], expected[:0], 0.0)


def test_too_long_an_accumulation_has_no_bound() -> None:
    with pytest.raises(ValueError, match="shorten"):
        dot_bound(torch.ones(1, 4096), torch.ones(1, 4096), dtype=torch.float16)
