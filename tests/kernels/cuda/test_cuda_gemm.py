"""The kernels for many rows of x, run on the CPU from their CUDA source, against float64."""

import itertools

import pytest
import torch
from support import cuda_emulator
from support.cuda_cases import DTYPES, FORMATS, Linear, linears, random_linear, shapes

from ggpass.formats.rf8 import RF8
from ggpass.kernels.cuda.variants import Gemm, every_linear

pytest.importorskip("tvm")
pytestmark = pytest.mark.skipif(bool(cuda_emulator.reason_against()), reason=cuda_emulator.reason_against())

#: Less than a warp's, than a block's, and more than a block's; rows of y that begin at 2, 16 and 8 bytes.
COLUMNS = (1, 40, 132)
KINDS = list(itertools.product(FORMATS, DTYPES, (True, False)))


def gemms(kinds: list[tuple[str, str, bool]]) -> list[Gemm]:
    every = [v for decoder, dtype, aligned in kinds for v in every_linear(decoder, dtype, 16 if aligned else 15)]
    return [v for v in every if isinstance(v, Gemm)]


def covering() -> list[Gemm]:
    """Each blocking with a few of the kinds, so that each decoder, dtype and alignment meets each other once."""
    blockings = gemms(KINDS[:1])
    odd = [kind for kind in KINDS if (kind[0] == "rf8") ^ (kind[1] == "bfloat16") ^ kind[2]]
    least = min(range(len(blockings)), key=lambda i: blockings[i].sums)
    chosen = [(kind, least) for kind in odd] + [(odd[i % 4], i) for i in range(len(blockings)) if i != least]
    return [gemms([kind])[i] for kind, i in chosen]


def multiply(variant: Gemm, case: Linear, seed: int = 0) -> torch.Tensor:
    from support.cuda_emulator import tensors

    return tensors.linear(variant, case.x, case.codes, case.scale, case.format.codebook, case.bias, seed=seed)


def check_shapes(variant: Gemm) -> None:
    at = shapes(variant.rows, COLUMNS, variant.aligned)[::2]
    for i, case in enumerate(linears(variant.decoder, variant.dtype, at)):
        case.check(multiply(variant, case, seed=i))


@pytest.mark.parametrize("variant", covering(), ids=lambda v: v.name)
def test_every_shape_is_within_the_bound(variant: Gemm) -> None:
    check_shapes(variant)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [v for v in gemms(KINDS) if v not in covering()], ids=lambda v: v.name)
def test_every_shape_is_within_the_bound_for_the_other_variants(variant: Gemm) -> None:
    check_shapes(variant)


def test_more_blocks_of_rows_than_run_side_by_side() -> None:
    """Blocks of rows come in bundles, the last of which is not whole."""
    variant = covering()[0]
    m = variant.launch(1 << 20, 1, 1).grid[0] * variant.rows + variant.rows // 2
    case = random_linear(FORMATS[variant.decoder][0], DTYPES[variant.dtype], m, 3, 32 if variant.aligned else 31)
    case.check(multiply(variant, case))


def test_the_order_in_which_threads_run_changes_no_bit() -> None:
    variant = next(v for v in covering() if v.groups > 1 and v.decoder == "rf8" and v.aligned)
    case = random_linear(RF8, DTYPES[variant.dtype], 70, 40, 272)
    y = multiply(variant, case)
    assert all(torch.equal(y, multiply(variant, case, seed)) for seed in (1, 2, 3))
