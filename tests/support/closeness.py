"""|actual − expected| ≤ bound, elementwise: comparisons whose tolerance is derived, never chosen.

A test computes `expected` in float64 by an independent route, derives `bound` from the length of the
accumulation (`dot_bound`), and asks twice: `assert_within` accepts the result, and
`assert_rejects_corruption` proves that the same bound would have caught a wrong one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def _unravel(index: int, shape: torch.Size) -> tuple[int, ...]:
    coordinates = []
    for size in reversed(shape):
        coordinates.append(index % size)
        index //= size
    return tuple(reversed(coordinates))


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float, name: str = "actual") -> None:
    """|actual[i] − expected[i]| ≤ bound[i] for every i; NaN never passes.

    Args:
        actual: what was computed, any floating dtype and device.
        expected: the same shape, float64: an independent reference.
        bound: a number, or a float64 tensor that broadcasts to that shape; nonnegative.
        name: what the message calls `actual`.

    Raises:
        AssertionError: names the worst element, its values and error/bound.
        TypeError: `expected` is not float64.
    """
    if expected.dtype != torch.float64:
        raise TypeError(f"expected must be float64 (an independent reference), not {expected.dtype}")
    if actual.shape != expected.shape:
        raise AssertionError(f"{name} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    got = actual.detach().cpu().double()
    want = expected.detach().cpu()
    limit = torch.as_tensor(bound, dtype=torch.float64).detach().cpu().expand(want.shape)
    if not bool((limit >= 0).all()):
        raise ValueError("the bound holds a negative number or NaN; derive it again")
    error = (got - want).abs()
    error[got == want] = 0.0  # equal infinities
    wrong = ~(error <= limit)
    if not bool(wrong.any()):
        return
    ratio = torch.where(error == 0, torch.zeros_like(error), error / limit)
    ratio = torch.where(torch.isnan(ratio), torch.full_like(ratio, torch.inf), ratio)
    worst = int(ratio.flatten().argmax())
    where = _unravel(worst, want.shape)
    raise AssertionError(
        f"{name}{list(where)} = {got[where].item():.9g}, expected {want[where].item():.9g}: "
        f"error {error[where].item():.3g} is {ratio[where].item():.3g} x the bound "
        f"{limit[where].item():.3g}; {int(wrong.sum())} of {wrong.numel()} elements exceed theirs"
    )


def _corruptions(actual: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "multiplied by 1.01", actual.double() * 1.01
    yield "zeroed", torch.zeros_like(actual)
    if actual.shape[-1:].numel() > 1:
        yield "rolled by one along the last dimension", actual.roll(1, dims=-1)
    if actual.dim() > 1 and sum(size > 1 for size in actual.shape) > 1:
        yield "transposed", actual.transpose(-1, -2).reshape(actual.shape)


def assert_rejects_corruption(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """assert_within fails on 1.01·actual, on 0, on a rolled and on a transposed actual: the bound can tell.

    Raises:
        AssertionError: `actual` itself is not within the bound, or a corrupted copy of it is.
        ValueError: `actual` is empty, so that nothing can be corrupted.
    """
    if actual.numel() == 0:
        raise ValueError("an empty result cannot be corrupted; compare its shape instead")
    assert_within(actual, expected, bound)
    for how, corrupted in _corruptions(actual):
        try:
            assert_within(corrupted, expected, bound)
        except AssertionError:
            continue
        raise AssertionError(f"the bound is too loose: it accepts the result {how}")


def dot_bound(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    lanes: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """bound = γ_n · (|x| @ |w|ᵀ · |scale| + |bias|) + underflow, with γ_n = n·u / (1 − n·u).

    Derivation (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1). With
    fl(a op b) = (a op b)(1 + δ), |δ| ≤ u, every product x_k·w_k in the computed ŷ carries one factor (1 + δ)
    for each rounding that it passes through, and n such factors make 1 + θ_n with |θ_n| ≤ γ_n (lemma 3.1).
    Hence |ŷ − y| ≤ γ_n · Σ_k |x_k·w_k·scale| whatever the order of the sum, n being the longest such path:

    1. one rounding for the product (none where it is fused into the addition);
    2. at most K − 1 additions in any order, since K terms have K − 1 additions in all. A kernel that keeps
       `lanes` independent partial sums has ⌈K/lanes⌉ − 1 in a lane and at most lanes − 1 to join them;
    3. one for the product with the scale, before or after the sum; the weight's value itself,
       codebook[code], is exact;
    4. one for the addition of the bias (which is then itself rounded once), and one in reserve for a bias or
       a scale that was folded beforehand. So n = ⌈K/lanes⌉ + lanes + 2, which is K + 3 for lanes = 1.

    A result that underflows, or is flushed to zero, is off by at most the smallest normal number of `dtype`
    in each of the 2K + 2 operations, those before the scale multiplied by it.

    For an output that is then stored in bfloat16 or float16, add `store_bound`.

    Args:
        x: (..., K), the inputs exactly as the kernel reads them.
        w: (N, K), the weight values without their scale: codebook[codes].
        scale: (N,) or (1,), or None for 1.
        bias: (N,) or None.
        lanes: the number of independent partial sums that the kernel is known to keep; 1 holds for any order.
        dtype: the accumulator.

    Returns:
        (..., N) float64.
    """
    info = torch.finfo(dtype)
    terms = w.shape[-1]
    n = -(-terms // lanes) + lanes + 2
    nu = n * info.eps / 2  # u, the unit roundoff, is half of eps
    if nu >= 1:
        raise ValueError(f"{n} roundings in {dtype} have no bound; shorten the accumulation")
    gamma = nu / (1 - nu)
    factor = torch.ones(1, dtype=torch.float64) if scale is None else scale.detach().cpu().double().abs()
    magnitude = x.detach().cpu().double().abs() @ w.detach().cpu().double().abs().T * factor
    if bias is not None:
        magnitude = magnitude + bias.detach().cpu().double().abs()
    # The 1.0001 covers the float64 rounding of the reference and of this bound themselves (K · 2^-53 < 1e-4).
    return 1.0001 * gamma * magnitude + (2 * terms + 2) * info.tiny * (factor + 1)


def store_bound(expected: Tensor, bound: Tensor, dtype: torch.dtype) -> Tensor:
    """bound' = bound + u·(|expected| + bound) + tiny: one more rounding of the result, to `dtype`."""
    info = torch.finfo(dtype)
    return bound + info.eps / 2 * (expected.abs() + bound) + info.tiny
