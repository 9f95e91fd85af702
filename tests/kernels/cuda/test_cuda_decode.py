"""The decoders of the CUDA kernels, bit by bit: step by step in NumPy, and the device functions themselves."""

import numpy as np
import pytest
import torch
from support import cuda_emulator
from support.cuda_cases import FORMATS

from ggpass.formats import Format
from ggpass.formats.rf8 import RF8_CODEBOOK
from ggpass.kernels.cuda.geometry import COPIES
from ggpass.kernels.cuda.variants import Launch

KINDS = {"bf16": torch.bfloat16, "f16": torch.float16}
needs_emulator = pytest.mark.skipif(bool(cuda_emulator.reason_against()), reason=cuda_emulator.reason_against())


def words_of_codes() -> np.ndarray:
    """(1024,) words: every code in each of the four bytes, its neighbours different from it and from each other."""
    first = np.arange(256, dtype=np.uint32)
    parts = [(first + 85 * i) % 256 for i in range(4)]
    words = [sum(parts[(i + turn) % 4] << np.uint32(8 * i) for i in range(4)) for turn in range(4)]
    return np.concatenate(words).astype(np.uint32)


def codes_in(words: np.ndarray) -> np.ndarray:
    """(…, 4) codes, the lowest byte first."""
    return words.astype("<u4").view(np.uint8).reshape(*words.shape, 4)


def prmt(low: int, high: int, selector: np.ndarray) -> np.ndarray:
    """PTX's prmt.b32 without its sign mode: nibble i of the selector names the byte, of eight, that becomes byte i."""
    table = np.frombuffer(np.array([low, high], "<u4").tobytes(), np.uint8)
    picked = [
        table[(selector >> np.uint32(4 * i)) & np.uint32(7)].astype(np.uint32) << np.uint32(8 * i) for i in range(4)
    ]
    return np.bitwise_or.reduce(picked)


def prmt_of(words: np.ndarray, selector: int) -> np.ndarray:
    """The same with the data in the first operand, 0 in the second and a constant selector."""
    data = np.stack([words >> np.uint32(8 * i) & np.uint32(255) for i in range(4)] + [np.zeros_like(words)] * 4)
    return np.bitwise_or.reduce([data[selector >> (4 * i) & 7] << np.uint32(8 * i) for i in range(4)])


def product(a: np.ndarray, b: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """fma.rn of two 16-bit floats a word, with -0 added: torch's product, whose zeros keep the sign of a · b."""
    x, y = (torch.from_numpy(v.view(np.int16)).view(dtype) for v in (a, b))
    return (x * y).view(torch.int16).numpy().view(np.uint32)


def decoded(words: np.ndarray, kind: str) -> np.ndarray:
    """(n, 2) words of two 16-bit floats: what `_DECODE_RF8_*` of device.py does, operation by operation."""
    residuals = words & np.uint32(0x07070707)
    out = []
    for half in range(2):
        twice = prmt_of(words, 0x3322 if half else 0x1100)
        selector = residuals >> np.uint32(16) if half else residuals
        if kind == "bf16":
            factor = prmt(0x80706040, 0xC0A09088, selector) ^ np.uint32(0x37003700)
            power = (twice << np.uint32(4)) & np.uint32(0x07800780)
        else:
            high = prmt(0x3C3B3B3A, 0x3E3D3C3C, selector) << np.uint32(8)
            low = prmt(0x00800000, 0x00008040, selector)
            factor = (high & np.uint32(0xFF00FF00)) | (low & np.uint32(0x00FF00FF))
            power = (twice << np.uint32(7)) & np.uint32(0x3C003C00)
        out.append(product(power, factor | (twice & np.uint32(0x80008000)), KINDS[kind]))
    return np.stack(out, -1)


def check_values(words: np.ndarray, out: np.ndarray, kind: str) -> None:
    """Each of the four floats is its code's value; where e = 0 it is a zero of the code's sign."""
    codes = codes_in(words)
    values = (
        torch.from_numpy(np.ascontiguousarray(out).view(np.int16).reshape(codes.shape))
        .view(KINDS[kind])
        .float()
        .numpy()
    )
    np.testing.assert_array_equal(values, RF8_CODEBOOK.numpy()[codes])
    np.testing.assert_array_equal(np.signbit(values), codes >= 128)
    assert {int(c) for c in codes[values == 0]} == {*range(8), *range(128, 136)}


def test_the_words_hold_every_code_at_every_place() -> None:
    codes = codes_in(words_of_codes())
    assert all(set(codes[:, place]) == set(range(256)) for place in range(4))


@pytest.mark.parametrize("kind", KINDS)
def test_the_steps_give_the_codebook(kind: str) -> None:
    words = words_of_codes()
    check_values(words, decoded(words, kind), kind)


def run_device_function(call: str, functions: str, codebook: np.ndarray | None = None) -> np.ndarray:
    """(1024, 2) words that a device function makes of `words_of_codes`."""
    from ggpass.kernels.cuda.compiler import Source
    from ggpass.kernels.cuda.generate.device import PRELUDE

    words = words_of_codes()
    out = np.zeros((len(words), 2), np.uint32)
    fill = f"for (int i = t; i < {256 * COPIES}; i += 32) shared[i] = book[i / {COPIES}];\n  __syncthreads();"
    text = f"""{PRELUDE}{functions}
extern "C" __global__ void probe(uint* __restrict__ words, uint* __restrict__ book, uint* __restrict__ y) {{
  extern __shared__ __align__(64) uint shared[];
  int t = (int)threadIdx.x;
  {fill if codebook is not None else ""}
  for (int i = t; i < {len(words)}; i += 32) {{
    uint out[2];
    {call}
    y[2 * i] = out[0];
    y[2 * i + 1] = out[1];
  }}
}}
"""
    book = np.zeros(256, np.uint32) if codebook is None else codebook
    launch = Launch((1, 1, 1), 32, 256 * COPIES * 4)
    cuda_emulator.run(Source(text, "probe", ("words", "book", "y")), launch, {"words": words, "book": book}, {"y": out})
    return out


@needs_emulator
@pytest.mark.parametrize("kind", KINDS)
def test_the_device_function_is_those_steps(kind: str) -> None:
    pytest.importorskip("tvm")
    from ggpass.kernels.cuda.generate import device

    decode = device._DECODE_RF8_BF16 if kind == "bf16" else device._DECODE_RF8_F16
    functions = device._PRMT + device._MULTIPLY.format(kind=kind) + decode
    out = run_device_function(f"ggp_decode_rf8_{kind}(out, words[i], {device.RF8_TABLE[kind]}u);", functions)
    np.testing.assert_array_equal(out, decoded(words_of_codes(), kind))
    check_values(words_of_codes(), out, kind)


@needs_emulator
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", FORMATS["table"], ids=lambda format: format.name)
def test_the_table_gives_rounded_values(kind: str, format: Format) -> None:
    pytest.importorskip("tvm")
    from ggpass.kernels.cuda.generate import device

    rounded = format.codebook.to(KINDS[kind])
    bits = rounded.view(torch.int16).numpy().view(np.uint16)
    call = f"ggp_decode_table(out, words[i], shared + i % {COPIES});"
    out = run_device_function(call, device._DECODE_TABLE.format(copies=COPIES), bits.astype(np.uint32))
    np.testing.assert_array_equal(out.view(np.uint16).reshape(-1, 4), bits[codes_in(words_of_codes())])
