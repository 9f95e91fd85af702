"""The operators over tensors, on the emulator: any variant of a family by the parameters that all of them share."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from ggpass.kernels.cuda.compiler import Source
from ggpass.kernels.cuda.generate.source import source
from ggpass.kernels.cuda.variants import Variant
from support.cuda_emulator.run import run


@functools.cache
def generated(variant: Variant) -> Source:
    """The source of a variant, once a session."""
    return source(variant)


def bits(tensor: Tensor) -> np.ndarray:
    """The bits of a 16-bit tensor, or its values."""
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.int16).numpy() if tensor.element_size() == 2 else tensor.numpy()


def linear(
    variant: Variant,
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    *,
    seed: int = 0,
    text: Source | None = None,
) -> Tensor:
    """`ops.reference_linear` of x (m, k) by the kernel of one variant; `text` stands in for its source."""
    (m, k), n = x.shape, codes.shape[0]
    y = np.empty((m, n), np.int16)
    numbers = {"m": m, "n": n, "k": k, "scale_stride": int(scale.shape[0] > 1), "bias_on": int(bias is not None)}
    arrays = {"x": bits(x), "codes": bits(codes), "scale": bits(scale), "codebook": bits(codebook)}
    # Without a bias the pointer may be any: what it points at is neither enough nor a number.
    arrays["bias"] = np.full(1, np.nan, np.float32) if bias is None else bits(bias)
    run(text or generated(variant), variant.launch(m, n, k), arrays | numbers, {"y": y}, seed=seed)
    return torch.from_numpy(y).view(x.dtype)


def rows(
    variant: Variant,
    ids: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor,
    dtype: torch.dtype,
    seed: int = 0,
) -> Tensor:
    """`ops.reference_embedding` of ids (m,), or without ids `ops.reference_dequantize`."""
    n, k = codes.shape
    m = n if ids is None else ids.shape[0]
    y = np.empty((m, k), np.float32 if dtype == torch.float32 else np.int16)
    numbers = {"m": m, "n": n, "k": k, "scale_stride": int(scale.shape[0] > 1)}
    arrays = {"codes": bits(codes), "scale": bits(scale), "codebook": bits(codebook)}
    if ids is not None:
        arrays["ids"] = bits(ids)
    run(generated(variant), variant.launch(m, n, k), arrays | numbers, {"y": y}, seed=seed)
    return torch.from_numpy(y).view(dtype)
