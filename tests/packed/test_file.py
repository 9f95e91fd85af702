"""Packed files: every dtype and shape comes back, by any method; what the file says of itself; any tool opens it."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.real_models import minilm_folder

from ggpass import FormatError, Scheme, WeightError
from ggpass.file import PackedFile, pack, unpack
from ggpass.formats import FORMATS, quantize
from ggpass.packed.codec.model import histogram
from ggpass.packed.dtypes import NAMES, TORCH_DTYPES, as_bytes
from ggpass.packed.grid import GridChoice, coarsest_step, grid_error
from ggpass.packed.methods import Codes

#: Every dtype that safetensors' torch front end writes.
DTYPES = [dtype for dtype in NAMES if dtype is not torch.float8_e8m0fnu]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Many small torch operations: on a busy machine their threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(as_bytes(a), as_bytes(b))


def example(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits at all: NaNs, infinities and negative zeros too."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.empty(0, dtype=dtype).element_size()
    count = math.prod(shape)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if dtype.is_floating_point and width > 1 and seed % 2:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 256, (count * width,), generator=generator).to(torch.uint8).view(dtype).view(shape)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.one_of(st.just(()), st.lists(st.integers(0, 30), min_size=1, max_size=3).map(tuple)),
    st.integers(0, 99),
)
def test_lossless_brings_back_every_bit(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, shape: tuple[int, ...], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("lossless")
    tensors = {"a": example(shape, dtype, seed), "b": example((70, 50), dtype, seed + 1)}
    source = write(folder / "a.safetensors", tensors)
    pack(source, folder / "p.safetensors", "lossless", threads=2)
    unpack(folder / "p.safetensors", folder / "u.safetensors")
    back, opened = load_file(folder / "u.safetensors"), PackedFile(folder / "p.safetensors")
    for name, tensor in tensors.items():
        assert same(opened.read(name), tensor)
        assert same(back[name], tensor)


@pytest.mark.parametrize("method", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_codes_are_those_of_the_format(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    """Packing equals quantizing: the same codes, the same scales, and codebook[codes]·scale as values."""
    weight = (torch.randn(300, 70) * torch.logspace(-3, 1, 300)[:, None]).to(dtype)
    weight[5] = 0
    kernel, bias = torch.randn(8, 3, 5, 5).to(dtype), torch.randn(300).to(dtype)
    source = write(tmp_path / "a.safetensors", {"w": weight, "conv": kernel, "bias": bias})
    pack(source, tmp_path / "p.safetensors", method)
    opened = PackedFile(tmp_path / "p.safetensors")
    fmt = FORMATS[method]
    for name, matrix in (("w", weight), ("conv", kernel.flatten(1))):
        expected, found = quantize(matrix, fmt), opened.codes(name)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scale, expected.scale)
        values = (fmt.decode(expected.codes) * expected.scale[:, None]).to(dtype)
        assert same(opened.read(name).flatten(1), values)
        assert same(opened.read_all(threads=2)[name].flatten(1), values)
    assert same(opened.read("bias"), bias)
    assert opened.stored("bias").kind == "plain"


def test_one_scale_for_a_tensor(tmp_path: Path) -> None:
    weight = torch.randn(40, 60)
    source = write(tmp_path / "a.safetensors", {"w": weight})
    scheme = Scheme(granularity="tensor")
    pack(source, tmp_path / "p.safetensors", Codes(FORMATS["int8"], scheme))
    expected = quantize(weight, FORMATS["int8"], scheme)
    found = PackedFile(tmp_path / "p.safetensors").codes("w")
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grid_rounds_to_the_nearest_point(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.randn(200, 100).to(dtype)
    weight[0, 0] = 4096.0  # a rare large symbol
    source = write(tmp_path / "a.safetensors", {"w": weight})
    pack(source, tmp_path / "p.safetensors", "grid:0.25")
    found = PackedFile(tmp_path / "p.safetensors")
    assert found.stored("w").step == 0.25
    assert torch.equal(found.read("w"), ((weight.double() / 0.25).round() * 0.25).to(dtype))


def test_grid_finds_the_coarsest_step_within_the_loss(tmp_path: Path) -> None:
    weight = torch.randn(300, 200) * 0.02
    source = write(tmp_path / "a.safetensors", {"w": weight, "zero": torch.zeros(9, 9)})
    pack(source, tmp_path / "p.safetensors", "grid", loss=0.01)
    opened = PackedFile(tmp_path / "p.safetensors")
    energy, step = float(weight.double().square().sum()), opened.stored("w").step
    assert grid_error(weight, step) <= 0.01 * energy < grid_error(weight, step * 1.05)
    assert float((opened.read("w") - weight).double().square().sum()) <= 0.0101 * energy
    assert not opened.read("zero").any()


def test_coarsest_step_by_a_models_own_score() -> None:
    """`acceptable` may be anything: a trained model's accuracy with its weights on that grid."""
    for start in (1e-6, 0.1, 300.0):
        assert coarsest_step(lambda step: step <= 0.37, start) == pytest.approx(0.37, rel=1 / 64)
    with pytest.raises(FormatError, match="state the step"):
        coarsest_step(lambda step: True, 1.0)
    with pytest.raises(FormatError, match="one positive number"):
        GridChoice(step=-1.0)


