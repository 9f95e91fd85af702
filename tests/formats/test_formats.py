"""The 8-bit formats: every code, every threshold, every scale rule, against independent arithmetic."""

import copy
import math
import pickle
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise
from typing import Literal

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import gennorm
from torch import Tensor

from ggpass.errors import FormatError, GgpassError
from ggpass.formats import E4M3, FORMATS, INT8, RF8, Format, Scheme, get_format, quantize, register, scheme
from ggpass.formats.base import TABLE, decoder_of

ALL = list(FORMATS.values())
EVERY_CODE = torch.arange(256, dtype=torch.int32).to(torch.uint8)
FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def by_name(fmt: Format) -> str:
    return fmt.name


every_format = pytest.mark.parametrize("fmt", ALL, ids=by_name)


def magnitudes_of(fmt: Format) -> list[float]:
    """The distinct magnitudes that an encoder may emit, ascending."""
    return sorted(
        {abs(v) for c, v in enumerate(fmt.codebook.tolist()) if math.isfinite(v) and c not in fmt.never_emitted}
    )


def next_float(x: np.ndarray | np.floating | float, towards: float) -> np.ndarray:
    return np.nextafter(np.float32(x), np.float32(towards))


# Independent arithmetic: integers and fractions only, sharing nothing with the package.


def decode_rf8_bits(code: int) -> int:
    """The bfloat16 pattern of an RF8 code: s<<15 | ((e + 112)<<7) + T[r]; zero for e = 0 (SPEC)."""
    sign, e, r = code >> 7, (code >> 3) & 15, code & 7
    if e == 0:
        return 0
    offset = (-0x40, -0x20, -0x10, 0, 0x08, 0x10, 0x20, 0x40)[r]
    return sign << 15 | ((e + 112) << 7) + offset


def decode_e4m3_bits(code: int) -> Fraction | None:
    """(−1)^s · 2^(e − 7) · (1 + m/8), 2^−6 · m/8 at e = 0, no number at e = 15, m = 7."""
    sign, e, m = code >> 7, (code >> 3) & 15, code & 7
    if (e, m) == (15, 7):
        return None
    magnitude = Fraction(8 + m, 8) * Fraction(2) ** (e - 7) if e else Fraction(m, 8) * Fraction(2) ** -6
    return -magnitude if sign else magnitude


def round_log2(x: Fraction) -> int:
    """round(log2 x), exact: the k with 2^(k − 1/2) < x < 2^(k + 1/2), found from x²; no tie exists."""
    k = x.numerator.bit_length() - x.denominator.bit_length()
    while x * x > Fraction(2) ** (2 * k + 1):
        k += 1
    while x * x < Fraction(2) ** (2 * k - 1):
        k -= 1
    return k


def paper_value(weight: float) -> Fraction:
    """w ≈ ±2^e1 ± 2^e2, both exponents round(log2|·|), the second kept if e1 − e2 ≤ 4; then RF8's range."""
    w = Fraction(weight)
    if w == 0:
        return Fraction(0)
    e1 = round_log2(abs(w))
    power = Fraction(2) ** e1
    value = power
    residual = abs(w) - power
    if residual:
        e2 = round_log2(abs(residual))
        if e1 - e2 <= 4:
            value += Fraction(2) ** e2 if residual > 0 else -(Fraction(2) ** e2)
    if e1 + 15 < 1:
        return Fraction(0)
    value = min(value, Fraction(3, 2))
    return value if w > 0 else -value


def nearest_value(weight: float, fmt: Format) -> Fraction:
    """The emitted value nearest to the weight, the smaller magnitude of two that are equally near."""
    w = abs(Fraction(weight))
    best = min((Fraction(m) for m in magnitudes_of(fmt)), key=lambda m: (abs(w - m), m))
    return best if weight > 0 else -best


