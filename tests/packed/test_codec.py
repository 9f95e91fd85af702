"""The codec: round trips for every dtype and shape, sizes against the entropy, exp-Golomb lengths as the formula."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.coding import encode

from ggpass import FormatError
from ggpass.packed.codec import container, exp_golomb
from ggpass.packed.codec.decoder import Decoder, decode
from ggpass.packed.codec.model import fit, histogram, normalize
from ggpass.packed.codec.native import INTEGER_TYPES, crc32c
from ggpass.packed.codec.planes import merge_tasks, split_planes

DTYPES = [np.dtype(t) for t in INTEGER_TYPES]


def integers_of(dtype: np.dtype) -> st.SearchStrategy[int]:
    info = np.iinfo(dtype)
    anything = st.integers(int(info.min), int(info.max))
    return st.one_of(st.integers(max(int(info.min), -2), 2), anything)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.one_of(st.just(()), st.just((0,)), hnp.array_shapes(max_dims=3, max_side=40)))
    return draw(hnp.arrays(dtype, shape, elements=integers_of(dtype)))


@settings(max_examples=150, deadline=None)
@given(arrays())
def test_any_integers_come_back(symbols: np.ndarray) -> None:
    for method in ("auto", "raw"):
        coded = encode(symbols, method)
        for portable in (False, True):
            back = decode(coded, portable=portable)
            assert back.dtype == symbols.dtype
            np.testing.assert_array_equal(back, symbols.reshape(-1))


@settings(max_examples=60, deadline=None)
@given(arrays(), st.integers(0, 32), st.sampled_from(["signed", "ranked"]))
def test_exp_golomb_comes_back(symbols: np.ndarray, order: int, mapping: str) -> None:
    if symbols.dtype.itemsize == 8:
        symbols = symbols % (1 << 61)
    np.testing.assert_array_equal(
        decode(encode(symbols, "exp-golomb", order=order, mapping=mapping)), symbols.reshape(-1)
    )


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_symbols_to_two_to_the_31(dtype: type) -> None:
    """Rare symbols of any size are patches; the frequent ones keep their table."""
    symbols = np.round(np.random.default_rng(0).standard_normal(100_000)).astype(dtype)
    extremes = [-(2**31), 2**31 - 1, 2**31 - 2] + ([2**31, 2**31 + 1, -(2**40)] if dtype is np.int64 else [])
    symbols[:: 100_000 // len(extremes)][: len(extremes)] = extremes
    coded = encode(symbols)
    assert Decoder(coded).container.method == container.RANS
    np.testing.assert_array_equal(decode(coded), symbols)


def test_beyond_two_to_the_61_is_raw() -> None:
    symbols = np.array([2**63, 1, 2], dtype=np.uint64)
    np.testing.assert_array_equal(decode(encode(symbols)), symbols)
    with pytest.raises(FormatError, match="2\\^61"):
        encode(symbols, "rans")


def test_chunks_are_independent() -> None:
    """Any chunk decodes alone, in any order, on any thread; threads change no byte."""
    symbols = np.random.default_rng(1).integers(-40, 40, 600_000).astype(np.int16)
    coded = encode(symbols)
    assert coded == encode(symbols, threads=3)
    decoder = Decoder(coded)
    assert len(decoder) > 2
    for i in reversed(range(len(decoder))):
        where = decoder.symbols_of(i)
        out = np.empty(where.stop - where.start, np.int16)
        decoder.decode_chunk(i, out)
        np.testing.assert_array_equal(out, symbols[where])
    np.testing.assert_array_equal(decode(coded, threads=3), symbols)


def test_offsets_past_two_to_the_31() -> None:
    """Arithmetic on offsets is 64-bit: chunk 40,000 of an array of 10^10 symbols, without allocating it."""
    chunks, size = 40_001, 200_000
    index = np.zeros((chunks, 3), "<u4")
    index[:, 0] = size
    big = container.Container(
        container.RANS, np.dtype("u1"), 12, False, chunks * (1 << 18), 1 << 18, index[:0, 0].view("u1"), index,
        np.zeros(0, np.uint8), 0, 0,
    )  # fmt: skip
    assert int(big.starts[-1]) == chunks * size > 2**32
    assert big.symbols_of(40_000) == slice(40_000 << 18, 40_001 << 18)


def gg_symbols(rng: np.random.Generator, nu: float, sigma: float, n: int) -> np.ndarray:
    """Samples of a generalized Gaussian of deviation `sigma`, rounded to integers."""
    alpha = sigma * math.exp((math.lgamma(1 / nu) - math.lgamma(3 / nu)) / 2)
    return np.round(rng.choice([-1, 1], n) * alpha * rng.gamma(1 / nu, size=n) ** (1 / nu)).astype(np.int32)


@pytest.mark.parametrize("nu", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("bits", [0.05, 0.1, 0.3, 0.7, 1, 2, 4, 6, 7, 8])
def test_size_is_the_entropy(nu: float, bits: float) -> None:
    """bytes ≤ n·H/8 · 1.005 + 1024, H the zero-order entropy of the symbols themselves."""
    rng = np.random.default_rng(7)
    low, high = 1e-3, 1e3
    for _ in range(40):  # the deviation whose rounded samples have that entropy
        middle = math.sqrt(low * high)
        entropy = histogram(gg_symbols(np.random.default_rng(7), nu, middle, 50_000)).bits
        low, high = (middle, high) if entropy < bits else (low, middle)
    for n in (1000, 30_000, 500_000):
        symbols = gg_symbols(rng, nu, low, n)
        size, entropy = len(encode(symbols)), histogram(symbols).bits
        assert size <= n * entropy / 8 * 1.005 + 1024, f"{8 * size / n:.4f} bits for {entropy:.4f}, n = {n}"


def test_size_of_uniform_bytes_and_of_sparse_alphabets() -> None:
    rng = np.random.default_rng(3)
    for symbols in (
        rng.integers(0, 256, 400_000).astype(np.uint8),
        rng.choice(np.array([-(10**9), 7, 12345, 10**9]), 400_000, p=[0.1, 0.6, 0.2, 0.1]),
        (rng.random(1_000_000) < 0.0056).astype(np.uint8),
    ):
        limit = symbols.size * histogram(symbols).bits / 8 * 1.005 + 1024
        assert len(encode(symbols)) <= limit


@given(st.lists(st.integers(0, 2**62), max_size=50), st.integers(0, 32))
def test_exp_golomb_lengths_are_the_formula(values: list[int], order: int) -> None:
    """2·floor(log2(n / 2^k + 1)) + 1 + k, in exact integers: floor(log2(n + 2^k)) − k is the logarithm's floor."""
    numbers = np.array(values, dtype=np.uint64)
    expected = [2 * ((n + 2**order).bit_length() - 1 - order) + 1 + order for n in values]
    assert exp_golomb.lengths(numbers, order).tolist() == expected
    assert exp_golomb.total_bits(numbers, order) == sum(expected)
    coded = exp_golomb.encode(numbers, order)
    assert len(coded) == (sum(expected) + 7) // 8
    back, used = exp_golomb.decode(np.frombuffer(coded, np.uint8), len(values), order)
    assert back.tolist() == values
    assert used == len(coded)


