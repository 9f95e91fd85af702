"""Embedding and dequantize, run on the CPU from their CUDA source: exactly what the reference gives."""

import itertools

import pytest
import torch
from support import cuda_emulator
from support.cuda_cases import FORMATS, random_codes

from ggpass.kernels.cuda.variants import Rows, row_variant
from ggpass.lowering.operators import reference_dequantize, reference_embedding

pytest.importorskip("tvm")
pytestmark = pytest.mark.skipif(bool(cuda_emulator.reason_against()), reason=cuda_emulator.reason_against())

OUTPUTS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
KINDS = list(itertools.product(("embedding", "dequantize"), FORMATS, OUTPUTS, (True, False)))
#: No multiple of a thread's, a block's or a panel's share, and multiples; by whether a row begins at 16 bytes.
WIDTHS = {True: (8, 16, 72, 264, 1024), False: (1, 3, 17, 71, 1023)}
ROWS = (1, 2, 5, 33)


def variant_of(kind: tuple[str, str, str, bool]) -> Rows:
    family, decoder, dtype, aligned = kind
    return row_variant(family, decoder, dtype, 8 if aligned else 15)


def decode(variant: Rows, ids: torch.Tensor | None, codes, scale, codebook, seed: int = 0) -> torch.Tensor:
    from support.cuda_emulator import tensors

    return tensors.rows(variant, ids, codes, scale, codebook, OUTPUTS[variant.dtype], seed)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: variant_of(kind).name)
def test_rows_are_the_references(kind: tuple[str, str, str, bool]) -> None:
    variant = variant_of(kind)
    for i, (n, k) in enumerate(itertools.product(ROWS, WIDTHS[variant.aligned])):
        format = FORMATS[variant.decoder][i % len(FORMATS[variant.decoder])]
        codes, scale = random_codes(format, n, k), torch.rand(1 if i % 3 == 0 else n) + 0.5
        arguments = codes, scale, format.codebook
        if variant.family == "dequantize":
            expected = reference_dequantize(*arguments, OUTPUTS[variant.dtype])
            assert torch.equal(decode(variant, None, *arguments, i), expected)
            continue
        ids = torch.randint(n, (1 + 7 * (i % 4),))
        expected = reference_embedding(ids, *arguments, OUTPUTS[variant.dtype])
        assert torch.equal(decode(variant, ids, *arguments, i), expected)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("decoder", FORMATS)
def test_an_id_outside_is_nan_and_nothing_outside_is_read(decoder: str, aligned: bool) -> None:
    variant, format = variant_of(("embedding", decoder, "bfloat16", aligned)), FORMATS[decoder][0]
    codes = random_codes(format, 3, 24)
    ids = torch.tensor([-1, 2, 3, 0, 1 << 40, -(1 << 40)])
    y = decode(variant, ids, codes, torch.ones(3), format.codebook)
    inside = (ids >= 0) & (ids < 3)
    assert torch.isnan(y[~inside]).all()
    expected = reference_embedding(ids[inside], codes, torch.ones(3), format.codebook, torch.bfloat16)
    assert torch.equal(y[inside], expected)


@pytest.mark.parametrize("dtype", OUTPUTS)
@pytest.mark.parametrize("decoder", FORMATS)
def test_every_code_with_a_value_is_exact_at_every_position(decoder: str, dtype: str) -> None:
    """All 256 codes, a NaN among them, each at each place of a 16-byte load."""
    variant = variant_of(("dequantize", decoder, dtype, True))
    for format in FORMATS[decoder]:
        codes = torch.stack([torch.arange(256).roll(i) for i in range(16)]).to(torch.uint8)
        y = decode(variant, None, codes, torch.ones(1), format.codebook)
        expected = reference_dequantize(codes, torch.ones(1), format.codebook, OUTPUTS[dtype])
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
