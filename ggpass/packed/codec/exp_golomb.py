"""Exp-Golomb codes: bits_k(n) = 2·floor(log2(n / 2^k + 1)) + 1 + k, a structured prefix code for low-shape sources.

Order 0 is published for the generalized Gaussian by Wen & Villasenor (1999) and used by BackSlash (arXiv 2504.16968).
Two maps turn signed symbols into n ≥ 0: `signed`, 0, 1, −1, 2, … → 0, 1, 2, 3, … (as in H.264), which needs no table;
and `ranked`, the most frequent symbol first, as BackSlash does it, which stores the order.
"""

import numpy as np

from ggpass.errors import FormatError
from ggpass.packed.codec.native import address, check, library

MAX_ORDER = 32

#: Symbols beyond ±2^61 have no code word; the codec stores such arrays raw.
MAX_MAGNITUDE = 1 << 61


def signed_map(symbols: np.ndarray) -> np.ndarray:
    """n = 2q − 1 for q > 0, −2q otherwise; uint64."""
    q = symbols.astype(np.int64)
    return np.where(q > 0, 2 * q - 1, -2 * q).astype(np.uint64)


def signed_unmap(n: np.ndarray) -> np.ndarray:
    """q = (n + 1)/2 for odd n, −n/2 for even n; int64."""
    half = ((n + np.uint64(1)) >> np.uint64(1)).astype(np.int64)
    return np.where(n & np.uint64(1), half, -half)


def lengths(n: np.ndarray, order: int) -> np.ndarray:
    """bits_k(n) = 2·floor(log2(n / 2^k + 1)) + 1 + k, elementwise, exact; int64."""
    m = n.astype(np.uint64) + np.uint64(1 << order)
    # floor(log2 m) is a float's exponent, exact for the 32 bits that decide it.
    high = (m >> np.uint64(32)).astype(np.int64)
    _, length = np.frexp(np.where(high > 0, high, (m & np.uint64(0xFFFFFFFF)).astype(np.int64)).astype(np.float64))
    return 2 * (length + 32 * (high > 0) - 1 - order) + 1 + order


def total_bits(n: np.ndarray, order: int) -> int:
    """Σ bits_k(n[i]), counted by the coder's own arithmetic."""
    n = np.ascontiguousarray(n, dtype=np.uint64)
    return check(library().ggp_exp_golomb_bits(address(n), n.size, order), "a symbol")


def best_order(n: np.ndarray, counts: np.ndarray | None = None) -> int:
    """k = argmin_k Σ counts[i] · bits_k(n[i]).

    Args:
        n: the distinct numbers (or all of them).
        counts: how often each occurs, or its probability; once each if left out.
    """
    if not len(n):
        return 0
    orders = range(min(MAX_ORDER, int(n.max()).bit_length()) + 1)  # past 2^k > n, each order costs one more bit
    if counts is None:
        return min(orders, key=lambda k: total_bits(n, k))
    return min(orders, key=lambda k: float((lengths(n, k) * counts).sum()))


def encode(n: np.ndarray, order: int) -> bytes:
    """Return the code words one after the other, most significant bit first; the last byte filled up with zero bits."""
    n = np.ascontiguousarray(n, dtype=np.uint64)
    out = np.empty((total_bits(n, order) + 7) // 8, dtype=np.uint8)
    written = library().ggp_exp_golomb_encode(address(n), n.size, order, address(out), out.size)
    return out[: check(written, "a symbol")].tobytes()


def decode(data: np.ndarray, count: int, order: int) -> tuple[np.ndarray, int]:
    """n and the number of bytes they took.

    Args:
        data: uint8; may be longer than the code words.
        count: how many numbers to read; each takes at least one bit, so more than the data's bits are refused.

    Raises:
        FormatError: the data is no such sequence.
    """
    if count > 8 * data.size:
        raise FormatError(f"{count} exp-Golomb numbers cannot lie in {data.size} bytes; fetch the file again")
    n = np.empty(count, dtype=np.uint64)
    used = library().ggp_exp_golomb_decode(address(data), data.size, count, order, address(n))
    return n, check(used, "an exp-Golomb sequence")


def pack_numbers(n: np.ndarray) -> bytes:
    """Return one byte, the best order, then the code words: how tables and patches are stored."""
    n = np.ascontiguousarray(n, dtype=np.uint64)
    order = best_order(n)
    return bytes([order]) + encode(n, order)


def unpack_numbers(data: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers that `pack_numbers` stored, and the data behind them.

    Raises:
        FormatError: the data is no such sequence.
    """
    if data.size < 1 or data[0] > MAX_ORDER:
        raise FormatError("an exp-Golomb sequence is corrupt: it names no order; fetch the file again")
    n, used = decode(data[1:], count, int(data[0]))
    return n, data[1 + used :]
