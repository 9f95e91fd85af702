"""Which kernels may compute a shape: always one, within the shared memory of every architecture."""

import itertools

import pytest

from ggpass.kernels.cuda.variants import DECODERS, DTYPES, LEAST_SHARED, every_linear, linear_variants

#: Beside each kernel's rows of x, and many.
ROWS = (1, 7, 8, 9, 16, 17, 32, 33, 64, 65, 127, 129, 1000, 70000)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shape_has_a_kernel_that_fits(decoder: str, dtype: str) -> None:
    for m, n, k in itertools.product(ROWS, (1, 4096, 200000), (15, 4096)):
        found = linear_variants(decoder, dtype, m, n, k)
        assert found, (m, n, k)
        assert all(variant.launch(m, n, k).shared <= LEAST_SHARED for variant in found)
        assert all(variant.aligned == (k == 4096) for variant in found)
        assert all(variant.launch(m, n, k).block <= 1024 for variant in found)
        assert all(0 < size <= limit for v in found for size, limit in zip(v.launch(m, n, k).grid, LIMITS))


#: Blocks of a grid (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
LIMITS = ((1 << 31) - 1, 65535, 65535)


@pytest.mark.parametrize("shared", [LEAST_SHARED, 163 << 10, 227 << 10])
def test_every_linear_holds_whatever_may_be_chosen(shared: int) -> None:
    for decoder, dtype, k in itertools.product(DECODERS, DTYPES, (15, 4096)):
        every = every_linear(decoder, dtype, k)
        assert len({variant.name for variant in every}) == len(every)
        for m, n in itertools.product(ROWS, (1, 4096, 200000)):
            assert set(linear_variants(decoder, dtype, m, n, k, shared)) <= set(every)