def test_exp_golomb_code_words_are_the_published_ones() -> None:
    words = {0: "1", 1: "010", 2: "011", 3: "00100", 4: "00101", 5: "00110", 6: "00111", 7: "0001000"}
    bits = "".join(words.values())
    coded = exp_golomb.encode(np.arange(8, dtype=np.uint64), 0)
    assert "".join(f"{byte:08b}" for byte in coded)[: len(bits)] == bits
    assert exp_golomb.signed_map(np.array([0, 1, -1, 2, -2])).tolist() == [0, 1, 2, 3, 4]


def test_exp_golomb_order_is_the_best_of_all() -> None:
    rng = np.random.default_rng(5)
    for nu, sigma in ((0.7, 4.0), (1.0, 12.0), (1.5, 30.0), (2.0, 1.0)):
        numbers = exp_golomb.signed_map(gg_symbols(rng, nu, sigma, 100_000))
        best = min(exp_golomb.total_bits(numbers, k) for k in range(12))
        assert exp_golomb.total_bits(numbers, exp_golomb.best_order(numbers)) == best


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=200), st.sampled_from([12, 14]))
def test_normalized_frequencies(counts: list[int], bits: int) -> None:
    frequencies = normalize(np.array(counts), 1 << bits)
    assert frequencies.min() >= 1
    assert frequencies.sum() == 1 << bits


def test_rans_is_what_its_docstring_says() -> None:
    """An independent decoder of a dozen lines, straight from the equations in native/codec_rans.h."""
    symbols = np.random.default_rng(2).geometric(0.3, 1000).astype(np.uint8)
    decoder = Decoder(encode(symbols, "rans"))
    model = fit(histogram(symbols))
    slots = np.repeat(np.arange(len(model.values)), model.frequencies)
    start = [0, *np.cumsum(model.frequencies).tolist()]
    code = bytes(decoder.container.code_of(0)[0])
    x = [int.from_bytes(code[4 * i : 4 * i + 4], "little") for i in range(32)]
    at, out = 128, []
    for i in range(symbols.size):
        slot = x[i % 32] % (1 << model.bits)
        s = int(slots[slot])
        x[i % 32] = int(model.frequencies[s]) * (x[i % 32] >> model.bits) + slot - start[s]
        if x[i % 32] < 1 << 16:
            x[i % 32] = x[i % 32] << 16 | int.from_bytes(code[at : at + 2], "little")
            at += 2
        out.append(int(model.values[s]))
    stand_in = int(model.values[model.mode])  # where a patch goes
    assert out == [s if s in model.values else stand_in for s in symbols.tolist()]
    assert at == len(code)
    assert x == [1 << 16] * 32


def test_checksum_is_crc32c() -> None:
    """RFC 3720, B.4."""
    for data, crc in ((b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43)):
        for portable in (False, True):
            assert crc32c(np.frombuffer(data, np.uint8), portable=portable) == crc


@given(hnp.arrays(np.uint8, st.integers(0, 400).map(lambda n: 8 * n)), st.sampled_from([1, 2, 4, 8]), st.booleans())
def test_planes_come_back(data: np.ndarray, width: int, rotate: bool) -> None:
    planes = np.stack([decode(encode(plane)) for plane in split_planes(data, width, rotate)])
    back = np.empty(data.size, np.uint8)
    for task in reversed(merge_tasks(planes, rotate, back)):
        task()
    np.testing.assert_array_equal(back, data)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(FormatError, match="float64"):
        encode(np.zeros(3))
    with pytest.raises(FormatError, match="huffman"):
        encode(np.zeros(3, np.int8), "huffman")  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="0…32"):
        encode(np.ones(3, np.int8), "exp-golomb", order=40)
