"""The operators: their contract with torch (opcheck), their reference against float64, their gradient, their errors."""

import copy
from collections.abc import Callable

import pytest
import torch
from support.closeness import assert_rejects_corruption, assert_within, dot_bound, store_bound
from torch import Tensor, func, nn
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian

import ggpass
from ggpass.formats import FORMATS, RF8, Format, Scheme, quantize
from ggpass.lowering import operators as ops

CODEBOOKS = list(FORMATS.values())


def make(n: int, k: int, fmt: Format = RF8, granularity: str = "channel") -> tuple[torch.Tensor, ...]:
    """codes, scale, codebook of a random (n, k) weight."""
    quantized = quantize(torch.randn(n, k), fmt, Scheme(granularity=granularity))  # type: ignore[arg-type]
    return quantized.codes, quantized.scale, fmt.codebook


@pytest.mark.parametrize("fmt", CODEBOOKS, ids=lambda f: f.name)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_linear(fmt: Format, bias: bool, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 40, dtype=dtype, requires_grad=True)
    args = (x, *make(24, 40, fmt), torch.randn(24, dtype=dtype, requires_grad=True) if bias else None)
    torch.library.opcheck(torch.ops.ggpass.linear.default, args)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_opcheck_embedding_and_dequantize(granularity: str) -> None:
    operands = make(24, 40, granularity=granularity)
    torch.library.opcheck(torch.ops.ggpass.embedding.default, (torch.randint(0, 24, (2, 5)), *operands, torch.float16))
    torch.library.opcheck(torch.ops.ggpass.dequantize.default, (*operands, torch.bfloat16))


