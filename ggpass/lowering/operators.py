"""The operators a lowered model is made of: schema, fake, reference, gradient. Kernels plug in per device.

An operator carries the codebook, not the format's name: any 256 float32 values are a format. `codes` are canonical
(`Format.canonicalize`); every encoder emits such codes, every loader makes them so. An output channel is a row of
`codes`, and its scale multiplies the row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("ggpass", "DEF")
LIBRARY.define("linear(Tensor x, Tensor codes, Tensor scale, Tensor codebook, Tensor? bias) -> Tensor")
LIBRARY.define("embedding(Tensor ids, Tensor codes, Tensor scale, Tensor codebook, ScalarType dtype) -> Tensor")
LIBRARY.define("dequantize(Tensor codes, Tensor scale, Tensor codebook, ScalarType dtype) -> Tensor")


def reference_dequantize(codes: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """w[n, k] = codebook[codes[n, k]] · scale[n].

    Args:
        codes: (N, K) uint8.
        scale: (N,) or (1,) float32.
        codebook: (256,) float32.
        dtype: of the result; the product is formed in float32.

    Returns:
        (N, K) of `dtype`.
    """
    return (codebook[codes.int()] * scale.unsqueeze(-1)).to(dtype)


def reference_linear(x: Tensor, codes: Tensor, scale: Tensor, codebook: Tensor, bias: Tensor | None) -> Tensor:
    """y[…, n] = scale[n] · Σ_k x[…, k] · codebook[codes[n, k]] + bias[n].

    Args:
        x: (…, K) float32, bfloat16 or float16; sums are formed in float32.
        codes: (N, K) uint8.
        scale: (N,) or (1,) float32.
        codebook: (256,) float32.
        bias: (N,) floating, or None.

    Returns:
        (…, N) of x's dtype.
    """
    check_linear(x, codes, scale, codebook)
    y = torch.nn.functional.linear(x.float(), codebook[codes.int()]) * scale
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def reference_embedding(ids: Tensor, codes: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """y[…, :] = codebook[codes[ids[…], :]] · scale[ids[…]].

    Args:
        ids: (…) int64 or int32, within [0, N).
        codes: (N, K) uint8.
        scale: (N,) or (1,) float32.
        codebook: (256,) float32.
        dtype: of the result.

    Returns:
        (…, K) of `dtype`.

    Raises:
        IndexError: an id outside [0, N).
    """
    rows = torch.nn.functional.embedding(ids, codes)
    row_scale = scale if scale.shape[0] == 1 else scale[ids].unsqueeze(-1)
    return (codebook[rows.int()] * row_scale).to(dtype)


def _check(x: Tensor, codes: Tensor, scale: Tensor, codebook: Tensor) -> None:
    torch._check(codes.dim() == 2, lambda: f"codes are (N, K), not {tuple(codes.shape)}")
    torch._check(codes.dtype == torch.uint8, lambda: f"codes are uint8, not {codes.dtype}")
    torch._check(codebook.shape == (256,), lambda: f"a codebook has 256 values, not {tuple(codebook.shape)}")
    torch._check(
        scale.dim() == 1 and (scale.shape[0] == codes.shape[0] or scale.shape[0] == 1),
        lambda: f"scale is (N,) or (1,) for codes of {tuple(codes.shape)}, not {tuple(scale.shape)}",
    )


def check_linear(x: Tensor, codes: Tensor, scale: Tensor, codebook: Tensor) -> None:
    """Raise RuntimeError where the operands of `linear` do not fit; shared by the fake and every kernel."""
    _check(x, codes, scale, codebook)
    torch._check(x.is_floating_point(), lambda: f"linear takes a floating input, not {x.dtype}")
    torch._check(
        x.dim() >= 1 and x.shape[-1] == codes.shape[1],
        lambda: f"linear takes (…, {codes.shape[1]}), not {tuple(x.shape)}",
    )


@torch.library.register_fake("ggpass::linear", lib=LIBRARY)
def _fake_linear(x: Tensor, codes: Tensor, scale: Tensor, codebook: Tensor, bias: Tensor | None) -> Tensor:
    check_linear(x, codes, scale, codebook)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.register_fake("ggpass::embedding", lib=LIBRARY)
def _fake_embedding(ids: Tensor, codes: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    _check(ids, codes, scale, codebook)
    return codes.new_empty((*ids.shape, codes.shape[1]), dtype=dtype)


@torch.library.register_fake("ggpass::dequantize", lib=LIBRARY)
def _fake_dequantize(codes: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    _check(codes, codes, scale, codebook)
    return codes.new_empty(codes.shape, dtype=dtype)


def _keep_for_backward(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _, codes, scale, codebook, bias = inputs
    ctx.save_for_backward(codes, scale, codebook)
    ctx.bias_dtype = None if bias is None else bias.dtype  # type: ignore[attr-defined]


def _linear_backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor
) -> tuple[Tensor | None, None, None, None, Tensor | None]:
    """∂L/∂x = g · W, ∂L/∂bias = Σ g: codes and scales take no gradient, as a lowered weight is not trained."""
    codes, scale, codebook = ctx.saved_tensors  # type: ignore[attr-defined]
    needs = ctx.needs_input_grad  # type: ignore[attr-defined]
    grad_x = grad_bias = None
    if needs[0]:
        weight = torch.ops.ggpass.dequantize(codes, scale, codebook, torch.float32)
        grad_x = (grad.float() @ weight).to(grad.dtype)
    if needs[4]:
        grad_bias = grad.float().reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)  # type: ignore[attr-defined]
    return grad_x, None, None, None, grad_bias


_reverse = make_autograd_impl(torch.ops.ggpass.linear.default, Info(_linear_backward, _keep_for_backward))


def _linear_autograd(keyset: Any, x: Tensor, *coded: Any) -> Tensor:
    """Take derivatives by `_linear_backward`; in forward mode and torch.func by torch's own, of the decoded weight."""
    if forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active():
        return _reverse(keyset, x, *coded)
    codes, scale, codebook, bias = coded
    weight = torch.ops.ggpass.dequantize(codes, scale, codebook, torch.float32)
    return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


LIBRARY.impl("linear", _linear_autograd, "Autograd", with_keyset=True)

for _name, _reference in (
    ("linear", reference_linear),
    ("embedding", reference_embedding),
    ("dequantize", reference_dequantize),
):
    # Any device without kernels of its own runs the reference.
    LIBRARY.impl(_name, _reference, "CompositeExplicitAutograd")


@dataclass(frozen=True)
class Operators:
    """The three callables that a target puts into a lowered model, each with the signature of its reference."""

    linear: Callable[..., Tensor]
    embedding: Callable[..., Tensor]
    dequantize: Callable[..., Tensor]

    def __reduce__(self) -> tuple[Callable[..., "Operators"], tuple[Any, ...]]:
        # torch's operators do not pickle; the two sets below are constants, and are found again by name.
        known = next((name for name in ("REFERENCE", "DISPATCHED") if _operators(name) == self), None)
        return (_operators, (known,)) if known else (Operators, (self.linear, self.embedding, self.dequantize))


def _operators(name: str) -> Operators:
    return {"REFERENCE": REFERENCE, "DISPATCHED": DISPATCHED}[name]


#: Plain torch: defines the semantics, on any device.
REFERENCE = Operators(reference_linear, reference_embedding, reference_dequantize)

#: The registered operators: each device's kernels, the reference where it has none.
DISPATCHED = Operators(
    torch.ops.ggpass.linear.default,
    torch.ops.ggpass.embedding.default,
    torch.ops.ggpass.dequantize.default,
)
