"""Checkpoints, their inspection and its plots: real figures, every kind of tensor, every way to be broken."""

import json
import math
import struct
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.real_models import minilm_folder
from torch import Tensor

from ggpass.errors import FormatError, GgpassError
from ggpass.formats import FORMATS, Scheme, scheme
from ggpass.ggd import GGD, fit_moments
from ggpass.inspection import plot
from ggpass.inspection.inspect import Inspection, fit_format, inspect_checkpoint, sqnr_db
from ggpass.packed.checkpoint import Checkpoint


def save(path: Path, **tensors: Tensor) -> Path:
    save_file(tensors, path)
    return path


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def shard(folder: Path, index: object = None) -> Path:
    """A sharded checkpoint of two files and its index; `index` overrides the index's content."""
    save(folder / "model-00001-of-00002.safetensors", a=torch.randn(4, 8), b=torch.randn(3))
    save(folder / "model-00002-of-00002.safetensors", c=torch.randn(5, 8))
    weight_map = {n: f"model-0000{k}-of-00002.safetensors" for n, k in (("a", 1), ("b", 1), ("c", 2))}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map} if index is None else index))
    return path


# Reading.


def test_a_file_a_directory_and_an_index_give_the_same_tensors(tmp_path: Path) -> None:
    index = shard(tmp_path)
    for path in (tmp_path, index, str(index)):
        checkpoint = Checkpoint(path)
        assert [(t.name, t.shape) for t in checkpoint.tensors] == [("a", (4, 8)), ("b", (3,)), ("c", (5, 8))]
        assert checkpoint.read("c").shape == (5, 8)
    whole = save(tmp_path / "other.safetensors", **{n: Checkpoint(index).read(n) for n in "abc"})
    assert torch.equal(Checkpoint(whole).read("a"), Checkpoint(index).read("a"))


def test_a_directory_without_an_index_gives_all_its_files(tmp_path: Path) -> None:
    save(tmp_path / "one.safetensors", a=torch.ones(2, 2))
    save(tmp_path / "two.safetensors", b=torch.ones(2, 2))
    assert [t.name for t in Checkpoint(tmp_path).tensors] == ["a", "b"]
    save(tmp_path / "model.safetensors", m=torch.ones(2, 2))
    assert [t.name for t in Checkpoint(tmp_path).tensors] == ["m"]  # what transformers would load


def test_headers_tell_dtype_and_bytes_without_reading(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.safetensors",
        half=torch.ones(3, 5, dtype=torch.bfloat16),
        codes=torch.ones(7, dtype=torch.uint8),
        scalar=torch.tensor(1.0),
        fp8=torch.ones(2, 4).to(torch.float8_e4m3fn),
    )
    infos = {t.name: t for t in Checkpoint(path).tensors}
    assert {n: (t.dtype, t.size, t.nbytes) for n, t in infos.items()} == {
        "half": ("BF16", 15, 30),
        "codes": ("U8", 7, 7),
        "scalar": ("F32", 1, 4),
        "fp8": ("F8_E4M3", 8, 8),
    }


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "x.ckpt", "x.pkl"])
@pytest.mark.parametrize("as_directory", [False, True])
def test_pickles_are_refused_unopened(tmp_path: Path, name: str, as_directory: bool) -> None:
    path = tmp_path / name
    path.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")  # would run a command
    with pytest.raises(FormatError, match=r"pickle.*run any code.*safetensors.*save_pretrained") as caught:
        Checkpoint(tmp_path if as_directory else path)
    assert name in str(caught.value)


BROKEN: list[tuple[str, Callable[[Path], Path], str]] = [
    ("missing", lambda d: d / "none.safetensors", r"none\.safetensors does not exist; give"),
    ("empty directory", lambda d: d, r"holds no \.safetensors file; give the directory"),
    ("gguf", lambda d: put(d / "m.gguf", b"GGUF"), r"m\.gguf is a GGUF file; load it with"),
    ("other suffix", lambda d: put(d / "m.txt", b"x"), r"m\.txt is not named \.safetensors"),
    (
        "not safetensors",
        lambda d: put(d / "m.safetensors", b"hello"),
        r"m\.safetensors is no safetensors file, or is damaged .*; download or save it again",
    ),
    (
        "index is no JSON",
        lambda d: put(d / "m.safetensors.index.json", b"{").parent,
        r"index\.json is corrupt: .*; fetch the file again",
    ),
    ("index is a list", lambda d: shard(d, []), r"has no weight_map"),
    ("index without files", lambda d: shard(d, {"weight_map": {"a": 3}}), r"has no weight_map"),
    (
        "index leaves its directory",
        lambda d: shard(d, {"weight_map": {"a": "../m.safetensors"}}),
        r"shard outside its own directory: '\.\./m\.safetensors'; do not trust",
    ),
    ("index names a pickle", lambda d: shard(d, {"weight_map": {"a": "m.bin"}}), r"not safetensors: 'm\.bin'; save"),
    (
        "shard is missing",
        lambda d: shard(d, {"weight_map": {"a": "model-3.safetensors"}}),
        r"model-3\.safetensors is missing, though model\.safetensors\.index\.json names it; download it",
    ),
    (
        "weight is elsewhere",
        lambda d: shard(d, {"weight_map": {"c": "model-00001-of-00002.safetensors"}}),
        r"index says that c is in model-00001.* does not hold it; download",
    ),
]