def nearest_values(weights: Tensor, fmt: Format) -> Tensor:
    """nearest_value for many weights: brute force over all magnitudes, in float64."""
    magnitudes = torch.tensor(magnitudes_of(fmt), dtype=torch.float64)
    # Beyond twice the largest magnitude float64 could not tell the distances apart, and the answer is plain.
    near = weights.double().abs().clamp(max=2 * magnitudes[-1].item())
    chosen = [(part[:, None] - magnitudes).abs().argmin(1) for part in near.split(1 << 13)]
    return magnitudes[torch.cat(chosen)] * weights.double().sign()  # argmin: the first, thus the smaller


# Codes and values.


def test_rf8_decodes_as_the_bit_level_decoder_on_every_code() -> None:
    patterns = torch.tensor([decode_rf8_bits(c) for c in range(256)], dtype=torch.int32).to(torch.int16)
    assert torch.equal(RF8.decode(EVERY_CODE), patterns.view(torch.bfloat16).float())
    assert RF8.codebook.abs().max().item() == RF8.amax == 1.5
    assert RF8.codebook[1:128].min().item() == 0.0
    assert magnitudes_of(RF8)[1] == 0.75 * 2.0**-14


def test_rf8_is_a_sum_of_two_powers_of_two_in_seven_values_an_octave() -> None:
    octave = [Fraction(v) for v in RF8.codebook.tolist() if 0.5 <= v < 1]
    assert sorted({2 * v for v in octave}) == [1, *(Fraction(n, 16) for n in (17, 18, 20, 24, 28, 30))]
    for value in RF8.codebook[:128].tolist():
        numerator = Fraction(value).numerator
        # One bit set, two, or a run (2^a − 2^b): a shift-add multiplier needs two shifts and one addition.
        assert numerator.bit_count() <= 2 or (numerator + (numerator & -numerator)).bit_count() == 1


def test_e4m3_decodes_as_the_equation_and_as_other_libraries() -> None:
    for code, value in enumerate(E4M3.codebook.tolist()):
        expected = decode_e4m3_bits(code)
        assert math.isnan(value) if expected is None else Fraction(value) == expected
    other = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(E4M3.codebook.numpy(), other)


def test_int8_decodes_as_signed_bytes_over_127() -> None:
    expected = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float64) / 127
    np.testing.assert_array_equal(INT8.decode(EVERY_CODE).numpy(), expected.astype(np.float32))


@every_format
def test_magnitude_codes_are_monotone(fmt: Format) -> None:
    positive = fmt.codebook[:128]
    positive = positive[torch.isfinite(positive)]
    steps = positive.diff()
    # RF8's (e, +1/2) and (e + 1, −1/4) are the same number, and e = 0 is all zero.
    assert (steps >= 0).all()
    assert (fmt is RF8) == bool((steps == 0).any())


def test_rf8_aliases_are_exactly_those_of_the_specification() -> None:
    aliases = {c: d for c, d in enumerate(RF8.canonical.tolist()) if c != d}
    zeros = {sign | r: 0 for sign in (0, 0x80) for r in range(8)}
    doubles = {sign | 8 * (e + 1): sign | 8 * e + 7 for sign in (0, 0x80) for e in range(1, 15)}
    zeros.pop(0)
    assert aliases == zeros | doubles
    assert len(set(RF8.canonical.tolist())) == 256 - 15 - 28


@every_format
def test_canonicalize_keeps_the_value_and_gives_the_lowest_code(fmt: Format) -> None:
    legal = EVERY_CODE[torch.isfinite(fmt.codebook)]
    canonical = fmt.canonicalize(legal)
    assert torch.equal(fmt.decode(canonical), fmt.decode(legal))
    assert (canonical <= legal).all()
    assert torch.equal(fmt.canonicalize(canonical), canonical)
    assert len(fmt.codebook[canonical.int()].unique()) == len(canonical.unique())


