"""The `.weight` of a quantized layer: it decodes when computed with, no write is lost, questions decode nothing."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import fusion

import ggpass
from ggpass import WeightError
from ggpass.lowering.modules import LoweredWeight
from ggpass.lowering.weight_view import WeightView

Write = Callable[[nn.Module], Any]


def compiled(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return ggpass.compile(nn.Sequential(layer), target="rf8-reference")[0]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(32, 48),
    "embedding": lambda: nn.Embedding(48, 32),
    "conv": lambda: nn.Conv2d(8, 16, 3),
}


def _add_data(layer: nn.Module) -> None:
    layer.weight.data += 1


def _assign_data(layer: nn.Module) -> None:
    layer.weight.data = torch.zeros(layer.weight.shape)


def _set_rows(layer: nn.Module) -> None:
    layer.weight[1:3] = 0


def _set_rows_of_data(layer: nn.Module) -> None:
    layer.weight.data[0, 0] = 0


def _replace(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(torch.zeros(layer.weight.shape))


def _train(layer: nn.Module) -> None:
    layer.weight.requires_grad = True


WRITES: dict[str, Write] = {
    "data +=": _add_data,
    "data =": _assign_data,
    "[] =": _set_rows,
    "data[] =": _set_rows_of_data,
    "weight =": _replace,
    "requires_grad =": _train,
    "requires_grad_": lambda layer: layer.weight.requires_grad_(),
    "layer.requires_grad_": lambda layer: layer.requires_grad_(True),
    "register_parameter": lambda layer: layer.register_parameter("weight", nn.Parameter(torch.zeros(2))),
    "copy_": lambda layer: layer.weight.copy_(torch.zeros(layer.weight.shape)),
    "init.zeros_": lambda layer: nn.init.zeros_(layer.weight),
    "init.kaiming_uniform_": lambda layer: nn.init.kaiming_uniform_(layer.weight),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "out=": lambda layer: torch.add(torch.zeros(layer.weight.shape), 1, out=layer.weight),
    "of a transpose": lambda layer: layer.weight.transpose(0, 1).zero_(),
    "of a row": lambda layer: layer.weight[0].mul_(2),
    "of a flat view": lambda layer: layer.weight.view(-1)[5:].fill_(1),
    "of many": lambda layer: torch._foreach_mul_([torch.zeros(2), layer.weight], 2.0),
    "clamp_": lambda layer: torch.clamp_(layer.weight, 0, 1),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("write", WRITES)
def test_no_write_is_lost(kind: str, write: str) -> None:
    layer = compiled(LAYERS[kind]())
    before = layer.weight.clone()
    with torch.no_grad(), pytest.raises((WeightError, KeyError), match=r"0\.weight, which is quantized|already exists"):
        WRITES[write](layer)
    assert torch.equal(layer.weight.clone(), before)


READS: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda w: w.double().sum(),
    "matmul": lambda w: w.flatten(1) @ torch.ones(w[0].numel()),
    "transpose": lambda w: w.transpose(0, 1) + 0,
    "row": lambda w: w[3] * 2,
    "rows by a tensor": lambda w: w[torch.tensor([1, 0])],
    "mask": lambda w: w[w > 0],
    "narrow": lambda w: torch.narrow(w, 0, 1, 2).contiguous(),
    "to": lambda w: w.to(torch.bfloat16),
    "data": lambda w: w.data.clone(),
    "detach": lambda w: w.detach().cpu().numpy().copy(),
    "stack": lambda w: torch.stack([w, w]),
    "where": lambda w: torch.where(w > 0, w, 0),
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "einsum": lambda w: torch.einsum("a...->a", w),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("read", READS)
def test_computing_with_it_is_computing_with_the_decoded_weight(kind: str, read: str) -> None:
    layer = compiled(LAYERS[kind]())
    plain = layer.lowered.decode()
    got, wanted = READS[read](layer.weight), READS[read](plain)
    assert type(got) is type(wanted)
    assert (got == wanted).all()


def test_questions_decode_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = compiled(nn.Linear(32, 48).to(torch.bfloat16))
    monkeypatch.setattr(LoweredWeight, "decode", lambda self: pytest.fail("decoded"))
    weight = layer.weight
    assert (weight.dtype, weight.device, weight.shape) == (torch.bfloat16, torch.device("cpu"), (48, 32))
    assert (weight.numel(), weight.dim(), weight.ndim, weight.size(0), weight.nbytes) == (1536, 2, 2, 48, 3072)
    assert weight.is_floating_point()
    assert not weight.requires_grad
    assert weight.T.shape == (32, 48)
    assert weight[0].dtype is torch.bfloat16
    assert isinstance(weight, WeightView)
    weight.requires_grad = False


def test_tied_layers_share_the_view() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.h = nn.Embedding(48, 32), nn.Linear(32, 48, bias=False)
            self.h.weight = self.e.weight

    model = ggpass.compile(Tied(), target="rf8-reference")
    weight = model.e.weight
    assert model.h.weight is weight
    assert model.h.weight.data_ptr() == weight.data_ptr()
    apart = ggpass.compile(nn.Sequential(nn.Embedding(48, 32), nn.Linear(32, 48, bias=False)), target="rf8-reference")
    apart[1].weight = apart[0].weight  # tying quantized layers is no write
    ids = torch.arange(5)
    assert torch.equal(apart(ids), torch.nn.functional.linear(apart[0](ids), apart[0].weight))
    assert model.half().e.weight.dtype is torch.float16


@pytest.mark.parametrize("kind", LAYERS)
def test_dequantize_gives_the_float_model_back(kind: str) -> None:
    model = ggpass.compile(nn.Sequential(LAYERS[kind]()), target="rf8-reference")
    x = torch.arange(4) if kind == "embedding" else torch.randn(2, *((32,) if kind == "linear" else (8, 5, 5)))
    wanted, weight = model(x), model[0].weight.clone()
    assert ggpass.dequantize(model) is model
    assert type(model[0]) is type(LAYERS[kind]())
    assert isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(model[0].weight, weight)
    # The same products in another order of factors: 128 terms, a bound of 128 · 2^-23 on values of size 1.
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=128 * 2**-23)
    _add_data(model[0])
    assert torch.equal(model[0].weight, weight + 1)
    assert ggpass.report(ggpass.compile(model, target="rf8-reference")).lowered_share == 1.0


def test_dequantize_keeps_ties() -> None:
    float_model = nn.Sequential(nn.Embedding(48, 32), nn.Linear(32, 48, bias=False))
    float_model[1].weight = float_model[0].weight
    model = ggpass.dequantize(ggpass.compile(float_model, target="int8-reference"))
    assert model[1].weight is model[0].weight


def test_fusing_a_batch_norm_into_a_quantized_convolution_is_refused() -> None:
    model = ggpass.compile(nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)).eval(), target="rf8-reference")
    with pytest.raises(WeightError, match=r"0\.weight, which is quantized.*ggpass\.dequantize"):
        fusion.fuse_conv_bn_eval(model[0], model[1])
    fused = fusion.fuse_conv_bn_eval(*ggpass.dequantize(model))
    assert isinstance(fused.weight, nn.Parameter)


def test_the_codebook_survives_the_meta_device_and_to_empty() -> None:
    model = ggpass.compile(nn.Sequential(nn.Linear(32, 48)), target="rf8-reference")
    state, x = model.state_dict(), torch.randn(3, 32)
    wanted = model(x)
    for assign in (True, False):
        twin = copy.deepcopy(model).to("meta")
        if not assign:
            twin = twin.to_empty(device="cpu")
        twin.load_state_dict(state, assign=assign)
        assert torch.equal(twin(x), wanted)


def test_its_memory_cannot_be_taken_past_python() -> None:
    """`x.data = view` asks nobody: torch itself refuses tensors of another device."""
    layer, other = compiled(nn.Linear(32, 48)), nn.Linear(32, 48)
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        other.weight.data = layer.weight
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        other.weight.data = layer.weight.data[:5]
    with torch.no_grad():
        other.weight.copy_(layer.weight)
        other.weight[:5] = layer.weight.data[5:10]
    assert torch.equal(other.weight[5:], layer.weight[5:] + 0)
    assert torch.equal(other.weight[:5], layer.weight[5:10] + 0)
    assert nn.Parameter(layer.weight + 0).requires_grad
