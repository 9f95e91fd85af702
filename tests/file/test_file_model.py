"""Saving a compiled model and loading it into a fresh one: the same codes, the same outputs, no float copy."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import ggpass
from ggpass import FormatError
from ggpass.file import PackedFile, load, pack, save
from ggpass.formats import FORMATS
from ggpass.lowering.modules import Lowered


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Many small torch operations: on a busy machine their threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """A tied embedding, a convolution, a bias, a buffer, and an attention whose parent reads the child's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 64)
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 300, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(self.embed(ids).transpose(1, 2))).transpose(1, 2)
        return self.head(self.attention(x, x, x)[0])


IDS = torch.arange(40).view(2, 20)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_every_format_comes_back(name: str, granularity: str, tmp_path: Path) -> None:
    target, path, scheme = f"{name}-reference", tmp_path / "m.safetensors", ggpass.Scheme(granularity)
    for args in ((), ((IDS,),)):
        first, other = (ggpass.compile(Net().eval(), *args, target=target, scheme=scheme) for _ in range(2))
        save(first, path)
        assert not torch.equal(other(IDS), first(IDS))
        assert torch.equal(load(path, into=other)(IDS), first(IDS))
    module = ggpass.compile(Net().eval(), target=target, scheme=scheme)
    save(module, path)
    assert torch.equal(load(path, into=Net().eval(), target="reference")(IDS), module(IDS))


@pytest.fixture
def compiled() -> nn.Module:
    net = Net().eval()
    net.norm.running_mean.uniform_(-1, 1)
    return ggpass.compile(net, target="rf8-reference")


