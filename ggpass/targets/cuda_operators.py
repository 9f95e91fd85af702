"""The operators on CUDA tensors: kernels where they can be had, the reference where not, which is said once."""

import functools
import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ggpass import ops
from ggpass.errors import InputError

if TYPE_CHECKING:
    from ggpass.kernels.cuda.kernels import CudaKernels

logger = logging.getLogger("ggpass")

#: Of activations that there are kernels for, and of what embedding and dequantize write.
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
ROW_DTYPES = (*KERNEL_DTYPES, torch.float32)

_said: set[str] = set()


def _say_once(what: str) -> None:
    if what not in _said:
        _said.add(what)
        logger.warning("%s", what)


def _raw_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


@functools.cache
def kernels_on(index: int) -> "CudaKernels | str":
    """The kernels of torch's device "cuda:index", or why there are none; nothing is built or loaded yet."""
    # Imported at the first use: loading the driver is no part of `import ggpass`.
    from ggpass.kernels.cuda.driver import DriverError, open_driver
    from ggpass.kernels.cuda.kernels import CudaKernels
    from ggpass.kernels.unavailable import KernelsUnavailable

    try:
        driver = open_driver()
        device = driver.device(index)
    except (KernelsUnavailable, DriverError) as error:
        return str(error)
    reason = device.reason_against()
    # The same without torch's checks and its stream object, where torch has it.
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", _raw_stream)
    return reason or CudaKernels(driver, device, functools.partial(raw, index))


def _kernels(codes: Tensor, **others: Tensor | None) -> "CudaKernels | None":
    """The kernels of the GPU that the codes are on; None where the reference must do, which is logged once."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != codes.device:
            raise InputError(
                f"the {name} is on {tensor.device} and the weight on {codes.device}; move both to one device, as with "
                f"x.to({str(codes.device)!r}) or model.to({str(tensor.device)!r})"
            )
    found = kernels_on(codes.device.index)
    if isinstance(found, str):
        _say_once(f"{codes.device} computes with the torch reference, several times slower: {found}")
        return None
    return found


def _without(device: torch.device, error: Exception) -> None:
    _say_once(f"{device} computes with the torch reference, several times slower: {error}")


def _linear(x: Tensor, codes: Tensor, scale: Tensor, codebook: Tensor, bias: Tensor | None) -> Tensor:
    from ggpass.kernels.unavailable import KernelsUnavailable

    kernels = _kernels(codes, input=x, scale=scale, codebook=codebook, bias=bias)
    if kernels is not None and x.dtype in KERNEL_DTYPES:
        ops.check_linear(x, codes, scale, codebook)
        rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty((x.shape[:-1].numel(), x.shape[-1]))
        try:
            y = kernels.linear(rows, codes, scale, bias, codebook)
        except KernelsUnavailable as error:
            _without(codes.device, error)
        else:
            # Not `view`: autograd forbids in-place operators on what a custom operator returns as a view.
            return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], codes.shape[0]])
    elif kernels is not None and x.dtype is torch.float32:
        ops.check_linear(x, codes, scale, codebook)
        _say_once(float_note(x.dtype))
        weight = _dequantize(codes, scale, codebook, x.dtype)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.float().expand(codes.shape[0]))
    return ops.reference_linear(x, codes, scale, codebook, bias)


def _embedding(ids: Tensor, codes: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    from ggpass.kernels.unavailable import KernelsUnavailable

    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"embedding ids are int64 or int32, not {ids.dtype}")
    kernels = _kernels(codes, input=ids, scale=scale, codebook=codebook)
    if kernels is not None and dtype in ROW_DTYPES:
        try:
            rows = kernels.embedding(ids.reshape(-1), codes, scale, codebook, dtype)
        except KernelsUnavailable as error:
            _without(codes.device, error)
        else:
            return torch.ops.aten._unsafe_view(rows, [*ids.shape, codes.shape[1]])
    return ops.reference_embedding(ids, codes, scale, codebook, dtype)


def _dequantize(codes: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    from ggpass.kernels.unavailable import KernelsUnavailable

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
