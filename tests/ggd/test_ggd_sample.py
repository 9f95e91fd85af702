"""Samples of generalized Gaussians against scipy.stats.gennorm, and what every dtype and generator must keep."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import gennorm, kstest, norm

from ggpass.ggd import GGD

SHAPES = [0.2, 0.5, 1.0, 1.36, 2.0, 8.0]
COUNT = 100_000

#: P(√n·D > 3.1) = 2·exp(−2·3.1²) = 9e-9 for a sample of the very distribution (Kolmogorov's limit).
KOLMOGOROV = 3.1


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_samples_follow_the_distribution(shape: float, dtype: torch.dtype) -> None:
    x = GGD(shape, 0.7, 0.1).sample((COUNT,), generator=seeded(), dtype=dtype).double().numpy()
    reference = gennorm(shape, loc=0.1, scale=0.7)
    assert kstest(x, reference.cdf).statistic * math.sqrt(COUNT) < KOLMOGOROV
    for other in (shape / 2, 2 * shape):  # the test can tell
        assert kstest(x, gennorm(other, loc=0.1, scale=0.7).cdf).statistic * math.sqrt(COUNT) > KOLMOGOROV


@pytest.mark.parametrize("shape", SHAPES)
def test_moments_of_samples_lie_within_their_standard_errors(shape: float) -> None:
    x = GGD(shape, 1.0).sample((COUNT,), generator=seeded(1), dtype=torch.float64).numpy()
    moment = {k: math.exp(math.lgamma((k + 1) / shape) - math.lgamma(1 / shape)) for k in (1, 2, 4)}
    # Five standard errors: Var|x| = m2 − m1², Var x = m2, Var x² = m4 − m2², each over n.
    assert abs(x.mean()) < 5 * math.sqrt(moment[2] / COUNT)
    assert abs(np.abs(x).mean() - moment[1]) < 5 * math.sqrt((moment[2] - moment[1] ** 2) / COUNT)
    if shape >= 0.5:  # below, x² is itself too heavy-tailed for a normal law of its mean
        assert abs((x**2).mean() - moment[2]) < 5 * math.sqrt((moment[4] - moment[2] ** 2) / COUNT)
    assert abs((x > 0).mean() - 0.5) < 5 * 0.5 / math.sqrt(COUNT)


def test_signs_and_magnitudes_are_independent() -> None:
    x = GGD(1.36, 1.0).sample((COUNT,), generator=seeded(2), dtype=torch.float64)
    sign, magnitude = x.sign().numpy(), x.abs().numpy()
    assert abs(np.corrcoef(sign, magnitude)[0, 1]) * math.sqrt(COUNT) < norm.isf(1e-8)
    neighbours = np.corrcoef(magnitude[1:], magnitude[:-1])[0, 1]
    assert abs(neighbours) * math.sqrt(COUNT) < norm.isf(1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_narrow_samples_are_finite_and_without_spurious_zeros(shape: float, dtype: torch.dtype) -> None:
    model = GGD(shape, 0.02 / GGD(shape, 1.0).std)  # a layer's σ
    wide = model.sample((COUNT,), generator=seeded(3))
    narrow = model.sample((COUNT,), generator=seeded(3), dtype=dtype)
    assert narrow.dtype == dtype
    assert bool(narrow.isfinite().all())
    assert bool((wide != 0).all())
    # Rounded once from float32: no zero but where the dtype has nothing nearer.
    assert torch.equal(narrow, wide.to(dtype))
    tiny = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    assert not bool(((narrow == 0) & (wide.abs() > tiny)).any())


def test_a_sample_beyond_the_dtype_becomes_its_largest_number() -> None:
    x = GGD(0.2, 1e4).sample((1000,), generator=seeded(), dtype=torch.float16)
    assert bool(x.isfinite().all())
    assert x.abs().max() == torch.finfo(torch.float16).max


def test_extreme_scales_and_shapes_neither_overflow_nor_vanish() -> None:
    for scale in (1e-30, 1e30):
        x = GGD(1.0, scale).sample((10_000,), generator=seeded())
        assert (x.abs() / scale).mean().item() == pytest.approx(1, abs=5 / 100)  # Var|x| = α², √n = 100
    # ν = 0.05: G^(1/ν) = G^20 leaves float32's range before α brings it back.
    x = GGD(0.05, 0.02 / GGD(0.05, 1.0).std).sample((10_000,), generator=seeded())
    assert bool(x.isfinite().all())
    assert bool((x != 0).any())


def test_the_generator_decides_and_nothing_else() -> None:
    model = GGD(1.36, 0.05)
    first = model.sample((64, 32), generator=seeded(5))
    torch.manual_seed(123)
    assert torch.equal(first, model.sample((64, 32), generator=seeded(5)))
    assert not torch.equal(first, model.sample((64, 32), generator=seeded(6)))
    generator = seeded(5)
    model.sample((64, 32), generator=generator)
    assert not torch.equal(first, model.sample((64, 32), generator=generator))  # its state moves on
    torch.manual_seed(9)
    default = model.sample(10)
    torch.manual_seed(9)
    assert torch.equal(default, model.sample((10,)))
    assert torch.equal(GGD(1.36, 0.05, 1.0).sample((64, 32), generator=seeded(5)), first + 1.0)


@pytest.mark.parametrize("size", [(), (0,), (3, 0, 2), (2, 3, 4), 7])
def test_every_size_is_taken(size: tuple[int, ...] | int) -> None:
    x = GGD(1.0, 1.0).sample(size, generator=seeded())
    assert x.shape == torch.Size((size,) if isinstance(size, int) else size)
    assert x.is_contiguous()


def test_other_devices_and_dtypes_are_taken_or_refused_by_name() -> None:
    assert GGD(1.0, 1.0).sample((2, 3), device="meta", dtype=torch.bfloat16).device.type == "meta"
    with pytest.raises(ValueError, match=r"floating samples, not torch.int64; give a floating dtype"):
        GGD(1.0, 1.0).sample((3,), dtype=torch.int64)