@pytest.mark.parametrize("nan_code", [0x7F, 0xFF])
def test_a_loader_refuses_codes_that_mean_no_number(nan_code: int) -> None:
    with pytest.raises(FormatError, match=r"e4m3 code that means no number.*corrupt"):
        E4M3.canonicalize(torch.tensor([[1, nan_code]], dtype=torch.uint8))


@every_format
def test_what_a_format_says_of_its_codes_is_so(fmt: Format) -> None:
    values = fmt.codebook.tolist()
    lowest = {v: c for c, v in reversed(list(enumerate(values)))}
    assert fmt.emitted.tolist() == [
        c for c, v in enumerate(values) if math.isfinite(v) and lowest[v] == c and c not in fmt.never_emitted
    ]
    assert fmt.amax == max(magnitudes_of(fmt))
    emitted = set(fmt.decode(fmt.emitted).tolist())
    assert emitted == {-value for value in emitted}


def test_never_emitted_are_those_of_each_specification() -> None:
    missing = {fmt.name: set(range(256)) - set(fmt.emitted.tolist()) for fmt in ALL}
    assert missing["int8"] == {0x80}
    assert missing["e4m3"] == {0x7F, 0x80, 0xFF}  # −0 is the alias of 0
    assert missing["e5m2"] == {0x80, *range(0x7C, 0x80), *range(0xFC, 0x100)}
    assert len(missing["rf8"]) == 15 + 28


@every_format
def test_kernels_may_assume_what_the_decoder_says(fmt: Format) -> None:
    assert decoder_of(fmt.codebook.clone()) == fmt.decoder
    assert decoder_of(fmt.codebook + 1) == TABLE
    if fmt.decoder.kind == "rf8":
        assert fmt.decoder.unit == 1
        patterns = torch.tensor([decode_rf8_bits(c) for c in range(256)], dtype=torch.int32).to(torch.int16)
        assert torch.equal(fmt.codebook, patterns.view(torch.bfloat16).float())
    if fmt.decoder.kind == "linear":
        exact = EVERY_CODE.view(torch.int8).double() * fmt.decoder.unit
        assert ((fmt.codebook - exact).abs() <= exact.abs() * 2.0**-23).all()


@every_format
def test_encoders_return_their_own_values_unchanged(fmt: Format) -> None:
    for rounding in fmt.roundings:
        assert torch.equal(fmt.encode(fmt.decode(fmt.emitted), rounding), fmt.emitted)


@every_format
@given(st.lists(FLOAT32, min_size=1, max_size=20))
@example([0.0, -0.0, 3.4028234663852886e38, -3.4028234663852886e38, 1e-45, -1e-45])
def test_only_canonical_legal_codes_are_emitted(fmt: Format, values: list[float]) -> None:
    x = torch.tensor(values)
    for rounding in fmt.roundings:
        codes = fmt.encode(x, rounding)
        assert torch.equal(fmt.canonicalize(codes), codes)
        assert fmt.decode(codes).abs().max() <= fmt.amax
        assert torch.isin(codes, fmt.emitted).all()
        assert torch.equal(fmt.encode(-x, rounding), fmt.encode((-x).clone(), rounding))
        assert torch.equal(fmt.decode(fmt.encode(-x, rounding)), -fmt.decode(codes))  # −0 == 0


# Nearest rounding.


@every_format
def test_nearest_at_every_midpoint_and_its_neighbours(fmt: Format) -> None:
    magnitudes = magnitudes_of(fmt)
    checked = 0
    for small, large in pairwise(magnitudes):
        middle = (Fraction(small) + Fraction(large)) / 2
        closest = np.float32(float(middle))
        for x in (closest, next_float(closest, 0), next_float(closest, np.inf)):
            expected = small if Fraction(float(x)) <= middle else large  # a tie goes to the smaller
            for sign in (1, -1):
                got = fmt.decode(fmt.encode(torch.tensor([sign * float(x)]))).item()
                assert got == sign * expected, (x, middle)
                checked += 1
    assert checked == 6 * (len(magnitudes) - 1)


