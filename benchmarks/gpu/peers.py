"""The linear layer of each peer on a GPU, in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from timing import DEVICE
from torch import Tensor, nn

from ggpass.formats import get_format
from ggpass.kernels.cuda.kernels import CudaKernels

Layer = Callable[[Tensor], Tensor]


class Absent(Exception):
    """The peer is not here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """`build(weights, kernels)` returns one function x -> y for each (N, K) bfloat16 weight."""

    name: str
    build: Callable[[Sequence[Tensor], CudaKernels], list[Layer]]


def encoded(weight: Tensor, name: str = "rf8") -> tuple[Tensor, Tensor]:
    """(codes, scale) of a weight, a block of rows at a time: encoding takes several times the weight in memory."""
    format = get_format(name)
    scale = weight.abs().amax(dim=1).float() / format.amax
    blocks = zip(weight.split(1024), scale.split(1024), strict=True)
    return torch.cat([format.encode(w.float() / s[:, None]) for w, s in blocks]), scale


def _ggpass(format: str) -> Callable[[Sequence[Tensor], CudaKernels], list[Layer]]:
    def build(weights: Sequence[Tensor], kernels: CudaKernels) -> list[Layer]:
        codebook = get_format(format).codebook.to(DEVICE)

        def layer(weight: Tensor) -> Layer:
            codes, scale = encoded(weight, format)
            return lambda x: kernels.linear(x, codes, scale, None, codebook)

        return [layer(weight) for weight in weights]

    return build


def _cublas(weights: Sequence[Tensor], kernels: CudaKernels) -> list[Layer]:
    return [lambda x, w=weight: torch.nn.functional.linear(x, w) for weight in weights]


def _module(weight: Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def _torchao(config: str) -> Callable[[Sequence[Tensor], CudaKernels], list[Layer]]:
    def build(weights: Sequence[Tensor], kernels: CudaKernels) -> list[Layer]:
        try:
            from torchao import quantization
        except ImportError as error:
            raise Absent(str(error)) from error
        layers = []
        for weight in weights:
            module = _module(weight)
            quantization.quantize_(module, getattr(quantization, config)())
            # torchao's weight-only kernels are what the compiler makes of their dequantization.
            layers.append(torch.compile(module, mode="max-autotune-no-cudagraphs", dynamic=False))
        return layers

    return build


def _bitsandbytes(weights: Sequence[Tensor], kernels: CudaKernels) -> list[Layer]:
    try:
        import bitsandbytes
    except ImportError as error:
        raise Absent(str(error)) from error
    layers = []
    for weight in weights:
        n, k = weight.shape
        module = bitsandbytes.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False)
        module.weight = bitsandbytes.nn.Int8Params(weight.half().cpu(), requires_grad=False, has_fp16_weights=False)
        layers.append(module.cuda())
    return layers


CUBLAS = "cuBLAS bf16"
OURS = "ggpass rf8"
PEERS = (
    Peer(CUBLAS, _cublas),
    Peer(OURS, _ggpass("rf8")),
    Peer("ggpass e4m3 (table)", _ggpass("e4m3")),
    Peer("torchao float8 weight-only", _torchao("Float8WeightOnlyConfig")),
    Peer("torchao int8 weight-only", _torchao("Int8WeightOnlyConfig")),
    Peer("bitsandbytes LLM.int8", _bitsandbytes),
)
