"""The operators on CUDA tensors: kernels if they can be had, else the reference, which is logged once."""

import functools
import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ggpass.errors import InputError, KernelsUnavailable
from ggpass.kernels.cuda.compiler import Source
from ggpass.kernels.cuda.uses import DTYPES, ROW_DTYPES
from ggpass.kernels.cuda.variants import Variant
from ggpass.lowering import operators as ops

if TYPE_CHECKING:
    from ggpass.kernels.cuda.kernels import CudaKernels

logger = logging.getLogger("ggpass")


@functools.cache
def _say_once(what: str) -> None:
    logger.warning("%s", what)


def _raw_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


def generate(variant: Variant) -> Source:
    """Return the CUDA C that TVM generates for a variant.

    Raises:
        KernelsUnavailable: TVM is not installed, or cannot be imported.
    """
    try:
        from ggpass.kernels.cuda.generate.source import source
    except ImportError as error:
        raise KernelsUnavailable(
            f"apache-tvm cannot be imported to build {variant.name} ({error}); run `pip install 'ggpass[tvm]'`"
        ) from error
    return source(variant)


@functools.cache
def kernels_on(index: int) -> "CudaKernels | str":
    """Return the kernels of torch's device "cuda:index", or why there are none; nothing is built or loaded yet."""
    # Imported at the first use: loading the driver is no part of `import ggpass`.
    from ggpass.kernels.cuda.build import Builder
    from ggpass.kernels.cuda.driver import DriverError, open_driver
    from ggpass.kernels.cuda.kernels import CudaKernels

    try:
        driver = open_driver()
        device = driver.device(index)
    except (KernelsUnavailable, DriverError) as error:
        return str(error)
    reason = device.reason_against()
    # The same without torch's checks and its stream object, where torch has it.
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", _raw_stream)
    return reason or CudaKernels(driver, device, functools.partial(raw, index), Builder(generate))


def _kernels(codes: Tensor, **others: Tensor | None) -> "CudaKernels | None":
    """Return the kernels of the GPU that the codes are on; None where the reference must do, which is logged once."""
    device = codes.device
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise InputError(
                f"the {name} is on {tensor.device} and the weight on {device}; move both to one device, as with "
                f"x.to({str(device)!r}) or model.to({str(tensor.device)!r})"
            )
    found = kernels_on(device.index)
    if isinstance(found, str):
        _say_once(f"{device} computes with the torch reference, several times slower: {found}")
        return None
    return found


def _fit(x: Tensor, codes: Tensor, scale: Tensor, codebook: Tensor) -> bool:
    """Whether the operands of `linear` fit: in a microsecond what `ops.check_linear` says in ten, with its reasons."""
    n, k = codes.shape if codes.dim() == 2 else (-1, -1)
    return (
        x.dim() >= 1
        and x.shape[-1] == k
        and codes.dtype is torch.uint8
        and scale.shape in ((n,), (1,))
        and codebook.shape == (256,)
    )


def _without(device: torch.device, error: Exception) -> None:
    _say_once(f"{device} computes with the torch reference, several times slower: {error}")


def _linear(x: Tensor, codes: Tensor, scale: Tensor, codebook: Tensor, bias: Tensor | None) -> Tensor:
    kernels = _kernels(codes, input=x, scale=scale, codebook=codebook, bias=bias)
    if not _fit(x, codes, scale, codebook):
        ops.check_linear(x, codes, scale, codebook)
    if kernels is not None and x.dtype in DTYPES:
        try:
            return kernels.linear(x, codes, scale, bias, codebook)
        except KernelsUnavailable as error:
            _without(codes.device, error)
    elif kernels is not None and x.dtype is torch.float32:
        _say_once(float_note(x.dtype))
        weight = _dequantize(codes, scale, codebook, x.dtype)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.float().expand(codes.shape[0]))
    return ops.reference_linear(x, codes, scale, codebook, bias)


def _embedding(ids: Tensor, codes: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"embedding ids are int64 or int32, not {ids.dtype}")
    kernels = _kernels(codes, input=ids, scale=scale, codebook=codebook)
    if kernels is not None and dtype in ROW_DTYPES:
        try:
            rows = kernels.embedding(ids.reshape(-1), codes, scale, codebook, dtype)
        except KernelsUnavailable as error:
            _without(codes.device, error)
        else:
            # Not `view`: autograd forbids in-place operators on what a custom operator returns as a view.
            return torch.ops.aten._unsafe_view(rows, [*ids.shape, codes.shape[1]])
    return ops.reference_embedding(ids, codes, scale, codebook, dtype)


def _dequantize(codes: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    kernels = _kernels(codes, scale=scale, codebook=codebook)
    if kernels is not None and dtype in ROW_DTYPES:
        try:
            return kernels.dequantize(codes, scale, codebook, dtype)
        except KernelsUnavailable as error:
            _without(codes.device, error)
    return ops.reference_dequantize(codes, scale, codebook, dtype)


for _name, _kernel in (("linear", _linear), ("embedding", _embedding), ("dequantize", _dequantize)):
    ops.LIBRARY.impl(_name, _kernel, "CUDA")


def float_note(dtype: torch.dtype) -> str:
    """What is said where activations have a dtype without kernels."""
    name = str(dtype).removeprefix("torch.")
    return (
        f"activations are {name}, and the CUDA kernels take bfloat16 and float16: linears decode their weight at each "
        "call and multiply in torch, which saves memory and no time; compile model.to(torch.bfloat16) for speed"
    )
