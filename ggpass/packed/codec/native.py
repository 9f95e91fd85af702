"""The compiled inner loops (`native/codec*.cpp`), reached through ctypes, which releases the GIL while they run."""

import ctypes
import functools
import importlib.util
from ctypes import c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p

import numpy as np

from ggpass.errors import FormatError, GgpassError

#: How an element is stored; the position in this tuple is part of the stored form (`IntegerType` in native/codec.h).
INTEGER_TYPES: tuple[np.dtype, ...] = tuple(np.dtype(t) for t in ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8"))

#: What a Status below zero says about the input.
STATUS = {
    -1: "it ends before the last symbol",
    -2: "its bits cannot have come from the encoder",
    -3: "it holds more than was announced",
    -4: "its table does not fit its symbols",
}

_SIGNATURES: dict[str, tuple[type, tuple[type, ...]]] = {
    "ggp_has_avx2": (c_int, ()),
    "ggp_crc32c": (c_uint32, (c_uint32, c_void_p, c_size_t, c_int)),
    "ggp_rans_table_bytes": (c_size_t, (c_int,)),
    "ggp_rans_table": (c_int64, (c_void_p, c_void_p, c_size_t, c_int, c_void_p)),
    "ggp_rans_bound": (c_size_t, (c_size_t,)),
    "ggp_rans_scratch_bytes": (c_size_t, (c_size_t,)),
    "ggp_rans_encode": (c_int64, (c_void_p, c_int, c_size_t, c_void_p, c_size_t, c_int, c_void_p, c_void_p, c_size_t)),
    "ggp_rans_decode": (c_int64, (c_void_p, c_size_t, c_void_p, c_void_p, c_size_t, c_int)),
    "ggp_rans_decode_values": (
        c_int64,
        (c_void_p, c_size_t, c_void_p, c_void_p, c_size_t, c_int, c_void_p, c_size_t, c_int),
    ),
    "ggp_rans_chunks": (
        c_int64,
        (
            *(c_void_p, c_void_p, c_void_p, c_size_t, c_size_t, c_size_t, c_uint64),  # where the chunks are
            *(c_void_p, c_void_p, c_size_t, c_int, c_void_p),  # table, values, substitutes
            *(c_void_p, c_int, c_void_p),
        ),
    ),
    "ggp_exp_golomb_bits": (c_int64, (c_void_p, c_size_t, c_int)),
    "ggp_exp_golomb_encode": (c_int64, (c_void_p, c_size_t, c_int, c_void_p, c_size_t)),
    "ggp_exp_golomb_decode": (c_int64, (c_void_p, c_size_t, c_size_t, c_int, c_void_p)),
    "ggp_read_model": (c_int64, (c_void_p, c_size_t, c_void_p, c_void_p, c_size_t)),
    "ggp_patch": (c_int64, (c_void_p, c_size_t, c_void_p, c_int, c_void_p, c_size_t)),
    "ggp_histogram": (c_int64, (c_void_p, c_int, c_size_t, c_int64, c_uint64, c_void_p)),
    "ggp_to_index": (
        c_int64,
        (c_void_p, c_int, c_size_t, c_int64, c_uint64, c_void_p, c_int, c_void_p, c_int, c_void_p, c_size_t),
    ),
    "ggp_planes_split": (c_int64, (c_void_p, c_size_t, c_int, c_int, c_void_p)),
    "ggp_planes_merge": (c_int64, (c_void_p, c_size_t, c_size_t, c_int, c_int, c_void_p)),
    "ggp_dequantize": (c_int64, (c_void_p, c_size_t, c_size_t, c_size_t, c_void_p, c_void_p, c_size_t, c_void_p)),
}


@functools.cache
def library() -> ctypes.CDLL:
    """Return the loaded library.

    Raises:
        GgpassError: ggpass was not built: its compiled part is missing.
    """
    spec = importlib.util.find_spec("ggpass._codec")
    if spec is None or spec.origin is None:
        raise GgpassError("ggpass._codec, the compiled codec, is missing; install ggpass with `pip install .`")
    loaded = ctypes.CDLL(spec.origin)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def address(array: np.ndarray) -> int:
    """Where a contiguous array's first element lies; the caller keeps the array alive."""
    return array.__array_interface__["data"][0]  # array.ctypes.data costs five times as much


def integer_type(dtype: np.dtype) -> int:
    """Return the stored number of an integer dtype.

    Raises:
        FormatError: not one of INTEGER_TYPES.
    """
    little = dtype.newbyteorder("<") if dtype.byteorder == ">" else dtype
    if little not in INTEGER_TYPES:
        raise FormatError(f"the codec takes integer symbols of 8 to 64 bits, not {dtype}")
    return INTEGER_TYPES.index(little)


def check(status: int, what: str) -> int:
    """Return the status itself, a length or a count; negative ones become an error about `what`.

    Raises:
        FormatError: the native function refused its input.
    """
    if status < 0:
        raise FormatError(f"{what} is corrupt: {STATUS[status]}; fetch the file again")
    return status


def crc32c(data: np.ndarray, seed: int = 0, *, portable: bool = False) -> int:
    """crc = CRC-32C of the bytes, continuing the message whose checksum is `seed` (RFC 3720, appendix B.4).

    CRC-32C and not zlib's CRC-32: both find every burst of up to 32 wrong bits, but the processor computes this one
    (measured here: 9 GB/s against 3.5 GB/s for zlib), so that checking costs a decoder a tenth of its time.
    """
    return library().ggp_crc32c(seed, address(data), data.nbytes, portable)