@pytest.mark.parametrize(("make", "message"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_what_cannot_be_read_is_named_with_the_next_action(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(FormatError, match=message):
        Checkpoint(path)


def test_a_truncated_file_is_found_out(tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors", a=torch.randn(64, 64))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"damaged.*download or save it again"):
        Checkpoint(path)


def test_a_header_that_lies_about_its_size_is_found_out(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(FormatError, match="damaged"):
        Checkpoint(path)


def test_one_name_in_two_files_is_ambiguous(tmp_path: Path) -> None:
    save(tmp_path / "one.safetensors", a=torch.ones(2, 2))
    save(tmp_path / "two.safetensors", a=torch.zeros(2, 2))
    with pytest.raises(FormatError, match=r"a is both in one\.safetensors and in two\.safetensors; name the file"):
        Checkpoint(tmp_path)


def test_unknown_tensors_and_files_that_change_are_named(tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors", a=torch.ones(2, 2))
    checkpoint = Checkpoint(path)
    with pytest.raises(FormatError, match=r"no tensor 'b'; `ggpass inspect` lists"):
        checkpoint.read("b")
    path.unlink()
    with pytest.raises(FormatError, match=r"m\.safetensors, a cannot be read"):
        checkpoint.read("a")


# Figures.


@pytest.fixture(scope="module")
def minilm() -> Inspection:
    return inspect_checkpoint(minilm_folder())


def test_minilm_has_the_figures_of_the_specification(minilm: Inspection) -> None:
    # The specification prints entropies to 0.01 and SQNR to 0.5 dB; INT8's 40.5 averages other tensors (here 41.1).
    assert 6.26 <= minilm.entropy("rf8") <= 6.33
    assert minilm.entropy("e4m3") == pytest.approx(6.52, abs=0.005)
    assert minilm.entropy("int8") == pytest.approx(7.26, abs=0.005)
    assert minilm.sqnr("rf8") == pytest.approx(28.5, abs=0.05)
    assert minilm.sqnr("e4m3") == pytest.approx(31.5, abs=0.25)
    assert minilm.sqnr("int8") == pytest.approx(40.5, abs=0.75)


def test_minilm_weights_are_near_gaussian_and_nearly_all_bytes(minilm: Inspection) -> None:
    shapes = sorted(f.ggd.shape for f in minilm.weights if f.ggd and f.info.size > 100_000)
    assert 1.1 < shapes[0] < shapes[len(shapes) // 2] < shapes[-1] <= 2.01
    assert 1.35 < shapes[len(shapes) // 4] < shapes[3 * len(shapes) // 4] < 1.85
    assert minilm.weight_count == 22_682_112
    assert minilm.weight_share > 0.998
    assert [s.info.name for s in minilm.skipped] == ["embeddings.position_ids"]
    assert "integer (I64)" in minilm.skipped[0].reason


def test_fit_format_equals_a_direct_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 50) * torch.logspace(-2, 2, 37)[:, None]
    monkeypatch.setattr(scheme, "BLOCK_ELEMENTS", 120)
    for fmt in FORMATS.values():
        for how in (Scheme("channel"), Scheme("tensor")):
            got = fit_format(weight, fmt, how)
            amax = (
                weight.abs().amax(1, keepdim=True) if how.granularity == "channel" else weight.abs().max()[None, None]
            )
            scale = amax / fmt.amax
            if fmt.default_scale == "pow2":
                scale = scale.log2().ceil().exp2()
            codes = fmt.encode(weight / scale)
            noise = (weight.double() - fmt.decode(codes).double() * scale.double()).square().sum().item()
            assert got.noise == pytest.approx(noise, rel=1e-9)
            occurring, counts = codes.flatten().unique(return_counts=True)
            assert torch.equal(got.counts.nonzero()[:, 0].to(torch.uint8), occurring)
            p = counts.double() / codes.numel()
            assert got.entropy == pytest.approx(-(p * p.log2()).sum().item(), rel=1e-12)


def test_totals_weigh_the_matrices_by_their_size(tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors", big=torch.randn(90, 100), small=torch.ones(10, 100), v=torch.ones(500))
    result = inspect_checkpoint(path)
    big, small = result.weights
    assert small.formats["rf8"].entropy == 0.0
    assert result.entropy("rf8") == pytest.approx(0.9 * big.formats["rf8"].entropy)
    noise = big.formats["rf8"].noise + small.formats["rf8"].noise
    assert result.sqnr("rf8") == pytest.approx(10 * math.log10((big.energy + small.energy) / noise))
    assert (result.weight_count, result.weight_bytes, result.total_bytes) == (10_000, 40_000, 42_000)
    assert result.weight_share == pytest.approx(40 / 42)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_floating_dtype_is_inspected(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.randn(64, 64).to(dtype)
    result = inspect_checkpoint(save(tmp_path / "m.safetensors", w=weight))
    assert result.weights[0].ggd == fit_moments(weight)
    assert 27 < result.weights[0].sqnr("rf8") < 30


def test_convolutions_are_taken_by_output_channel(tmp_path: Path) -> None:
    weight = torch.randn(8, 4, 3, 3) * torch.logspace(-3, 3, 8)[:, None, None, None]
    fit = inspect_checkpoint(save(tmp_path / "m.safetensors", w=weight)).weights[0]
    assert fit.formats["int8"].noise == pytest.approx(fit_format(weight.flatten(1), FORMATS["int8"]).noise)
    assert fit.sqnr("int8") > 38


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "m.safetensors", **{f"w{i}": torch.randn(8, 8) for i in range(5)})
    alive: list[weakref.ref[Tensor]] = []
    most = [0]
    read = Checkpoint.read

    def counted(self: Checkpoint, name: str) -> Tensor:
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        most[0] = max(most[0], sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counted)
    assert len(inspect_checkpoint(path).weights) == len(alive) == 5
    assert most[0] == 1


def test_odd_tensors_are_listed_with_their_reasons(tmp_path: Path) -> None:
    broken = torch.ones(4, 4)
    broken[2, 1] = math.nan
    path = save(
        tmp_path / "m.safetensors",
        broken=broken,
        codes=torch.ones(4, 4, dtype=torch.uint8),
        empty=torch.empty(0, 4),
        fp8=torch.ones(4, 4).to(torch.float8_e4m3fn),
        mask=torch.ones(4, 4, dtype=torch.bool),
        scalar=torch.tensor(3.0),
        vector=torch.ones(4),
        zeros=torch.zeros(4, 4),
    )
    seen: list[str] = []
    result = inspect_checkpoint(path, progress=lambda info: seen.append(info.name))
    assert len(seen) == 8
    assert [info.name for info in result.vectors] == ["scalar", "vector"]
    reasons = {skip.info.name: skip.reason for skip in result.skipped}
    assert set(reasons) == {"broken", "codes", "empty", "fp8", "mask"}
    assert "NaN or infinity in channel 2 of 4" in reasons["broken"]
    assert "integer (U8)" in reasons["codes"]
    assert "integer (BOOL)" in reasons["mask"]
    assert "empty" in reasons["empty"]
    assert "already F8_E4M3" in reasons["fp8"]
    zeros = result.weights[0]
    assert (zeros.info.name, zeros.ggd, zeros.formats["rf8"].entropy) == ("zeros", None, 0.0)
    assert zeros.sqnr("rf8") == math.inf


def test_a_checkpoint_without_matrices_has_no_totals(tmp_path: Path) -> None:
    result = inspect_checkpoint(save(tmp_path / "m.safetensors", v=torch.ones(4)))
    assert result.weights == ()
    assert math.isnan(result.entropy("rf8"))
    assert math.isnan(result.sqnr("rf8"))
    assert result.weight_share == 0.0
    assert result.as_dict()["totals"]["formats"]["rf8"] == {"sqnr_db": None, "entropy_bits": None}


def test_as_dict_is_json_whatever_is_in_it(tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors", zeros=torch.zeros(4, 4), w=torch.randn(4, 4), v=torch.ones(3))
    data = json.loads(json.dumps(inspect_checkpoint(path).as_dict(), allow_nan=False))
    assert [w["name"] for w in data["weights"]] == ["w", "zeros"]
    assert data["weights"][1]["formats"]["rf8"]["sqnr_db"] is None
    assert data["weights"][0]["shape"] == [4, 4]
    assert data["totals"]["weights"] == 32


def test_sqnr_of_no_noise_is_infinite() -> None:
    assert sqnr_db(1.0, 0.01) == pytest.approx(20.0)
    assert sqnr_db(1.0, 0.0) == math.inf


# Plots.


def test_histogram_is_a_density_in_units_of_sigma(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(100, 1000) * 0.02
    weight[0, :10] = 1.0
    ggd = GGD(2.0, 0.02 * math.sqrt(2))
    got = plot.histogram("w", weight, ggd)
    width = 2 * plot.RANGE / plot.BINS
    assert got.beyond == pytest.approx(1e-4)
    assert got.density.sum().item() * width == pytest.approx(1 - 1e-4)
    assert got.density[plot.BINS // 2].item() == pytest.approx(1 / math.sqrt(2 * math.pi), rel=0.05)
    monkeypatch.setattr("ggpass.ggd.blocks.CPU_BLOCK", 5000)
    assert torch.equal(plot.histogram("w", weight, ggd).density, got.density)


@pytest.mark.parametrize("count", [1, 5, 8])
@pytest.mark.parametrize("log_y", [True, False])
def test_a_png_is_drawn_for_any_number_of_panels(tmp_path: Path, count: int, log_y: bool) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib; pip install 'ggpass[plot]'")
    path = save(tmp_path / "m.safetensors", **{f"layer.{i}.weight": torch.randn(i + 4, 32) for i in range(9)})
    result = inspect_checkpoint(path)
    histograms = plot.largest_histograms(result, Checkpoint(path), count)
    assert [h.name for h in histograms] == [f"layer.{i}.weight" for i in range(9 - count, 9)]
    plot.draw(histograms, tmp_path / "out.png", "title", log_y)
    data = (tmp_path / "out.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 800
    assert height >= 400


def texts_of(figure: Any) -> list[tuple[str, Any]]:
    """Every text that is drawn, and its box: titles, notes, legend, axis labels, numbers within the axes' limits."""
    figure.canvas.draw()
    texts = [figure._supxlabel, figure._supylabel]
    for legend in figure.legends:
        texts += [legend.get_title(), *legend.get_texts()]
    for axis in figure.axes:
        texts += [axis.title, *axis.texts]
        for side, limits in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            shown = [tick for tick in side.get_major_ticks() if limits[0] <= tick.get_loc() <= limits[1]]
            texts += [tick.label1 for tick in shown if tick.label1.get_visible()]
    return [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]


def test_no_text_of_a_plot_overlaps_another(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib; pip install 'ggpass[plot]'")
    name = "encoder.block.11.layer.2.DenseReluDense.wi_{}.with_a_long_name.weight"
    path = save(tmp_path / "m.safetensors", **{name.format(i): torch.randn(8, 64) for i in range(7)})
    histograms = plot.largest_histograms(inspect_checkpoint(path), Checkpoint(path), 7)
    figure = plot.figure_of(histograms, "a title that says which model this is", log_y=True)
    boxes = texts_of(figure)
    whole = figure.bbox
    assert len(boxes) > 40
    for i, (text, box) in enumerate(boxes):
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1, f"{text!r} leaves the figure"
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1, f"{text!r} leaves the figure"
        for other, other_box in boxes[i + 1 :]:
            assert not box.overlaps(other_box), f"{text!r} overlaps {other!r}"


def test_plot_errors_name_the_next_action(tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors", zeros=torch.zeros(4, 4))
    with pytest.raises(GgpassError, match=r"no weight with a fitted density; leave --plot out"):
        plot.largest_histograms(inspect_checkpoint(path), Checkpoint(path))
    histogram = plot.histogram("w", torch.randn(8, 8), GGD(2.0, math.sqrt(2)))
    with pytest.raises(GgpassError, match=r"cannot be written .*; name a \.png in a directory that exists"):
        plot.draw([histogram], tmp_path / "none" / "out.png", "title")


def test_short_names_keep_the_end_that_tells_weights_apart() -> None:
    assert plot.short_name("a.b.weight") == "a.b"
    long = "model.decoder.layers.23.self_attn.out_proj.lora_A.default.weight"
    assert plot.short_name(long, 20) == "…proj.lora_A.default"
