"""The CPU kernels against float64 on the same codes, within the bound of the accumulation."""

import mmap

import numpy as np
import pytest
import torch
from support.closeness import assert_rejects_corruption, assert_within, dot_bound

from ggpass.errors import KernelsUnavailable
from ggpass.formats import FORMATS
from ggpass.formats.rf8 import RF8_CODEBOOK
from ggpass.kernels.cpu.isa import portable
from ggpass.kernels.cpu.library import CpuKernels, load
from ggpass.kernels.cpu.memory import aligned_empty
from ggpass.kernels.cpu.regimes import BY_KIND

MS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 63, 65, 300)


@pytest.fixture(scope="module", params=["native", "portable"])
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    try:
        return load() if request.param == "native" else load(portable())
    except KernelsUnavailable as reason:
        pytest.skip(str(reason))


def valid_codes(name: str) -> torch.Tensor:
    """Every canonical code with a value: those that encoders emit, and those that only files may hold."""
    fmt = FORMATS[name]
    return fmt.canonical[torch.isfinite(fmt.codebook)].unique()


def random_codes(name: str, n: int, k: int) -> torch.Tensor:
    valid = valid_codes(name)
    return valid[torch.randint(len(valid), (n, k))]


def check(kernels: CpuKernels, name: str, x: torch.Tensor, codes, scale, bias) -> None:
    book = FORMATS[name].codebook
    y = kernels.linear(x, codes, scale, bias, book)
    w = book[codes.long()].double()
    expected = x.double() @ w.T * scale.double() + (0 if bias is None else bias.double())
    # A kernel that decodes by a unit multiplies it into the scale: two more roundings than the codebook's value has.
    bound = dot_bound(x, w, scale, bias) * (1 + 2 / (codes.shape[1] + 3))
    assert_within(y, expected, bound)
    if y.numel() > 4 and codes.shape[1] > 4:
        assert_rejects_corruption(y, expected, bound)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 31), (5, 33), (7, 64), (13, 65), (25, 127), (70, 300), (129, 1100)])
def test_linear_is_within_the_accumulation_bound_for_every_regime(kernels, name: str, n: int, k: int) -> None:
    torch.manual_seed(n * k)
    codes, scale, bias = random_codes(name, n, k), torch.rand(n) + 0.5, torch.randn(n)
    for m in MS:
        check(kernels, name, torch.randn(m, k), codes, scale, bias)


@pytest.mark.parametrize("m", MS)
def test_linear_takes_any_strides_and_alignment(kernels, m: int) -> None:
    torch.manual_seed(m)
    n, k = 37, 203
    storage = torch.empty(n, 4 * k + 1, dtype=torch.uint8)
    codes = storage[:, 3 : 3 + k]
    codes.copy_(random_codes("rf8", n, k))
    base = torch.randn(m * 2 * k + 1)
    for x in (
        base[1 : 1 + m * k].view(m, k),  # four bytes past any alignment
        base[1:].view(m, 2 * k)[:, :k],  # padded rows
        base[1:].view(m, 2 * k)[:, ::2],  # every other column
        base[1 : 1 + m * k].view(k, m).T,  # transposed
    ):
        check(kernels, "rf8", x, codes, torch.rand(n + 1)[1:] + 0.5, torch.randn(n + 1)[1:])


@pytest.mark.parametrize("m", [1, 2, 5, 17, 300])
def test_scalar_scale_and_no_bias(kernels, m: int) -> None:
    codes, x = random_codes("rf8", 19, 130), torch.randn(m, 130)
    for scale in (torch.tensor([0.25]), torch.full((19,), 0.25)):
        for bias in (None, torch.randn(19)):
            check(kernels, "rf8", x, codes, scale, bias)


@pytest.mark.parametrize("m", [1, 20, 400])
def test_parameters_that_require_gradients_are_only_read(kernels, m: int) -> None:
    x, codes = torch.randn(m, 70, requires_grad=True), random_codes("rf8", 6, 70)
    bias = torch.nn.Parameter(torch.randn(6))
    y = kernels.linear(x, codes, torch.ones(6, requires_grad=True), bias, RF8_CODEBOOK)
    assert not y.requires_grad
    assert torch.equal(y, kernels.linear(x.detach(), codes, torch.ones(6), bias.detach(), RF8_CODEBOOK))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 70), (3, 0, 70), (3, 5, 0), (0, 0, 0)])
def test_empty_dimensions(kernels, m: int, n: int, k: int) -> None:
    x, codes, bias = torch.randn(m, k), torch.zeros(n, k, dtype=torch.uint8), torch.randn(n)
    y = kernels.linear(x, codes, torch.ones(n), bias, RF8_CODEBOOK)
    assert torch.equal(y, bias.expand(m, n))
    assert kernels.linear(x, codes, torch.ones(n), None, RF8_CODEBOOK).shape == (m, n)


@pytest.mark.parametrize("m", [1, 2, 4, 8, 20, 300])
def test_infinities_and_nan_pass_through_as_in_torch(kernels, m: int) -> None:
    x = torch.randn(m, 70)
    x[0, 69] = torch.inf
    codes = random_codes("rf8", 9, 70)
    codes[:, 69] = 0x7B  # 2^0
    y = kernels.linear(x, codes, torch.ones(9), None, RF8_CODEBOOK)
    assert torch.isposinf(y[0]).all()
    assert torch.isfinite(y[1:]).all()


