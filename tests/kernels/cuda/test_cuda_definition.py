"""What the CUDA kernels compute, unscheduled and built for the CPU, against the reference operators."""

import functools

import pytest
import torch
from support.cuda_cases import DTYPES, FORMATS, linears, random_codes

from ggpass.formats.rf8 import RF8_CODEBOOK
from ggpass.lowering.operators import reference_dequantize, reference_embedding, reference_linear

tvm = pytest.importorskip("tvm")

OUTPUTS = DTYPES | {"float32": torch.float32}
SHAPES = [(1, 1, 1), (1, 7, 15), (3, 33, 100), (8, 8, 64), (17, 5, 272), (2, 9, 1041)]


@functools.cache
def built(operator: str, decoder: str, dtype: str):
    """The operator for this machine's CPU."""
    from support import cuda_definition

    function = getattr(cuda_definition, operator)(decoder, dtype).with_attr("global_symbol", operator)
    return tvm.compile(tvm.IRModule({operator: function}), target=tvm.target.Target({"kind": "llvm"}))[operator]


def call(operator: str, decoder: str, dtype: str, *tensors: torch.Tensor) -> None:
    built(operator, decoder, dtype)(*(tvm.runtime.from_dlpack(t.contiguous()) for t in tensors))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decoder", FORMATS)
def test_linear_is_the_reference(decoder: str, dtype: str) -> None:
    for case in linears(decoder, dtype, SHAPES):
        m, n, _ = case.shape
        y = torch.full((m, n), torch.nan, dtype=case.x.dtype)
        bias = torch.zeros(n) if case.bias is None else case.bias
        scale = case.scale.expand(n)
        call("linear", decoder, dtype, case.x, case.codes, scale, case.format.codebook, bias, y)
        case.check(y)
        # The operators' own reference, whose weights are not rounded to x's dtype; RF8's need no rounding.
        if decoder == "rf8":
            reference = reference_linear(case.x, case.codes, case.scale, case.format.codebook, case.bias)
            case.check(reference)


@pytest.mark.parametrize("dtype", OUTPUTS)
@pytest.mark.parametrize("decoder", FORMATS)
def test_rows_are_the_reference(decoder: str, dtype: str) -> None:
    for format in FORMATS[decoder]:
        codes, scale = random_codes(format, 9, 71), torch.rand(9) + 0.5
        y = torch.empty((9, 71), dtype=OUTPUTS[dtype])
        call("dequantize", decoder, dtype, codes, scale, format.codebook, y)
        assert torch.equal(y, reference_dequantize(codes, scale, format.codebook, OUTPUTS[dtype]))
        ids = torch.tensor([3, 0, 8, 3, -1, 9])
        y = torch.empty((6, 71), dtype=OUTPUTS[dtype])
        call("embedding", decoder, dtype, ids, codes, scale, format.codebook, y)
        assert torch.equal(y[:4], reference_embedding(ids[:4], codes, scale, format.codebook, OUTPUTS[dtype]))
        assert torch.isnan(y[4:]).all()


def test_every_code_decodes_to_the_codebooks_value() -> None:
    """The formula of the layout, for all 256 codes; the aliases of zero are zero."""
    codes, y = torch.arange(256, dtype=torch.uint8).unsqueeze(0), torch.empty((1, 256))
    call("dequantize", "rf8", "float32", codes, torch.ones(1), torch.full((256,), torch.nan), y)
    assert torch.equal(y[0], RF8_CODEBOOK)