def test_any_safetensors_tool_opens_it(tmp_path: Path) -> None:
    """Payloads are uint8 tensors under the weights' names; untouched tensors are themselves."""
    tensors = {"w": torch.randn(64, 64), "b": torch.randn(64), "ids": torch.arange(7), "flag": torch.tensor([True])}
    source = write(tmp_path / "a.safetensors", tensors)
    report = pack(source, tmp_path / "p.safetensors", "rf8")
    with safe_open(tmp_path / "p.safetensors", framework="pt") as opened:
        assert set(opened.keys()) == set(tensors)
        assert opened.get_tensor("w").dtype is torch.uint8
        for name in ("b", "ids", "flag"):
            assert same(opened.get_tensor(name), tensors[name])
        assert opened.metadata()["format"] == "pt"
    assert {t.name: t.kind for t in report.tensors} == {"w": "rf8", "b": "plain", "ids": "plain", "flag": "plain"}
    assert all(t.reason for t in report.tensors if t.kind == "plain")


def test_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    weight = torch.randn(100, 100)
    tensors = {"embed": weight, "head": weight.clone(), "b": torch.zeros(5), "other": torch.randn(100, 100)}
    source = write(tmp_path / "a.safetensors", tensors)
    for method in ("rf8", "lossless"):
        target = tmp_path / f"{method}.safetensors"
        pack(source, target, method)
        opened = PackedFile(target)
        assert opened.manifest.aliases == {"head": "embed"}
        everything = opened.read_all()
        assert everything["head"].data_ptr() == everything["embed"].data_ptr()
        unpack(target, tmp_path / f"{method}-back.safetensors")
        back = load_file(tmp_path / f"{method}-back.safetensors")
        assert same(back["head"], back["embed"])
        if method == "lossless":
            assert all(same(back[name], tensor) for name, tensor in tensors.items())


def test_names_that_cannot_be_packed_are_said(tmp_path: Path) -> None:
    bad = torch.randn(30, 30)
    bad[3, 3] = math.nan
    source = write(tmp_path / "a.safetensors", {"layer.w": bad})
    for method in ("rf8", "grid", "grid:0.1"):
        with pytest.raises(WeightError, match=r"layer\.w.*NaN"):
            pack(source, tmp_path / "p.safetensors", method)
        assert not (tmp_path / "p.safetensors").exists()
    pack(source, tmp_path / "p.safetensors", "rf8", skip=("layer",))
    with pytest.raises(WeightError, match=r"nothing\.here"):
        pack(source, tmp_path / "q.safetensors", "rf8", skip=("nothing.here",))
    for method, words in (("zip", ", ".join((*FORMATS, "grid"))), ("rf8:3", "no step"), ("grid:fine", "sigma/8")):
        with pytest.raises(FormatError, match=words):
            pack(source, tmp_path / "q.safetensors", method)
    with pytest.raises(FormatError, match="packed already"):
        pack(tmp_path / "p.safetensors", tmp_path / "q.safetensors", "rf8")
    with pytest.raises(FormatError, match="not packed by ggpass"):
        unpack(source, tmp_path / "q.safetensors")


#: What all-MiniLM-L6-v2 must come to: method, bits a coded weight, bits an element of the whole file.
SIZES = [
    ("rf8", 6.40, 6.55),
    pytest.param("e4m3", 6.65, 6.8, marks=pytest.mark.slow),
    pytest.param("int8", 7.40, 7.55, marks=pytest.mark.slow),
    ("grid:sigma/8", 5.1, 5.2),
]


@pytest.mark.parametrize(("method", "payload", "whole"), SIZES)
def test_minilm_sizes(tmp_path: Path, method: str, payload: float, whole: float) -> None:
    report = pack(minilm_folder() / "model.safetensors", tmp_path / "p.safetensors", method)
    assert report.payload_bits <= payload
    assert report.file_bits <= whole
    opened = PackedFile(tmp_path / "p.safetensors")
    for tensor in report.tensors:
        if tensor.kind == "plain":
            continue
        symbols = opened.payload(tensor.name).arrays[0].decode()
        limit = histogram(symbols).bits * symbols.size / 8 * 1.005 + 1024
        scales = 4 * opened.stored(tensor.name).rows if method != "grid:sigma/8" else 0
        assert tensor.bytes_after <= limit + scales


def test_minilm_lossless(tmp_path: Path) -> None:
    original = load_file(minilm_folder() / "model.safetensors")
    half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in original.items()}
    for tensors, bits in ((original, 26.6), (half, 10.7)):
        source = write(tmp_path / "a.safetensors", tensors)
        target = tmp_path / f"{bits}.safetensors"
        report = pack(source, target, "lossless")
        assert report.payload_bits <= bits
        found = PackedFile(target).read_all(threads=2)
        assert all(same(found[name], tensor) for name, tensor in tensors.items())


def test_every_dtype_has_its_name() -> None:
    assert {NAMES[dtype] for dtype in DTYPES} <= set(TORCH_DTYPES)