@pytest.mark.parametrize("name", FORMATS)
def test_every_canonical_code_decodes_bit_exactly(kernels, name: str) -> None:
    book = FORMATS[name].codebook
    codes = torch.stack([valid_codes(name).roll(i) for i in range(7)])
    decoded = kernels.dequantize(codes, torch.ones(1), book, torch.float32)
    expected = book[codes.long()]
    if FORMATS[name].decoder.unit != 1:  # i · round(1/127) against round(i/127)
        assert_within(decoded, expected.double(), expected.double().abs() * 2.0**-23)
    else:
        assert torch.equal(decoded.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("m", [1, 2, 4, 8, 20])
def test_every_canonical_rf8_code_is_exact_in_every_product_kernel(kernels, m: int) -> None:
    """One-hot activations read single weights back: no rounding anywhere, so equality is bit for bit."""
    codes = valid_codes("rf8")
    k = len(codes)
    weights = torch.stack([codes.roll(i) for i in range(5)])
    for first in range(0, k, m):
        x = torch.zeros(m, k)
        hot = torch.arange(first, min(first + m, k))
        x[torch.arange(len(hot)), hot] = 1.0
        y = kernels.linear(x, weights, torch.ones(1), None, RF8_CODEBOOK)
        assert torch.equal(y[: len(hot)], RF8_CODEBOOK[weights.long()].T[hot])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [5, 64, 200])
def test_dequantize_scales_and_rounds_once_more(kernels, dtype: torch.dtype, k: int) -> None:
    codes, scale = random_codes("rf8", 11, k), torch.rand(11) + 0.5
    exact = RF8_CODEBOOK[codes.long()] * scale[:, None]
    assert torch.equal(kernels.dequantize(codes, scale, RF8_CODEBOOK, dtype), exact.to(dtype))


@pytest.mark.parametrize("k", [5, 64, 200])
@pytest.mark.parametrize("scalar", [False, True])
def test_embedding_gathers_the_decoded_rows(kernels, k: int, scalar: bool) -> None:
    codes, scale = random_codes("rf8", 11, k), torch.rand(1 if scalar else 11) + 0.5
    ids = torch.tensor([3, 10, 0, 3])
    table = kernels.dequantize(codes, scale, RF8_CODEBOOK, torch.float32)
    assert torch.equal(kernels.embedding(ids, codes, scale, RF8_CODEBOOK), table[ids])
    assert kernels.embedding(ids[:0], codes, scale, RF8_CODEBOOK).shape == (0, k)


def test_codes_at_the_very_end_of_a_mapping_are_read_within_it(kernels) -> None:
    """The last row ends where the mapping ends, so that a read past it may fault."""
    page = mmap.PAGESIZE
    for n, k in ((3, 65), (5, 127), (2, 100)):
        mapping = mmap.mmap(-1, page)
        storage = torch.frombuffer(mapping, dtype=torch.uint8)
        codes = storage[page - n * k :].view(n, k)
        codes.copy_(random_codes("rf8", n, k))
        for m in (1, 2, 4, 8, 20):
            check(kernels, "rf8", torch.randn(m, k), codes, torch.ones(n), None)


def test_regimes_cover_every_m() -> None:
    for regimes in BY_KIND.values():
        for m in range(1, 600):
            kernel = regimes.kernel(m)
            assert kernel is None or kernel in regimes.kernels()


def test_errors_name_the_argument_and_the_way_out(kernels) -> None:
    x, codes, one = torch.randn(2, 70), torch.zeros(3, 70, dtype=torch.uint8), torch.ones(1)
    with pytest.raises(ValueError, match="the same K"):
        kernels.linear(x[:, :69], codes, one, None, RF8_CODEBOOK)
    with pytest.raises(TypeError, match=r"\.float\(\)"):
        kernels.linear(x.half(), codes, one, None, RF8_CODEBOOK)
    with pytest.raises(TypeError, match="uint8 matrix"):
        kernels.linear(x, codes.int(), one, None, RF8_CODEBOOK)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.linear(x, codes.T.contiguous().T, one, None, RF8_CODEBOOK)
    with pytest.raises(ValueError, match="scale"):
        kernels.linear(x, codes, torch.ones(2), None, RF8_CODEBOOK)
    with pytest.raises(ValueError, match="256"):
        kernels.linear(x, codes, one, None, RF8_CODEBOOK[:255])
    with pytest.raises(ValueError, match="bias"):
        kernels.linear(x, codes, one, torch.ones(4), RF8_CODEBOOK)


def test_shuffle_tables_reproduce_the_codebook() -> None:
    """The nibble tables in NumPy, step by step as the kernel combines them: all canonical codes, 0x00 exactly 0."""
    pytest.importorskip("tvm")
    from ggpass.kernels.cpu.generate.decoders import Rf8Shuffle

    low, borrow, high = Rf8Shuffle.tables()
    codes = valid_codes("rf8").numpy()
    byte = (high[codes >> 4] - borrow[codes & 15]).astype(np.uint8)
    bits = byte.astype(np.uint32) << 24 | low[codes & 15].astype(np.uint32) << 16
    np.testing.assert_array_equal(bits, RF8_CODEBOOK.numpy()[codes].view(np.uint32))


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (2048, 1024), (1500, 1777), (0, 4)])
def test_aligned_memory_starts_on_a_line_and_large_on_a_huge_page(shape: tuple[int, int]) -> None:
    tensor = aligned_empty(shape, torch.uint8)
    assert tensor.shape == shape
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % 64 == 0
    if tensor.numel() >= 2 << 20:
        assert tensor.data_ptr() % (2 << 20) == 0
    tensor.fill_(7)
    assert bool((tensor.clone() == 7).all())
