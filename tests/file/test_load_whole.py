"""A load is all or nothing: what is refused changes no bit of the model, and what is taken leaves nothing unfilled."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ggpass
from ggpass import FormatError, GgpassError, TargetError
from ggpass.file import PackedFile, load, pack, save, unpack
from ggpass.lowering.modules import Lowered
from ggpass.packed.layout import LENGTH_BYTES
from ggpass.packed.manifest import CHECK_KEY, KEY, seal

IDS = torch.arange(40).view(2, 20)


class Rotary(nn.Module):
    """Buffers that no state_dict holds, one of them under an attribute too, as transformers' rotary embeddings."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1 / 100 ** (torch.arange(0, width, 2) / width), persistent=False)
        self.register_buffer("mask", torch.ones(40, 40).tril().bool(), persistent=False)
        self.register_buffer("count", torch.tensor(3), persistent=False)
        self.original_inv_freq = self.inv_freq

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(x.shape[1])[:, None] * self.inv_freq
        return x * torch.cat([angles.cos(), angles.sin()], -1) * self.mask[: x.shape[1], :1] * self.count


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 48)
        self.rotary = Rotary(48)
        self.conv = nn.Conv1d(48, 48, 3, padding=1)
        self.norm = nn.BatchNorm1d(48)
        self.tied = nn.MultiheadAttention(48, 4, batch_first=True)
        self.gain = nn.Parameter(torch.randn(48, 48))
        self.head = nn.Linear(48, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.rotary(self.embed(ids))
        x = self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.head(self.tied(x, x, x)[0] @ self.gain)


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = Net().eval()
    model.norm.running_mean.uniform_(-1, 1)
    return model


def compiled(seed: int) -> nn.Module:
    return ggpass.compile(net(seed), target="rf8-reference")


def traced(seed: int) -> ggpass.Artifact:
    return ggpass.compile(net(seed), args=(IDS,), target="rf8-reference")


def everything(model: Any) -> dict[str, torch.Tensor]:
    module = model.program.graph_module if isinstance(model, ggpass.Artifact) else model
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def written(path: Path, kind: str) -> Path:
    """A file of model 1: saved, packed in three ways, or of an Artifact."""
    if kind == "compiled":
        save(compiled(1), path)
    elif kind == "float":
        save(net(1), path)
    elif kind == "artifact":
        save(traced(1), path)
    else:
        state = {name: tensor.clone() for name, tensor in net(1).state_dict().items()}
        save_file(state, path.with_name("plain.safetensors"))
        pack(path.with_name("plain.safetensors"), path, kind)
    return path


def damage(path: Path, name: str, at: int) -> None:
    """Flip a bit of a tensor, counted from its start or its end."""
    with PackedFile(path) as file:
        entry, start = file.files[0].layout.entries[name], file.files[0].layout.data_at
    data = bytearray(path.read_bytes())
    data[start + (entry.begin if at >= 0 else entry.end) + at] ^= 1
    path.write_bytes(data)


def reworded(path: Path, name: str, **changes: Any) -> None:
    """Change what the manifest says of a tensor, with its checksum made right."""
    data = path.read_bytes()
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    header = json.loads(data[LENGTH_BYTES : LENGTH_BYTES + length])
    manifest = json.loads(header["__metadata__"][KEY])
    manifest["tensors"][name] |= changes
    header["__metadata__"] |= {KEY: json.dumps(manifest), CHECK_KEY: "0" * 8}
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(seal(len(text).to_bytes(8, "little") + text) + data[LENGTH_BYTES + length :])


INTO: dict[str, list[Callable[[int], Any]]] = {
    "compiled": [net, compiled],
    "float": [net],
    "rf8": [net],
    "grid:0.01": [net],
    "lossless": [net],
    "artifact": [traced],
}
CASES = [(kind, i) for kind, makers in INTO.items() for i in range(len(makers))]


@pytest.mark.parametrize(("kind", "which"), CASES)
def test_a_damaged_tensor_anywhere_changes_nothing(tmp_path: Path, kind: str, which: int) -> None:
    """Each tensor of the file in turn, at its start and at its end."""
    path = written(tmp_path / "m.safetensors", kind)
    data = path.read_bytes()
    with PackedFile(path) as file:
        names = [n for n in file.manifest.tensors if file.packed_bytes(n) and file.stored(n).persistent]
    model = INTO[kind][which](2)
    before = everything(model)
    for name in names:
        for at in (0, -1):
            damage(path, name, at)
            with pytest.raises(FormatError):
                load(path, into=model, target="reference")
            path.write_bytes(data)
            after = everything(model)
            assert after.keys() == before.keys()
            assert all(torch.equal(after[n], tensor) for n, tensor in before.items()), name
    assert isinstance(model, ggpass.Artifact) or isinstance(model.embed, Lowered) == (which == 1)
    load(path, into=model, target="reference")
    assert not torch.equal(model(IDS), INTO[kind][which](2)(IDS))


def _wide(model: nn.Module) -> None:
    model.norm = nn.BatchNorm1d(49)


def _more(model: nn.Module) -> None:
    model.extra = nn.Linear(3, 3)


def _late(model: nn.Module) -> None:
    model.zzz = nn.Parameter(torch.zeros(2))


def _other_table(model: nn.Module) -> None:
    model.embed = nn.Embedding(51, 48)


@pytest.mark.parametrize("change", [_wide, _more, _late, _other_table])
@pytest.mark.parametrize("kind", ["compiled", "rf8", "lossless", "float"])
def test_a_model_of_another_shape_is_left_alone(tmp_path: Path, kind: str, change: Callable[[nn.Module], None]) -> None:
    path, model = written(tmp_path / "m.safetensors", kind), net(2)
    change(model)
    before = everything(model)
    with pytest.raises(FormatError):
        load(path, into=model, target="reference")
    after = everything(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(isinstance(module, Lowered) for module in model.modules())
    assert "ggpass_report" not in model.__dict__


def test_a_lowered_model_of_other_scales_or_formats(tmp_path: Path) -> None:
    """What is lowered in another way is refused before the first of its layers is filled."""
    path = written(tmp_path / "m.safetensors", "compiled")
    for other in (
        ggpass.compile(net(2), target="int8-reference"),
        ggpass.compile(net(2), target="rf8-reference", skip=["conv"]),
    ):
        before = everything(other)
        data = path.read_bytes()
        if isinstance(other.conv, Lowered):
            with pytest.raises(FormatError, match="int8 codes in the model"):
                load(path, into=other)
        else:
            damage(path, "gain", 3)
            with pytest.raises(FormatError):
                load(path, into=other)
        path.write_bytes(data)
        assert all(torch.equal(everything(other)[name], tensor) for name, tensor in before.items())
    reworded(path, "gain", kind="plain", check=0)
    model = compiled(2)
    before = everything(model)
    with pytest.raises(FormatError):
        load(path, into=model)
    assert all(torch.equal(everything(model)[name], tensor) for name, tensor in before.items())


def test_an_artifact_of_another_scheme(tmp_path: Path) -> None:
    path = written(tmp_path / "m.safetensors", "artifact")
    scheme = ggpass.Scheme(granularity="tensor")
    other = ggpass.compile(net(2), args=(IDS,), target="rf8-reference", scheme=scheme)
    before = everything(other)
    with pytest.raises(FormatError, match="scales in the file"):
        load(path, into=other)
    assert all(torch.equal(everything(other)[name], tensor) for name, tensor in before.items())


def empty() -> nn.Module:
    with torch.device("meta"):
        return Net().eval()


@pytest.mark.parametrize("kind", ["compiled", "float"])
def test_a_model_without_values_gets_all_of_them(tmp_path: Path, kind: str) -> None:
    path, wanted = written(tmp_path / "m.safetensors", kind), (compiled if kind == "compiled" else net)(1)
    loaded = load(path, into=empty(), target="reference")
    assert not [name for name, tensor in everything(loaded).items() if tensor.device.type == "meta"]
    assert torch.equal(loaded(IDS), wanted(IDS))
    assert loaded.rotary.original_inv_freq is loaded.rotary.inv_freq, "what was one tensor stays one"
    assert loaded.state_dict().keys() == wanted.state_dict().keys()
    assert ggpass.report(loaded).notes == []
    unpack(path, tmp_path / "plain.safetensors")
    from safetensors.torch import load_file

    assert set(load_file(tmp_path / "plain.safetensors")) == set(net(1).state_dict())


def test_a_lowered_model_that_lost_its_values_gets_them_back(tmp_path: Path) -> None:
    path = written(tmp_path / "m.safetensors", "compiled")
    model = compiled(2).to("meta")
    loaded = load(path, into=model, target="reference")
    assert torch.equal(loaded(IDS), compiled(1)(IDS))
    assert loaded.head.lowered is loaded.embed.lowered


def test_own_buffers_of_a_model_with_values_stay(tmp_path: Path) -> None:
    path, model = written(tmp_path / "m.safetensors", "compiled"), net(2)
    model.rotary.count.fill_(7)
    assert int(load(path, into=model, target="reference").rotary.count) == 7


def test_buffers_that_the_file_does_not_hold_are_named(tmp_path: Path) -> None:
    """A packed checkpoint has none, and neither has a file that was saved of a model without them."""
    path, model = written(tmp_path / "m.safetensors", "rf8"), empty()
    with pytest.raises(FormatError, match=r"rotary\.count, rotary\.inv_freq, rotary\.mask.*init_empty_weights"):
        load(path, into=model, target="reference")
    assert model.embed.weight.device.type == "meta"
    partly = empty()
    partly.rotary = Rotary(48)  # as accelerate.init_empty_weights leaves them
    got, wanted = load(path, into=partly, target="reference")(IDS), compiled_as_packed(tmp_path)(IDS)
    # The same values; a bias is added after the sum of products here, and before it there.
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
    strange = empty()
    strange.rotary = Rotary(48)
    strange.scale = torch.empty(3, device="meta")
    with pytest.raises(FormatError, match="scale: on the meta device"):
        load(path, into=strange, target="reference")


def compiled_as_packed(folder: Path) -> nn.Module:
    """What the packed file decodes to, in the float model."""
    model, unpacked = net(1), folder / "back.safetensors"
    unpack(folder / "m.safetensors", unpacked)
    from safetensors.torch import load_file

    model.load_state_dict(load_file(unpacked))
    return model


def test_tied_floats_of_a_model_without_values_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(8, 8)), nn.LayerNorm(8)
            self.c = self.a
            self.d = nn.ModuleList([self.b, nn.LayerNorm(8)])
            self.d[1].weight = self.b.weight

    save(Tied(), tmp_path / "m.safetensors")
    with torch.device("meta"):
        model = Tied()
    load(tmp_path / "m.safetensors", into=model)
    assert model.a is model.c
    assert model.d[1].weight is model.b.weight is model.d[0].weight


def test_targets_and_devices_are_told_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path / "m.safetensors", "compiled")
    expected = compiled(1)(IDS)
    for options in ({"target": "reference"}, {"target": "rf8-reference"}, {"target": "reference", "device": "cpu"}):
        assert torch.equal(ggpass.load(path, into=net(2), **options)(IDS), expected)
    with caplog.at_level(logging.WARNING, logger="ggpass"):
        assert torch.equal(ggpass.load(path, into=net(2), device="reference")(IDS), expected)
    assert "write target='reference'" in caplog.text
    for options, words in (
        ({"target": "nothing"}, "nothing"),
        ({"target": "rf9-cpu"}, "rf9"),
        ({"target": "rf8-nowhere"}, "nowhere"),
        ({"device": "nowhere"}, "no device of torch"),
    ):
        model = net(2)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(TargetError, match=words):
            ggpass.load(path, into=model, **options)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    with pytest.raises(FormatError, match="none of int8"):
        ggpass.load(path, into=net(2), target="int8-reference")


def test_a_target_that_a_user_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ggpass.lowering.operators import REFERENCE
    from ggpass.targets import TARGETS, Target

    monkeypatch.setitem(TARGETS, "toy", Target("toy", REFERENCE))
    path = written(tmp_path / "m.safetensors", "compiled")
    for target in ("toy", "rf8-toy"):
        loaded = ggpass.load(path, into=net(2), target=target)
        assert loaded.embed.lowered.operators is REFERENCE
        assert torch.equal(loaded(IDS), compiled(1)(IDS))


def test_an_error_of_ours_for_what_no_model_is(tmp_path: Path) -> None:
    path = written(tmp_path / "m.safetensors", "compiled")
    with pytest.raises(GgpassError, match="into=model"):
        ggpass.load(path)
