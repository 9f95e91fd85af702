"""The target `cpu`: kernels that TVM generated for this processor, registered for the CPU of every ggpass operator."""

import functools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ggpass.errors import KernelsUnavailable
from ggpass.formats.base import Format
from ggpass.lowering import operators as ops
from ggpass.targets.base import Target

if TYPE_CHECKING:
    from ggpass.kernels.cpu.library import CpuKernels

logger = logging.getLogger("ggpass")


@functools.cache
def _load() -> "CpuKernels | str":
    """Load this machine's kernels; or return why there are none, which is logged once."""
    # Imported at the first use: loading the kernels' runtime is no part of `import ggpass`.
    from ggpass.kernels.cpu.library import load

    try:
        return load()
    except KernelsUnavailable as error:
        logger.warning("target cpu computes with the torch reference, several times slower: %s", error)
        return str(error)


def _linear(x: Tensor, codes: Tensor, scale: Tensor, codebook: Tensor, bias: Tensor | None) -> Tensor:
    kernels = _load()
    if isinstance(kernels, str):
        return ops.reference_linear(x, codes, scale, codebook, bias)
    ops.check_linear(x, codes, scale, codebook)
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty((x.shape[:-1].numel(), x.shape[-1]))
    y = kernels.linear(
        rows.float(), codes, scale, None if bias is None else bias.float().expand(codes.shape[0]), codebook
    )
    # Not `view`: autograd forbids in-place operators on what a custom operator returns as a view.
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], codes.shape[0]]).to(x.dtype)


def _embedding(ids: Tensor, codes: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    kernels = _load()
    if isinstance(kernels, str):
        return ops.reference_embedding(ids, codes, scale, codebook, dtype)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"embedding ids are int64 or int32, not {ids.dtype}")
    flat = ids.reshape(-1).long()
    if flat.numel():
        low, high = torch.aminmax(flat)
        if low < 0 or high >= codes.shape[0]:
            raise IndexError(
                f"embedding ids run from {low} to {high}, and the table has rows 0 to {codes.shape[0] - 1}"
            )
    rows = kernels.embedding(flat, codes, scale, codebook)
    return torch.ops.aten._unsafe_view(rows, [*ids.shape, codes.shape[1]]).to(dtype)


def _dequantize(codes: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    kernels = _load()
    if isinstance(kernels, str):
        return ops.reference_dequantize(codes, scale, codebook, dtype)
    return kernels.dequantize(codes, scale, codebook, dtype)


for _name, _kernel in (("linear", _linear), ("embedding", _embedding), ("dequantize", _dequantize)):
    ops.LIBRARY.impl(_name, _kernel, "CPU")


@dataclass(frozen=True)
class CpuTarget(Target):
    """TVM kernels; the torch reference if they cannot be had, which is logged once."""

    def prepare(self, fmt: Format) -> tuple[str, ...]:
        """Load the kernels, building them at the first use on a machine (some seconds)."""
        loaded = _load()
        if isinstance(loaded, str):
            return (f"computes with the torch reference, several times slower: {loaded}",)
        return (f"kernels for {loaded.isa.name}",)