def test_a_compiled_model_comes_back(compiled: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save(compiled, path)
    opened = PackedFile(path)
    assert opened.stored("embed.weight").kind == "codes"
    assert opened.manifest.aliases == {"head.weight": "embed.weight"}  # tied: stored once
    assert opened.stored("norm.running_mean").kind == "plain"
    loaded = load(path, into=Net().eval(), target="reference")
    assert isinstance(loaded, Net)
    assert torch.equal(loaded(IDS), compiled(IDS))
    for name in ("embed", "conv", "head"):
        module, original = getattr(loaded, name), getattr(compiled, name)
        assert isinstance(module, Lowered)
        assert torch.equal(module.lowered.codes, original.lowered.codes)
    assert loaded.head.lowered is loaded.embed.lowered
    assert "embed.weight" in str(ggpass.report(loaded).changes)


def test_into_a_model_without_values(compiled: nn.Module, tmp_path: Path) -> None:
    save(compiled, tmp_path / "m.safetensors")
    with torch.device("meta"):
        empty = Net().eval()
    loaded = load(tmp_path / "m.safetensors", into=empty, target="reference")
    assert not [n for n, t in loaded.state_dict().items() if t.device.type == "meta"]
    assert torch.equal(loaded(IDS), compiled(IDS))


def test_into_a_model_that_is_lowered(compiled: nn.Module, tmp_path: Path) -> None:
    save(compiled, tmp_path / "m.safetensors")
    other = load(tmp_path / "m.safetensors", into=ggpass.compile(Net().eval(), target="rf8-reference"))
    assert torch.equal(other(IDS), compiled(IDS))
    with pytest.raises(FormatError, match="int8 codes in the model"):
        load(tmp_path / "m.safetensors", into=ggpass.compile(Net().eval(), target="int8-reference"))


def test_float_models_save_and_load(tmp_path: Path) -> None:
    net = Net().eval()
    save(net, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors", into=Net().eval())
    assert torch.equal(loaded(IDS), net(IDS))


def test_a_packed_checkpoint_loads_as_codes(tmp_path: Path) -> None:
    """`ggpass pack` and then load equals `ggpass.compile`: the checkpoint is quantized once, wherever it happens."""
    net = Net().eval()
    save(net, tmp_path / "float.safetensors")
    from ggpass.file import unpack

    unpack(tmp_path / "float.safetensors", tmp_path / "plain.safetensors")
    pack(tmp_path / "plain.safetensors", tmp_path / "m.safetensors", "rf8", only=("embed", "conv", "head"))
    loaded = load(tmp_path / "m.safetensors", into=Net().eval(), target="reference")
    expected = ggpass.compile(net, target="rf8-reference", only=["embed", "conv", "head"])
    assert torch.equal(loaded(IDS), expected(IDS))


def test_what_does_not_fit_is_named(compiled: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save(compiled, path)
    bigger = Net().eval()
    bigger.extra = nn.Linear(3, 3)
    with pytest.raises(FormatError, match=r"extra\.weight"):
        load(path, into=bigger)
    wide = Net().eval()
    wide.norm = nn.BatchNorm1d(65)
    with pytest.raises(FormatError, match=r"norm\.weight is \[64\] in the file and \[65\]"):
        load(path, into=wide)
    with pytest.raises(FormatError, match="into=model"):
        load(path)
    with pytest.raises(FormatError, match=r"named \.safetensors"):
        save(compiled, tmp_path / "m.bin")
    smaller = Net().eval()
    smaller.norm = nn.Identity()
    loaded = load(path, into=smaller)
    assert "norm.bias" in " ".join(ggpass.report(loaded).notes)


def test_transposed_codes_of_conv1d(tmp_path: Path) -> None:
    """Hugging Face's Conv1D has output channels as columns: its codes are those of the transposed matrix."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    net = nn.Sequential(conv1d(48, 32))
    nn.init.normal_(net[0].weight)
    lowered = ggpass.compile(net, target="rf8-reference")
    save(lowered, tmp_path / "m.safetensors")
    opened = PackedFile(tmp_path / "m.safetensors")
    assert opened.stored("0.weight").transposed
    assert torch.equal(opened.read("0.weight"), lowered[0].weight)
    loaded = load(tmp_path / "m.safetensors", into=nn.Sequential(conv1d(48, 32)), target="reference")
    x = torch.randn(5, 32)
    assert torch.equal(loaded(x), lowered(x))


def test_saving_leaves_the_model_alone(compiled: nn.Module, tmp_path: Path) -> None:
    before = copy.deepcopy(compiled.state_dict())
    save(compiled, tmp_path / "m.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in compiled.state_dict().items())


def test_minilm_saved_and_loaded(tmp_path: Path) -> None:
    real = pytest.importorskip("support.real_models")
    transformers = pytest.importorskip("transformers")
    compiled = ggpass.compile(real.load_minilm(), target="rf8-reference")
    save(compiled, tmp_path / "m.safetensors")
    config = transformers.AutoConfig.from_pretrained(real.minilm_folder())
    fresh = transformers.AutoModel.from_config(config).eval()
    loaded = load(tmp_path / "m.safetensors", into=fresh, target="reference")
    ids = torch.randint(1000, 20_000, (2, 16))
    assert torch.equal(loaded(ids)[0], compiled(ids)[0])
    on_cpu = load(tmp_path / "m.safetensors", into=transformers.AutoModel.from_config(config).eval())
    assert torch.allclose(on_cpu(ids)[0], compiled(ids)[0], atol=1e-3)  # other kernels, other order of sums
    assert (tmp_path / "m.safetensors").stat().st_size * 8 / 22.7e6 <= 6.55


def test_an_artifacts_tensors_come_back(tmp_path: Path) -> None:
    """The graph is traced again; the file fills it, merged weights and all."""
    net = Net().eval()
    art = ggpass.compile(net, args=(IDS,), target="rf8-reference")
    save(art, tmp_path / "m.safetensors")
    other = ggpass.compile(Net().eval(), args=(IDS,), target="rf8-reference")
    assert not torch.equal(other(IDS), art(IDS))
    assert load(tmp_path / "m.safetensors", into=other) is other
    assert torch.equal(other(IDS), art(IDS))
    with pytest.raises(FormatError, match="int8"):
        load(tmp_path / "m.safetensors", into=ggpass.compile(net, args=(IDS,), target="int8-reference"))
