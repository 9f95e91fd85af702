"""`torch.ops.ggpass.linear` on a GPU, for every class of shapes, against float64."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from support import cuda_emulator
from support.cuda_cases import DTYPES, Linear, random_codes, random_linear

import ggpass.lowering.operators  # noqa: F401
from ggpass.formats import E4M3, FORMATS, RF8
from ggpass.kernels.cuda.variants import linear_variants
from ggpass.targets import cuda  # noqa: F401  (registers the operators)

#: By rows of x: one, up to each kernel's, a row more than its, many; widths and columns that no tile divides, and those
#: of models.
SHAPES = (
    *((m, n, k) for m in (1, 3, 8, 9, 16, 17, 33, 64, 65, 130) for n, k in ((1, 1), (7, 15), (33, 100), (100, 272))),
    *(
        (m, n, k)
        for m in (1, 5, 16, 40, 129, 512)
        for n, k in ((1000, 1040), (4096, 4096), (11008, 4096), (1027, 4099))
    ),
    (2048, 4096, 4096),
    (1, 28672, 8192),
    (70000, 64, 64),
)


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_each_shape_is_within_the_bound(multiply, shape: tuple[int, int, int], dtype: str, format) -> None:
    options = {"one_scale": shape[0] % 2 == 0, "bias": shape[1] % 2 == 0, "canonical": True}
    case = random_linear(format, DTYPES[dtype], *shape, **options)
    check(multiply, dataclasses.replace(case, by_unit=format.decoder.unit != 1))


@pytest.mark.parametrize("shape", [(3, 33, 100), (16, 100, 272), (65, 7, 15)], ids=lambda s: "x".join(map(str, s)))
def test_these_tests_work_without_a_gpu(shape: tuple[int, int, int]) -> None:
    """The same comparison with the emulator in the GPU's place."""
    if cuda_emulator.reason_against():
        pytest.skip(cuda_emulator.reason_against())
    pytest.importorskip("tvm")
    from support.cuda_emulator import tensors

    def multiply(case: Linear) -> torch.Tensor:
        variant = linear_variants("table", "bfloat16", *case.shape)[0]
        return tensors.linear(variant, case.x, case.codes, case.scale, case.format.codebook, case.bias)

    check(multiply, random_linear(E4M3, torch.bfloat16, *shape))


def check(multiply: Callable[[Linear], torch.Tensor], case: Linear) -> None:
    y, (m, n, k) = multiply(case), case.shape
    # In float64 on the CPU some rows are enough of a large product.
    if m * n * k > 1 << 32:
        case, y = dataclasses.replace(case, x=case.x[-16:]), y[-16:]
    case.check(y, chopped=True)


def case_on(gpu: torch.device, m: int, n: int, k: int) -> tuple[Linear, list[torch.Tensor]]:
    """A case on the CPU, and its tensors but x on the GPU."""
    case = random_linear(RF8, torch.bfloat16, m, n, k, canonical=True)
    return case, [tensor.to(gpu) for tensor in (case.codes, case.scale, RF8.codebook, case.bias)]


@pytest.mark.parametrize("m", [1, 20, 200])
def test_any_strides_and_addresses_are_taken(gpu: torch.device, m: int) -> None:
    n, k = 37, 208
    case, (codes, scale, codebook, bias) = case_on(gpu, m, n, k)
    memory = torch.zeros(2 * m * k + 1, dtype=torch.bfloat16, device=gpu)
    for view in (memory[1 : 1 + m * k].view(m, k), memory[1:].view(m, 2 * k)[:, ::2], memory[: m * k].view(k, m).T):
        view.copy_(case.x)
        case.check(torch.ops.ggpass.linear(view, codes, scale, codebook, bias).cpu(), chopped=True)
    odd = torch.zeros(n * k + 1, dtype=torch.uint8, device=gpu)[1:].view(n, k)
    odd.copy_(codes)
    case.check(torch.ops.ggpass.linear(case.x.to(gpu), odd, scale, codebook, bias).cpu(), chopped=True)


@pytest.mark.parametrize("shape", [(), (2, 3), (0,), (2, 0, 3)])
def test_any_rank_is_taken(gpu: torch.device, shape: tuple[int, ...]) -> None:
    case, tensors = case_on(gpu, 6, 40, 64)
    count = torch.Size(shape).numel()
    x = case.x[:count].view(*shape, 64).to(gpu)
    y = torch.ops.ggpass.linear(x, *tensors)
    assert y.shape == (*shape, 40)
    if count:
        dataclasses.replace(case, x=case.x[:count]).check(y.reshape(count, 40).cpu(), chopped=True)


@pytest.mark.parametrize("m", [1, 70])
def test_offsets_beyond_31_bits(gpu: torch.device, m: int) -> None:
    """The last rows of more than 2 GiB of codes."""
    n, k = (1 << 19) + 5, 1 << 12
    if torch.cuda.mem_get_info()[0] < 4 << 30:
        pytest.skip("less than 4 GiB of this GPU's memory are free")
    codes = torch.zeros((n, k), dtype=torch.uint8, device=gpu)
    last = random_codes(RF8, 40, k, canonical=True)
    codes[-40:] = last.to(gpu)
    x, ones = torch.randn(m, k).bfloat16(), torch.ones(1, device=gpu)
    y = torch.ops.ggpass.linear(x.to(gpu), codes, ones, RF8.codebook.to(gpu), None)
    Linear(RF8, x, last, torch.ones(1), None).check(y[:, -40:].cpu(), chopped=True)
    assert not y[:, :-40].any()
    rows = torch.ops.ggpass.embedding(
        torch.tensor([n - 1], device=gpu), codes, ones, RF8.codebook.to(gpu), torch.float16
    )
    assert torch.equal(rows.cpu()[0].float(), RF8.codebook[last[-1].long()])
