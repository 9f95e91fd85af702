"""Matrices of modules that have no operator of their own: quantized all the same, and the module's forward runs on."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

import ggpass
from ggpass import WeightError
from ggpass.lowering.modules import LoweredWeight
from ggpass.lowering.weight_view import QuantizedWeight
from ggpass.packed.reader import PackedFile


class First(nn.Module):
    """The first output of a module that has several."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Tensor) -> Tensor:
        return self.inner(*args)[0]


class ByProduct(nn.Linear):
    """A linear that is written as a product."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.matmul(input, self.weight.t()) + self.bias


class Twice(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Positions(nn.Embedding):
    """An embedding that reads its table itself."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.embedding(input + 2, self.weight, self.padding_idx)


class Adapted(nn.Linear):
    """A linear with matrices beside its weight."""

    def __init__(self) -> None:
        super().__init__(64, 64)
        self.down, self.up = nn.Parameter(torch.randn(4, 64)), nn.Parameter(torch.randn(64, 4))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input @ self.down.T @ self.up.T


class Standardized(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2), keepdim=True)
        return functional.conv1d(input, weight / self.weight.std(), self.bias)


class Experts(nn.Module):
    """Stacks of matrices: a loop with integers, one with tensors, and one product of all."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 96, 64))
        self.down = nn.Parameter(torch.randn(3, 64, 96))
        self.mix = nn.ParameterList([torch.randn(3, 64, 64)])
        self.router = nn.Parameter(torch.randn(3, 64))

    def forward(self, x: Tensor) -> Tensor:
        share = functional.linear(x, self.router).softmax(-1)
        each = [
            functional.linear(functional.linear(x, self.up[e]).relu(), self.down[torch.tensor(e)]) for e in range(3)
        ]
        all_of_them = torch.einsum("bsk,enk->bsen", x, self.mix[0])
        return ((torch.stack(each, 2) + all_of_them) * share.unsqueeze(-1)).sum(2)


def quiet(make: Callable[[], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


X, IMAGE = torch.randn(2, 6, 64), torch.randn(2, 8, 9, 9)
IDS = torch.arange(10).view(2, 5)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "LSTM": (lambda: First(nn.LSTM(64, 64, 2, proj_size=32, batch_first=True)), (X,)),
    "RNN": (lambda: First(nn.RNN(64, 64, bidirectional=True)), (X,)),
    "GRU": (lambda: First(nn.GRU(64, 64)), (X,)),
    "GRUCell": (lambda: nn.GRUCell(64, 64), (X[0],)),
    "MultiheadAttention": (lambda: First(nn.MultiheadAttention(64, 4)), (X, X, X)),
    "MultiheadAttention kdim": (lambda: First(nn.MultiheadAttention(64, 4, kdim=64, vdim=64)), (X, X, X)),
    "TransformerDecoder": (lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(64, 4, 96), 2), (X, X)),
    "Transformer": (lambda: nn.Transformer(64, 4, 1, 1, 96), (X, X)),
    "product": (lambda: ByProduct(64, 48), (X,)),
    "super": (lambda: Twice(64, 48), (X,)),
    "own embedding": (lambda: Positions(20, 64), (IDS,)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(20, 64), (IDS,)),
    "adapted": (Adapted, (X,)),
    "standardized": (lambda: Standardized(6, 32, 5), (X,)),
    "Conv3d": (lambda: nn.Conv3d(2, 16, 3), (IMAGE.view(2, 2, 4, 9, 9),)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(6, 16, 4), (X,)),
    "Bilinear": (lambda: nn.Bilinear(64, 64, 8), (X, X)),
    "experts": (Experts, (X,)),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Conv1d(6, 32, 5)), (X,)),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(64, 64)), (X,)),
    "old weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(64, 64)), (X,)),
    "old spectral_norm": (lambda: nn.utils.spectral_norm(nn.Conv2d(8, 16, 3)), (IMAGE,)),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(64, 64), "weight", 0.5), (X,)),
}
SERIALIZED = [n for n in CASES if n not in ("weight_norm", "spectral_norm")]  # torch pickles no parametrized module
#: Dynamo refuses torch's own recurrences and its fold of spectral norms, in float as well.
COMPILED = [n for n in CASES if n not in ("LSTM", "RNN", "GRU")]


def made(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    make, args = CASES[name]
    return quiet(make).eval(), args


def close(got: Tensor, wanted: Tensor) -> None:
    """Compare results of the same codes: sums of some hundred products in another order, on layers of order one."""
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()
    assert (1.01 * wanted - wanted).norm() > 1e-5 * wanted.norm()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_nearly_all_is_quantized_and_equals_the_decoded_model(name: str) -> None:
    model, args = made(name)
    before = copy.deepcopy(model.state_dict())
    lowered = ggpass.compile(model, target="rf8-cpu")
    assert ggpass.report(lowered).lowered_share >= 0.95
    close(lowered(*args), ggpass.compile(model, target="rf8-reference")(*args))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # The same forward on the float weights that the codes stand for: an independent reference.
    result = lowered(*args)
    assert (result - model(*args)).norm() < 0.2 * model(*args).norm()
    plain = ggpass.dequantize(lowered)
    assert not any(isinstance(module, LoweredWeight) for module in plain.modules())
    assert {key: value.shape for key, value in plain.named_parameters()} == {
        key: value.shape for key, value in model.named_parameters()
    }
    close(result, plain(*args))
    assert type(plain) is type(model)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_files_copies_and_state_dicts(name: str, tmp_path: Path) -> None:
    model, args = made(name)
    lowered = ggpass.compile(model, target="int8-cpu")
    wanted = lowered(*args)
    assert torch.equal(copy.deepcopy(lowered)(*args), wanted)
    if name in SERIALIZED:
        assert torch.equal(pickle.loads(pickle.dumps(lowered))(*args), wanted)
    path = tmp_path / "model.safetensors"
    ggpass.save(lowered, path)
    blank = copy.deepcopy(model)
    for parameter in blank.parameters():
        parameter.zero_()
    loaded = ggpass.load(path, into=blank, target="int8-cpu")
    assert torch.equal(loaded(*args), wanted)
    assert ggpass.report(loaded).lowered_share >= 0.95
    other = ggpass.compile(made(name)[0], target="int8-cpu")
    assert torch.equal(ggpass.load(path, into=other)(*args), wanted)
    other.load_state_dict(lowered.state_dict())
    assert torch.equal(other(*args), wanted)
    half = lowered.to(torch.bfloat16)
    floats = tuple(a.bfloat16() if a.is_floating_point() else a for a in args)
    got = half(*floats)
    assert got.dtype is torch.bfloat16
    assert (got.float() - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("name", COMPILED)
@torch.no_grad()
def test_torch_compile_traces_it_whole(name: str) -> None:
    model, args = made(name)
    torch._dynamo.reset()
    lowered = ggpass.compile(model, target="rf8-cpu")
    compiled = torch.compile(lowered, backend="aot_eager", fullgraph=True)
    close(compiled(*args), lowered(*args))


@pytest.mark.parametrize("name", ["product", "super", "own embedding"])
@torch.no_grad()
def test_a_product_in_a_forward_of_its_own_decodes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = made(name)
    lowered = ggpass.compile(model, target="rf8-cpu")
    wanted = lowered(*args)

    def decode(self: QuantizedWeight) -> Tensor:
        raise AssertionError("decoded")

    monkeypatch.setattr(QuantizedWeight, "decode", decode)
    assert torch.equal(lowered(*args), wanted)


# The reference decodes as a file does; the CPU's int8 kernel multiplies in another order.
@pytest.mark.parametrize("target", ["rf8-reference", "rf8-cpu", "int8-reference"])
def test_a_stack_has_a_scale_for_each_row_in_a_file_too(target: str, tmp_path: Path) -> None:
    lowered = ggpass.compile(Experts(), target=target)
    ggpass.save(lowered, tmp_path / "model.safetensors")
    with PackedFile(tmp_path / "model.safetensors") as file:
        for name in ("up", "down", "router"):
            held = getattr(lowered, f"lowered_{name}")
            assert file.stored(name).rows == held.codes.shape[0]
            assert torch.equal(file.read(name), held.decode())


def test_an_expert_is_computed_from_its_own_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = ggpass.compile(Experts(), target="rf8-cpu")
    held = lowered.lowered_up
    assert held.codes.shape == (3 * 96, 64)
    assert held.scale.shape == (3 * 96,)
    whole = held.decode()
    for scale in (held.scale, held.scale[:1]):
        held.scale = scale
        for index in (0, 2, -1, torch.tensor(1)):
            assert torch.equal(lowered.up[index].clone(), held.decode()[index])
            close(functional.linear(X, lowered.up[index]), functional.linear(X, held.decode()[index]))
    held.scale = held.scale.expand(3 * 96).clone()
    assert not torch.equal(held.decode(), whole)
    monkeypatch.setattr(LoweredWeight, "decode", lambda self: pytest.fail("decoded"))
    functional.linear(X, lowered.up[1])


@pytest.mark.parametrize("name", ["LSTM", "MultiheadAttention", "experts", "adapted"])
def test_no_write_is_lost_and_gradients_reach_the_input(name: str) -> None:
    model, args = made(name)
    lowered = ggpass.compile(model, target="rf8-cpu")
    titles = [change.name for change in ggpass.report(lowered).changes]
    for title in titles:
        path, _, leaf = title.rpartition(".")
        owner = lowered.get_submodule(path)
        with pytest.raises(WeightError, match="quantized"):
            getattr(owner, leaf).data.zero_()
        with pytest.raises(WeightError, match="would replace"):
            setattr(owner, leaf, nn.Parameter(torch.zeros(2, 2)))
    x = args[0].clone().requires_grad_()
    lowered(x, *args[1:]).square().sum().backward()
    plain = ggpass.dequantize(lowered)
    y = args[0].clone().requires_grad_()
    plain(y, *args[1:]).square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    close(x.grad, y.grad)


@torch.no_grad()
def test_ties_between_modules_of_different_kinds() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(40, 64), ByProduct(64, 40)
            self.out.weight = self.embed.weight
            self.a, self.b = nn.GRU(64, 64), nn.GRU(64, 64)
            self.b.weight_hh_l0 = self.a.weight_hh_l0
            self.table = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.b(self.a(self.embed(ids))[0])[0]) + self.table.sum()

    model = Tied().eval()
    lowered = ggpass.compile(model, target="rf8-cpu")
    assert lowered.embed.lowered is lowered.out.lowered is lowered.lowered_table
    assert lowered.a.lowered_weight_hh_l0 is lowered.b.lowered_weight_hh_l0
    wanted = lowered(IDS)
    assert torch.equal(copy.deepcopy(lowered)(IDS), wanted)
    plain = ggpass.dequantize(lowered)
    assert plain.embed.weight is plain.out.weight is plain.table
    assert plain.a.weight_hh_l0 is plain.b.weight_hh_l0
    close(plain(IDS), wanted)


def test_what_stays_says_why() -> None:
    class Own(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(8, 8))
            self.table = nn.Parameter(torch.randn(8, 8))

    sparse = nn.Linear(64, 64)
    sparse.weight = nn.Parameter(torch.eye(64).to_sparse())
    rows = nn.Linear(64, 64)
    rows.weight = nn.Parameter(torch.eye(64).to_sparse_csr())
    model = nn.Module()
    model.norm, model.bag = nn.LayerNorm((8, 8)), nn.EmbeddingBag(8, 8, max_norm=1.0)
    model.own, model.sparse, model.rows = Own(), sparse, rows
    model.token = nn.Parameter(torch.randn(1, 1, 64))
    model.script = torch.jit.script(nn.Linear(16, 16))
    report = ggpass.report(ggpass.compile(model, target="rf8-cpu"))
    reasons: dict[str, Any] = {skip.name: skip.reason for skip in report.skips}
    assert {change.name for change in report.changes} == {"own.0.weight"}
    assert "LayerNorm" in reasons["norm.weight"]
    assert "max_norm" in reasons["bag.weight"]
    assert "children are its layers" in reasons["own.table"]
    assert "sparse_coo tensor" in reasons["sparse.weight"]
    assert "sparse_csr tensor" in reasons["rows.weight"]
    assert "a vector in the shape 1×1×64" in reasons["token"]
    assert "TorchScript" in reasons["script.weight"]


def test_weights_of_another_library_stay() -> None:
    class Packed(Tensor):
        """As torchao's and quanto's weights: a tensor of float32 that holds something else."""

        @staticmethod
        def __new__(cls, inner: Tensor) -> "Packed":
            return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

        def __init__(self, inner: Tensor) -> None:
            self.inner = inner

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.detach.default:
                return Packed(args[0].inner)
            plain = torch.utils._pytree.tree_map(lambda x: x.inner.float() if isinstance(x, Packed) else x, args)
            return func(*plain, **(kwargs or {}))

        def __deepcopy__(self, memo: Any) -> "Packed":
            return nn.Parameter(Packed(self.inner.clone()), requires_grad=False)

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.LSTM(64, 64))
    model[0].weight = nn.Parameter(Packed(torch.ones(64, 64, dtype=torch.int8)), requires_grad=False)
    report = ggpass.report(ggpass.compile(model, target="rf8-cpu"))
    assert [(s.name, s.reason) for s in report.skips if s.matrix] == [("0.weight", "is a Packed, not a plain tensor")]
    assert {change.name for change in report.changes} == {"1.weight", "2.weight_ih_l0", "2.weight_hh_l0"}