@pytest.mark.parametrize("operators", [ops.REFERENCE, ops.DISPATCHED], ids=["reference", "dispatched"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_linear_against_float64(operators: ops.Operators, dtype: torch.dtype, granularity: str) -> None:
    codes, scale, codebook = make(33, 70, granularity=granularity)
    x, bias = torch.randn(5, 70).to(dtype), torch.randn(33).to(dtype)
    values = codebook[codes.int()]
    expected = x.double() @ (values.double() * scale.double().unsqueeze(-1)).T + bias.double()
    bound = dot_bound(x, values, scale, bias)
    if dtype is not torch.float32:
        bound = store_bound(expected, bound, dtype)
    actual = operators.linear(x, codes, scale, codebook, bias)
    assert actual.dtype is dtype
    assert_rejects_corruption(actual, expected, bound)


@pytest.mark.parametrize("operators", [ops.REFERENCE, ops.DISPATCHED], ids=["reference", "dispatched"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
def test_embedding_is_exact(operators: ops.Operators, granularity: str, ids_dtype: torch.dtype) -> None:
    codes, scale, codebook = make(50, 37, granularity=granularity)
    ids = torch.randint(0, 50, (3, 4), dtype=ids_dtype)
    # A power-of-two scale only moves the exponent: decoding is exact, not merely close.
    expected = (codebook.double()[codes.int()] * scale.double().unsqueeze(-1))[ids.long()]
    actual = operators.embedding(ids, codes, scale, codebook, torch.float32)
    assert torch.equal(actual.double(), expected)


@pytest.mark.parametrize("operators", [ops.REFERENCE, ops.DISPATCHED], ids=["reference", "dispatched"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize_is_exact_up_to_the_last_rounding(operators: ops.Operators, dtype: torch.dtype) -> None:
    codes, scale, codebook = make(50, 37)
    expected = (codebook.double()[codes.int()] * scale.double().unsqueeze(-1)).to(dtype)
    assert torch.equal(operators.dequantize(codes, scale, codebook, dtype), expected)


def test_linear_gradient_against_float64() -> None:
    codes, scale, codebook = make(33, 70)
    x = torch.randn(5, 70, requires_grad=True)
    bias = torch.randn(33, requires_grad=True)
    upstream = torch.randn(5, 33)
    torch.ops.ggpass.linear(x, codes, scale, codebook, bias).backward(upstream)
    weight = codebook[codes.int()] * scale.unsqueeze(-1)
    assert x.grad is not None
    assert bias.grad is not None
    assert_rejects_corruption(x.grad, upstream.double() @ weight.double(), dot_bound(upstream, weight.T))
    ones = torch.ones(1, 5)
    assert_within(bias.grad, (ones.double() @ upstream.double())[0], dot_bound(ones, upstream.T)[0])


@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 0, 40), (1, 1, 40)])
def test_linear_shapes(shape: tuple[int, ...]) -> None:
    operands = make(24, 40)
    x = torch.randn(shape)
    y = torch.ops.ggpass.linear(x, *operands, None)
    assert y.shape == (*shape[:-1], 24)
    assert torch.ops.ggpass.linear(x.to("meta"), *(o.to("meta") for o in operands), None).shape == y.shape


def test_bad_operands_are_named() -> None:
    codes, scale, codebook = make(24, 40)
    x = torch.randn(2, 40)
    with pytest.raises(RuntimeError, match=r"takes \(…, 40\), not \(2, 39\)"):
        torch.ops.ggpass.linear(x[:, :39], codes, scale, codebook, None)
    with pytest.raises(RuntimeError, match="floating input"):
        torch.ops.ggpass.linear(x.long(), codes, scale, codebook, None)
    with pytest.raises(RuntimeError, match="256 values"):
        torch.ops.ggpass.linear(x, codes, scale, codebook[:100], None)
    with pytest.raises(RuntimeError, match="scale is"):
        torch.ops.ggpass.linear(x, codes, scale[:3], codebook, None)
    with pytest.raises(RuntimeError, match="uint8"):
        torch.ops.ggpass.linear(x, codes.int(), scale, codebook, None)


@pytest.mark.parametrize("operators", [ops.REFERENCE, ops.DISPATCHED], ids=["reference", "dispatched"])
@pytest.mark.parametrize("bad", [-1, 24])
def test_embedding_ids_out_of_range(operators: ops.Operators, bad: int) -> None:
    with pytest.raises(IndexError):
        operators.embedding(torch.tensor([0, bad]), *make(24, 40), torch.float32)


class UsesEveryOp(torch.nn.Module):
    """Embedding, linear and dequantize in one forward."""

    def __init__(self) -> None:
        super().__init__()
        for name, tensor in zip(("codes", "scale", "codebook"), make(24, 24)):
            self.register_buffer(name, tensor)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        operands = (self.codes, self.scale, self.codebook)
        x = torch.ops.ggpass.embedding(ids, *operands, torch.float32)
        return torch.ops.ggpass.linear(x, *operands, None) @ torch.ops.ggpass.dequantize(*operands, torch.float32)


def test_export_and_fullgraph() -> None:
    module, ids = UsesEveryOp(), torch.randint(0, 24, (2, 5))
    expected = module(ids)
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(module, (ids,), dynamic_shapes={"ids": {0: auto, 1: auto}})
    assert torch.equal(exported.module()(ids), expected)
    assert exported.module()(torch.randint(0, 24, (3, 7))).shape == (3, 7, 24)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), expected)


def _forward_ad(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


DERIVATIVES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "jvp": lambda f, x: func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "vjp": lambda f, x: func.vjp(f, x)[1](torch.ones(3, 7))[0],
    "grad": lambda f, x: func.grad(lambda z: f(z).square().sum())(x),
    "jacrev": lambda f, x: func.jacrev(f)(x),
    "jacfwd": lambda f, x: func.jacfwd(f)(x),
    "hessian": lambda f, x: func.hessian(lambda z: f(z).square().sum())(x),
    "vmap of jvp": lambda f, x: func.vmap(lambda z: func.jvp(f, (z,), (torch.ones_like(z),))[1])(x),
    "vmap of grad": lambda f, x: func.vmap(func.grad(lambda z: f(z).sum()))(x),
    "dual numbers": _forward_ad,
    "jacobian": lambda f, x: jacobian(f, x, vectorize=True, strategy="forward-mode"),
    "double backward": lambda f, x: hessian(lambda z: f(z).square().sum(), x),
}


@pytest.mark.parametrize("name", DERIVATIVES)
@pytest.mark.parametrize("target", ["rf8-cpu", "int8-cpu", "rf8-reference"])
def test_every_derivative_is_that_of_the_decoded_model(name: str, target: str) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7, bias=False))
    model = ggpass.compile(layers.requires_grad_(False), target=target)
    plain = ggpass.dequantize(copy.deepcopy(model)).requires_grad_(False)
    x = torch.randn(3, 5)
    got, wanted = DERIVATIVES[name](model, x), DERIVATIVES[name](plain, x)
    # Some twenty terms of order one, each rounded a few times.
    assert_rejects_corruption(got, wanted.double(), 1e-5)
