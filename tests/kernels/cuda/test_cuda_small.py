"""The kernels for few rows of x, run on the CPU from their CUDA source, against float64."""

import itertools

import pytest
import torch
from support import cuda_emulator
from support.cuda_cases import DTYPES, FORMATS, Linear, linears, random_codes, random_linear, shapes

from ggpass.formats.rf8 import RF8
from ggpass.kernels.cuda.variants import Small, every_linear

pytest.importorskip("tvm")
pytestmark = pytest.mark.skipif(bool(cuda_emulator.reason_against()), reason=cuda_emulator.reason_against())

COLUMNS = (1, 7, 8, 33, 100)
KINDS = list(itertools.product(FORMATS, DTYPES, (True, False)))
#: Each pair of decoder, dtype and alignment once.
PAIRS = [kind for kind in KINDS if (kind[0] == "rf8") ^ (kind[1] == "bfloat16") ^ kind[2]]


def small_variants(kinds: list[tuple[str, str, bool]]) -> list[Small]:
    every = [v for decoder, dtype, aligned in kinds for v in every_linear(decoder, dtype, 16 if aligned else 15)]
    return [v for v in every if isinstance(v, Small)]


def named(*, rows: int, decoder: str = "rf8", dtype: str = "bfloat16", aligned: bool = True) -> Small:
    return next(v for v in small_variants([(decoder, dtype, aligned)]) if v.rows == rows)


def multiply(variant: Small, case: Linear, seed: int = 0) -> torch.Tensor:
    from support.cuda_emulator import tensors

    return tensors.linear(variant, case.x, case.codes, case.scale, case.format.codebook, case.bias, seed=seed)


def check_shapes(variant: Small) -> None:
    at = shapes(variant.rows, COLUMNS, variant.aligned)
    for i, case in enumerate(linears(variant.decoder, variant.dtype, at)):
        case.check(multiply(variant, case, seed=i))


@pytest.mark.parametrize("variant", small_variants(PAIRS), ids=lambda v: v.name)
def test_every_shape_is_within_the_bound(variant: Small) -> None:
    check_shapes(variant)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", [v for v in small_variants(KINDS) if v not in small_variants(PAIRS)], ids=lambda v: v.name
)
def test_every_shape_is_within_the_bound_for_the_other_variants(variant: Small) -> None:
    check_shapes(variant)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decoder", FORMATS)
def test_each_code_is_exact_at_each_position(decoder: str, dtype: str) -> None:
    """One-hot rows of x read single weights back: no rounding but the weight's own, so equality is bit for bit."""
    variant = named(rows=8, decoder=decoder, dtype=dtype)
    for format in FORMATS[decoder]:
        k = 256
        valid = torch.where(torch.isfinite(format.codebook), format.codebook, 0.0)
        codes = torch.stack([torch.arange(256).roll(i) for i in range(7)]).to(torch.uint8)
        codes = torch.where(torch.isfinite(format.codebook[codes.long()]), codes, torch.zeros_like(codes))
        for first in (0, 8, 123, 248):
            x = torch.zeros(8, k, dtype=DTYPES[dtype])
            x[torch.arange(8), first + torch.arange(8)] = 1.0
            y = multiply(variant, Linear(format, x, codes, torch.ones(1), None))
            assert torch.equal(y, valid[codes.long()].T[first : first + 8].to(x.dtype))


@pytest.mark.parametrize("rows", [8, 64])
def test_scales_at_the_ends_of_float32(rows: int) -> None:
    """A power of two as scale is exact, a subnormal one too; zero leaves the bias."""
    variant = named(rows=rows)
    case = random_linear(RF8, torch.bfloat16, 3, 33, 272, bias=False)
    ones = Linear(RF8, case.x, case.codes, torch.ones(33), None)
    y = multiply(variant, ones)
    for power in (-149, -140, -126, 100):
        # 2^100 and more in x makes up for it, so that y itself is a normal number.
        shift = min(100, -40 - power) if power < 0 else -20 - power
        scaled = Linear(RF8, (case.x.float() * 2.0**shift).bfloat16(), case.codes, torch.full((33,), 2.0**power), None)
        assert torch.equal(multiply(variant, scaled).float(), y.float() * 2.0 ** (power + shift))
    bias = torch.randn(33)
    zero = Linear(RF8, case.x, case.codes, torch.zeros(33), bias)
    assert torch.equal(multiply(variant, zero), bias.bfloat16().expand(3, 33))


@pytest.mark.parametrize("rows", [8, 64])
def test_zeros_infinities_and_nan_stay_in_their_rows(rows: int) -> None:
    variant = named(rows=rows)
    case = random_linear(RF8, torch.bfloat16, 6, 9, 80, bias=False)
    case.codes[:, 77] = 0x7B  # 2^0
    case.x[0], case.x[1, 77], case.x[2, 77], case.x[3, 77] = 0, torch.inf, -torch.inf, torch.nan
    y = multiply(variant, case)
    assert (y[0] == 0).all()
    assert torch.isposinf(y[1]).all()
    assert torch.isneginf(y[2]).all()
    assert torch.isnan(y[3]).all()
    rest = Linear(RF8, case.x[4:], case.codes, case.scale, None)
    rest.check(y[4:])


def test_float16_beyond_its_range_is_infinite() -> None:
    codes = torch.full((5, 64), 0x7F, dtype=torch.uint8)  # 1.5
    x = torch.ones(2, 64, dtype=torch.float16)
    x[1] = -1
    y = multiply(named(rows=8, dtype="float16"), Linear(RF8, x, codes, torch.full((5,), 1000.0), None))
    assert torch.isposinf(y[0]).all()
    assert torch.isneginf(y[1]).all()


@pytest.mark.parametrize("rows", [8, 16, 32, 64])
def test_the_order_in_which_threads_run_changes_no_bit(rows: int) -> None:
    """Sums of several warps are added in one order, whoever comes first."""
    variant = named(rows=rows)
    case = random_linear(RF8, torch.bfloat16, 7, 33, 1040)
    y = multiply(variant, case)
    assert all(torch.equal(y, multiply(variant, case, seed)) for seed in (1, 2, 3))


def test_offsets_beyond_31_bits() -> None:
    """The last rows of codes of more than 2 GiB: only the blocks at the end are run, and only their memory is there."""
    import numpy as np
    from support.cuda_emulator import run, tensors
    from support.cuda_emulator.run import sparse

    variant, m, n, k = named(rows=8), 2, (1 << 19) + 5, 1 << 12
    x, codes = torch.randn(m, k).bfloat16(), random_codes(RF8, 5, k)
    memory = sparse(n * k).reshape(n, k)
    memory[-5:] = codes.numpy()
    y, scale = sparse(m * n * 2).view(np.int16).reshape(m, n), np.ones(n, np.float32)
    arguments = {"x": tensors.bits(x), "codes": memory, "scale": scale, "bias": scale, "m": m, "n": n, "k": k}
    launch = variant.launch(m, n, k)
    last = [(launch.grid[0] - 1, 0, 0)]
    numbers = {"scale_stride": 1, "bias_on": 0}
    run(tensors.generated(variant), launch, arguments | numbers, {"y": y}, blocks=last, in_place=True)
    Linear(RF8, x, codes, torch.ones(5), None).check(torch.from_numpy(y[:, -5:].copy()).view(torch.bfloat16))