@every_format
@given(FLOAT32)
def test_nearest_equals_brute_force_in_fractions(fmt: Format, value: float) -> None:
    got = fmt.decode(fmt.encode(torch.tensor([value])))
    assert Fraction(got.item()) == nearest_value(value, fmt)


@every_format
@given(st.floats(-2, 2, width=32), st.sampled_from([1.0, 1e-3, 100.0]))
def test_nearest_equals_brute_force_within_the_range(fmt: Format, value: float, factor: float) -> None:
    scaled = float(np.float32(value * factor))
    got = fmt.decode(fmt.encode(torch.tensor([scaled])))
    assert Fraction(got.item()) == nearest_value(scaled, fmt)


@every_format
def test_nearest_equals_brute_force_on_every_bfloat16(fmt: Format) -> None:
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[torch.isfinite(x)]
    assert len(x) == (1 << 16) - 2 * 128
    assert torch.equal(fmt.decode(fmt.encode(x)).double(), nearest_values(x, fmt))


def test_e4m3_differs_from_other_casts_only_on_ties() -> None:
    x = torch.cat(
        [torch.linspace(-448, 448, 100_001), torch.logspace(-12, 2.6, 100_000), -torch.logspace(-12, 0, 50_000)]
    )
    ours = E4M3.decode(E4M3.encode(x))
    torchs = x.to(torch.float8_e4m3fn).float()
    others = torch.from_numpy(x.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert torch.equal(torchs, others)
    different = ours != torchs
    tie = (x.double() - ours.double()).abs() == (x.double() - torchs.double()).abs()
    assert tie[different].all()
    assert (ours[different].abs() < torchs[different].abs()).all()
    assert different.sum() < 100


def test_int8_nearest_is_rounding_of_127_times_the_value() -> None:
    x = torch.rand(200_000, dtype=torch.float64).mul(2).sub(1).float()
    exact = x.double() * 127
    codes = INT8.encode(x).view(torch.int8).double()
    # The codebook is i/127 in float32, so that a decision point may move by half an ulp of 1: 127 · 2^−25.
    assert ((codes - exact).abs() <= 0.5 + 127 * 2.0**-24).all()
    assert codes.abs().max() <= 127


@every_format
def test_nearest_saturates(fmt: Format) -> None:
    x = torch.tensor([fmt.amax, 1.01 * fmt.amax, 1e30])
    assert fmt.decode(fmt.encode(torch.cat([x, -x]))).tolist() == [fmt.amax] * 3 + [-fmt.amax] * 3


# Paper rounding.


def paper_of(x: Tensor) -> list[Fraction]:
    return [Fraction(v) for v in RF8.decode(RF8.encode(x, "paper")).tolist()]


def test_paper_equals_the_equations_on_random_weights() -> None:
    x = torch.cat([torch.randn(20_000), torch.randn(20_000) * 0.02, torch.randn(10_000).exp2() * 2.0**-14])
    assert paper_of(x) == [paper_value(v) for v in x.tolist()]


def test_paper_equals_the_equations_around_every_threshold() -> None:
    edges = []
    for e in range(-16, 3):
        power = 2.0**e
        edges += [power, power * math.sqrt(0.5), power * math.sqrt(2)]
        edges += [power * (1 + sign * 2.0 ** -(j + 0.5)) for j in range(1, 7) for sign in (1, -1)]
        edges += [power * (1 + sign * 2.0**-j) for j in range(2, 7) for sign in (1, -1)]
    below = np.array(edges, dtype=np.float32)
    points = [below]
    for towards in (0, np.inf):
        step = below
        for _ in range(3):
            step = next_float(step, towards)
            points.append(step)
    x = torch.from_numpy(np.concatenate(points))
    x = torch.cat([x, -x])
    assert paper_of(x) == [paper_value(v) for v in x.tolist()]
    # The points do lie on both sides of the thresholds of the table.
    table = RF8.roundings["paper"].thresholds
    for threshold in table.tolist():
        assert (x == threshold).any()
        assert (x == float(next_float(threshold, np.inf))).any()


@given(FLOAT32)
@settings(max_examples=300)
@example(0.0)
@example(-0.0)
@example(1e-45)
@example(2.0**-126)
@example(1.5)
@example(3.4028234663852886e38)
def test_paper_equals_the_equations_anywhere(value: float) -> None:
    x = torch.tensor([value])
    expected = paper_value(value)
    assert paper_of(x) == [expected]
    # From e1 = 17 on, the equations' first power alone is beyond the range: saturated.
    if abs(value) > 4:
        assert abs(expected) == Fraction(3, 2)


def test_paper_and_nearest_disagree_where_the_paper_is_greedy() -> None:
    # 1.36 lies above the log-domain threshold 1 + 2^−1.5 = 1.354, below the midpoint 1.375.
    x = torch.tensor([1.36])
    assert RF8.decode(RF8.encode(x, "paper")).item() == 1.5
    assert RF8.decode(RF8.encode(x, "nearest")).item() == 1.25


def test_below_the_smallest_magnitude_the_two_encoders_differ_as_specified() -> None:
    smallest = 0.75 * 2.0**-14
    below_paper = float(np.float32(2.0**-14 * math.sqrt(0.5)))  # here round(log2) gives e = 0
    x = torch.tensor([smallest / 2, float(next_float(smallest / 2, 1)), below_paper * 0.999])
    assert RF8.decode(RF8.encode(x, "nearest")).tolist() == [0.0, smallest, smallest]
    assert RF8.decode(RF8.encode(x, "paper")).tolist() == [0.0, 0.0, 0.0]


# The figures of the specification.


def relative_error_of(fmt: Format, rounding: str) -> tuple[float, float]:
    """√∫ ((x̂ − x)/x)² dx/L over one octave of length L, and the largest relative error in it."""
    table = fmt.roundings[rounding]
    low, high = (2.0**-3, 2.0**-2) if fmt is RF8 else (2.0, 4.0)
    edges = [t for t in table.thresholds.double().tolist() if low < t < high]
    total = worst = 0.0
    for a, b in zip([low, *edges], [*edges, high]):
        value = fmt.decode(fmt.encode(torch.tensor([(a + b) / 2]), rounding)).item()
        total += quad(lambda x, value=value: ((value - x) / x) ** 2 / (high - low), a, b)[0]
        worst = max(worst, abs(value - a) / a, abs(value - b) / b)
    return math.sqrt(total), worst


@pytest.mark.parametrize(
    ("fmt", "rounding", "rms", "largest"),
    [(RF8, "paper", 0.0398, 0.108), (RF8, "nearest", 0.0378, 0.091), (E4M3, "nearest", 0.0255, 0.059)],
    ids=lambda x: getattr(x, "name", None),
)
def test_relative_errors_of_the_specification(fmt: Format, rounding: str, rms: float, largest: float) -> None:
    # Half a unit of the last digit that the specification prints.
    got_rms, got_largest = relative_error_of(fmt, rounding)
    assert got_rms == pytest.approx(rms, abs=0.00005)
    assert got_largest == pytest.approx(largest, abs=0.0005)


def sqnr(weight: Tensor, fmt: Format, how: Scheme | None = None) -> float:
    quantized = quantize(weight, fmt, how)
    rounded = fmt.decode(quantized.codes).double() * quantized.scale[:, None].double()
    return 10 * math.log10(weight.double().square().sum() / (weight.double() - rounded).square().sum())


def gg_weight(shape: float, rows: int = 256, columns: int = 2048, seed: int = 3) -> Tensor:
    return torch.from_numpy(gennorm(shape).rvs((rows, columns), random_state=seed)).float()


@pytest.mark.parametrize("shape", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize(("rounding", "expected"), [("nearest", 28.5), ("paper", 28.0)])
def test_rf8_keeps_its_sqnr_whatever_the_shape(shape: float, rounding: str, expected: float) -> None:
    # The figure is printed to 0.1 dB (± 0.05), and its place in the octave moves it by another 0.1 dB.
    assert sqnr(gg_weight(shape), RF8, Scheme(rounding=rounding)) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize(("shape", "e4m3", "int8"), [(0.5, 31.5, 33.5), (1.6, 31.5, 40.5)])
def test_sqnr_of_the_other_formats(shape: float, e4m3: float, int8: float) -> None:
    weight = gg_weight(shape, columns=384 if shape == 1.6 else 2048)
    # Printed to 0.5 dB; per channel 31.6 on bell shapes, 31.8 at ν = 0.5.
    assert sqnr(weight, E4M3) == pytest.approx(e4m3, abs=0.35)
    # INT8 follows the largest weight of each channel, so its figure depends on the model: ± 1.5 dB.
    assert sqnr(weight, INT8) == pytest.approx(int8, abs=1.5)


def test_flushing_touches_few_gaussian_weights() -> None:
    codes = quantize(gg_weight(2.0), RF8).codes
    assert 0 < (codes == 0).double().mean().item() < 0.0004  # about 0.02 %


# Scales.


def amax_edges(fmt: Format) -> list[float]:
    """amax · 2^k and its float32 neighbours, over the whole range of exponents that have a scale."""
    edges = []
    for k in (*range(-149, -120), -60, -3, -1, 0, 1, 5, 60, *range(110, 119)):
        edge = np.float32(min(math.ldexp(fmt.amax, k), 3e38))
        if edge > 0:
            edges += [float(edge), float(next_float(edge, 0)), float(next_float(edge, np.inf))]
    return [e for e in edges if 0 < e < 3e38]


@every_format
def test_power_of_two_scales_never_clip_and_waste_less_than_an_octave(fmt: Format) -> None:
    amax = torch.tensor(amax_edges(fmt))
    scale = scheme.scale_of(amax, fmt, Scheme(scale="pow2")).double()
    assert (torch.frexp(scale).mantissa == 0.5).all()
    assert (amax.double() <= fmt.amax * scale).all()
    tight = (amax.double() > fmt.amax * scale / 2) | (scale == 2.0**scheme.MIN_SCALE_EXPONENT)
    assert tight.all()


@every_format
@given(st.floats(min_value=2.0**-149, max_value=1.5 * 2.0**118, width=32))
def test_power_of_two_scales_hold_for_any_amax(fmt: Format, amax: float) -> None:
    scale = scheme.scale_of(torch.tensor([amax]), fmt, Scheme(scale="pow2")).item()
    assert Fraction(amax) <= Fraction(fmt.amax) * Fraction(scale)
    assert Fraction(amax) > Fraction(fmt.amax) * Fraction(scale) / 2 or scale == 2.0**-126


@every_format
@pytest.mark.parametrize("how", ["pow2", "real"])
def test_scales_of_zero_channels_are_one(fmt: Format, how: Literal["pow2", "real"]) -> None:
    weight = torch.tensor([[0.0, -0.0], [1.0, -3.0]])
    got = quantize(weight, fmt, Scheme(scale=how))
    assert got.scale[0].item() == 1.0
    assert got.codes[0].tolist() == [0, 0]


@every_format
@given(st.floats(min_value=2.0**-100, max_value=2.0**127, width=32))
def test_real_scales_put_the_largest_weight_on_the_largest_code(fmt: Format, amax: float) -> None:
    got = quantize(torch.tensor([[amax, -amax, amax / 3]]), fmt, Scheme(scale="real"))
    assert got.scale.item() == np.float32(amax / fmt.amax)
    assert fmt.decode(got.codes)[0, :2].tolist() == [fmt.amax, -fmt.amax]


def test_largest_weights_have_a_scale_or_a_clear_error() -> None:
    largest = torch.finfo(torch.float32).max
    weight = torch.tensor([[largest, -1.0]])
    got = quantize(weight, RF8, Scheme(scale="real"))
    assert (RF8.decode(got.codes).double() * got.scale.double())[0, 0].item() == pytest.approx(largest, rel=1e-6)
    with pytest.raises(FormatError, match=r"channel 0 of 1 .*no power-of-two scale.*scale='real'"):
        quantize(weight, RF8, Scheme(scale="pow2"))
    exactly = torch.tensor([[1.5 * 2.0**127]])
    assert quantize(exactly, RF8).scale.item() == 2.0**127


@every_format
@pytest.mark.parametrize(
    "how", [Scheme(granularity=g, scale=s) for g in ("channel", "tensor") for s in ("pow2", "real")]
)
def test_quantize_is_encode_of_the_scaled_weight(fmt: Format, how: Scheme) -> None:
    weight = torch.randn(7, 33) * torch.logspace(-3, 3, 7)[:, None]
    got = quantize(weight, fmt, how)
    amax = weight.abs().amax(1) if how.granularity == "channel" else weight.abs().max()[None]
    assert got.scale.shape == amax.shape
    assert got.codes.shape == weight.shape
    assert got.codes.dtype == torch.uint8
    ratio = amax.double() / fmt.amax
    expected = ratio.log2().ceil().exp2() if how.scale == "pow2" else ratio
    assert torch.equal(got.scale, expected.float())
    assert torch.equal(got.codes, fmt.encode(weight / got.scale[:, None]))


def test_defaults_are_those_of_the_specification() -> None:
    weight = torch.randn(4, 16)
    cases: list[tuple[Format, Literal["pow2", "real"]]] = [(RF8, "pow2"), (E4M3, "real"), (INT8, "real")]
    for fmt, scale in cases:
        default, named = quantize(weight, fmt), quantize(weight, fmt, Scheme("channel", scale, "nearest"))
        assert torch.equal(default.codes, named.codes)
        assert torch.equal(default.scale, named.scale)


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_dtype_gives_the_codes_of_its_float32_values(fmt: Format, dtype: torch.dtype) -> None:
    weight = torch.randn(9, 40).to(dtype)
    expected = quantize(weight.float(), fmt)
    got = quantize(weight, fmt)
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.scale, expected.scale)


@every_format
def test_real_scales_of_the_smallest_weights_stay_normal(fmt: Format) -> None:
    # A kernel that flushes subnormal numbers would otherwise multiply by zero.
    amax = torch.tensor([2.0**-149, 2.0**-127, 2.0**-126])
    scale = scheme.scale_of(amax, fmt, Scheme(scale="real"))
    assert (scale >= torch.finfo(torch.float32).tiny).all()
    got = quantize(amax[:, None], fmt, Scheme(scale="real"))
    assert (fmt.decode(got.codes).abs() <= fmt.amax).all()


@every_format
@pytest.mark.filterwarnings("error::UserWarning")  # torch warns where it must copy for a strided input
def test_strides_do_not_matter_and_the_weight_is_not_touched(fmt: Format) -> None:
    base = torch.randn(30, 44)
    for view in (base.T, base[::2, 1::3], base[3:4].expand(5, 44), base.T[::5]):
        assert not view.is_contiguous()
        before = view.clone()
        got, expected = quantize(view, fmt), quantize(view.contiguous(), fmt)
        assert torch.equal(got.codes, expected.codes)
        assert torch.equal(got.scale, expected.scale)
        assert torch.equal(view, before)


@every_format
@pytest.mark.parametrize("block", [1, 7, 33, 34, 66, 10_000])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_results_do_not_depend_on_the_block(
    fmt: Format, block: int, granularity: Literal["channel", "tensor"], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(11, 33) * torch.logspace(-2, 2, 11)[:, None]
    expected = quantize(weight, fmt, Scheme(granularity))
    monkeypatch.setattr(scheme, "BLOCK_ELEMENTS", block)
    assert len(scheme.row_blocks(*weight.shape)) == -(-11 // max(1, block // 33))
    got = quantize(weight, fmt, Scheme(granularity))
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.scale, expected.scale)


@every_format
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_weights(fmt: Format, granularity: Literal["channel", "tensor"], shape: tuple[int, int]) -> None:
    got = quantize(torch.empty(shape), fmt, Scheme(granularity))
    assert got.codes.shape == shape
    assert got.scale.shape == ((1,) if granularity == "tensor" else shape[:1])
    assert (got.scale == 1).all()


def test_codes_can_be_written_to_given_memory() -> None:
    weight = torch.randn(6, 10)
    out = torch.full((6, 10), 255, dtype=torch.uint8)
    got = quantize(weight, RF8, out=out)
    assert got.codes is out
    assert torch.equal(out, quantize(weight, RF8).codes)


# What is refused.


@every_format
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_refused_with_their_channel(fmt: Format, bad: float, dtype: torch.dtype) -> None:
    weight = torch.randn(5, 8, dtype=dtype)
    weight[3, 2] = bad
    granularities: list[Literal["channel", "tensor"]] = ["channel", "tensor"]
    for granularity in granularities:
        with pytest.raises(FormatError, match="NaN or infinity in channel 3 of 5; repair or skip") as caught:
            quantize(weight, fmt, Scheme(granularity))
        assert isinstance(caught.value, GgpassError)
    with pytest.raises(FormatError, match=f"{fmt.name} cannot encode NaN or infinity; repair"):
        fmt.encode(weight)


@pytest.mark.parametrize(
    ("weight", "named"),
    [
        (torch.ones(3, dtype=torch.float32), r"float32 of shape \(3,\)"),
        (torch.ones(2, 3, 4), r"float32 of shape \(2, 3, 4\)"),
        (torch.ones(2, 3, dtype=torch.int64), r"int64 of shape \(2, 3\)"),
    ],
)
def test_what_is_no_floating_matrix_is_refused(weight: Tensor, named: str) -> None:
    with pytest.raises(FormatError, match=named + ".*flatten"):
        quantize(weight, RF8)


def test_unknown_names_are_answered_with_the_list() -> None:
    with pytest.raises(FormatError, match=r"no format 'rf9'; choose one of rf8, e4m3, int8, e5m2"):
        get_format("rf9")
    with pytest.raises(FormatError, match=r"int8 has no rounding 'paper'; choose one of nearest"):
        INT8.encode(torch.zeros(1), "paper")
    with pytest.raises(FormatError, match=r"rf8 has no rounding 'up'; choose one of nearest, paper"):
        quantize(torch.ones(1, 1), RF8, Scheme(rounding="up"))
    with pytest.raises(FormatError, match=r"'channel' or 'tensor', not 'row'"):
        Scheme(granularity="row")  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=r"'pow2', 'real' or None .*, not 'log'"):
        Scheme(scale="log")  # type: ignore[arg-type]


@every_format
def test_a_format_is_one_constant_everywhere(fmt: Format) -> None:
    assert get_format(fmt.name) is fmt
    assert copy.deepcopy(fmt) is fmt
    assert pickle.loads(pickle.dumps(fmt)) is fmt


def test_a_name_is_registered_once_and_fits_a_target_string() -> None:
    twin = Format("rf8", RF8.codebook, "pow2")
    with pytest.raises(FormatError, match=r"'rf8' is taken or not made of letters and digits; give"):
        register(twin)
    with pytest.raises(FormatError, match=r"'r-8' is taken or not made"):
        register(Format("r-8", RF8.codebook, "pow2"))
    assert register(RF8) is FORMATS["rf8"] is RF8
    assert "r-8" not in FORMATS


def test_the_toy_format_is_known_to_the_tests_alone() -> None:
    code = "import ggpass.formats; print(*ggpass.formats.FORMATS)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["rf8", "e4m3", "int8"]
