"""y = (x @ codebook[codes]ᵀ) · scale + bias on the CPU: which generated kernel computes it, and its workspaces."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ggpass.formats.base import decoder_of
from ggpass.kernels.cpu.isa import Isa
from ggpass.kernels.cpu.regimes import BY_KIND, LINE, PANEL_VECTORS
from ggpass.kernels.tensor_cache import TensorCache

#: Bytes of weights dequantized at a time for the BLAS: they stay in the last-level cache.
BLOCK_BYTES = 8 << 20
#: Multiplications below which a call runs inline: some 8 µs, about what waking the pool takes.
INLINE_BELOW = 1 << 17


class CpuKernels:
    """The generated kernels of one instruction set, called with torch tensors.

    Codes are canonical (`Format.canonical`), their last dimension contiguous. Any thread may call; the loops
    run on torch's OpenMP threads, as many as `torch.get_num_threads()` says.
    """

    def __init__(self, isa: Isa, function: Callable[[str], Callable[..., None]], inline: Callable[[int], None]) -> None:
        """Wrap a loaded library.

        Args:
            function: function(name) returns the kernel called `name`.
            inline: inline(1) makes the calling thread's loops run inline, inline(0) on the pool again.
        """
        self.isa = isa
        self._inline = inline
        self._decoders = TensorCache(decoder_of)
        self._function = {
            f"{kernel}_{kind}": function(f"{kernel}_{kind}")
            for kind, regimes in BY_KIND.items()
            for kernel in regimes.kernels()
        }
        self._no_bias = torch.zeros(1, dtype=torch.float32, device="cpu")

    def linear(self, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, codebook: Tensor) -> Tensor:
        """(x @ codebook[codes]ᵀ) · scale + bias.

        Args:
            x: (M, K) float32, any strides and alignment.
            codes: (N, K) uint8, canonical, last dimension contiguous, any row stride.
            scale: (N,) or (1,) float32.
            bias: (N,) float32 or None.
            codebook: (256,) float32.

        Returns:
            (M, N) float32.
        """
        (m, k), (n, _) = x.shape, codes.shape
        _check_codes(codes, scale, codebook)
        if codes.shape[1] != k:
            raise ValueError(f"x has {k} columns and the codes {codes.shape[1]}; they are the same K")
        if bias is not None and bias.shape != (n,):
            raise ValueError(f"bias has the shape {tuple(bias.shape)}; it has one value for each of {n} rows of codes")
        if x.dtype is not torch.float32:
            raise TypeError(f"x is {x.dtype}; the kernels compute in float32, so convert it with .float()")
        if m == 0 or n == 0 or k == 0:
            return x.new_zeros(m, n) if bias is None else bias.expand(m, n).clone()
        kind, unit = self._decoders.of(codebook)
        regime = BY_KIND[kind].kernel(m)
        if unit != 1.0:
            scale = scale * unit
        if k < LINE:
            x, codes, k = F.pad(x, (0, LINE - k)), F.pad(codes, (0, LINE - k)), LINE
        if x.stride(1) != 1:
            x = x.contiguous()
        if scale.shape[0] != n:
            scale = scale.expand(n)
        if regime is None:
            return self._dequantize_and_multiply(x, codes, scale, bias, codebook, kind)
        if bias is None:
            bias = self._no_bias.expand(n)
        y = _floats(m, n)
        packed = self._workspace(regime, m, k)
        self._run(m * n * k, f"{regime}_{kind}", x, packed, codes, scale, bias, codebook, y)
        return y

    def dequantize(self, codes: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
        """codebook[codes] · scale, rounded to `dtype` once more if that is not float32: (N, K)."""
        _check_codes(codes, scale, codebook)
        out = torch.empty(codes.shape, dtype=dtype, device="cpu")
        n, k = codes.shape
        if out.numel() == 0:
            return out
        if dtype is torch.float32:
            self._decode(codes, scale, codebook, out)
            return out
        rows = max(1, BLOCK_BYTES // (4 * k))
        block = _floats(min(rows, n), k)
        for first in range(0, n, rows):
            last = min(first + rows, n)
            part = scale[first:last] if scale.shape[0] == n else scale
            self._decode(codes[first:last], part, codebook, block[: last - first])
            out[first:last] = block[: last - first]
        return out

    def embedding(self, ids: Tensor, codes: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
        """codebook[codes[ids]] · scale[ids]: (L,) int64 -> (L, K) float32; every id lies in [0, N)."""
        _check_codes(codes, scale, codebook)
        n, k = codes.shape
        if ids.numel() == 0 or k == 0:
            return _floats(ids.shape[0], k)
        kind, unit = self._decoders.of(codebook)
        if k < LINE:  # only the rows asked for are padded
            rows = F.pad(codes[ids], (0, LINE - k))
            part = scale[ids] if scale.shape[0] == n else scale
            out = _floats(ids.shape[0], LINE)
            self._decode(rows, part, codebook, out)
            return out[:, :k].contiguous()
        scale = scale if unit == 1.0 else scale * unit
        out = _floats(ids.shape[0], k)
        self._run(out.numel(), f"embedding_{kind}", ids.contiguous(), codes, scale.expand(n), codebook, out)
        return out

    def _decode(self, codes: Tensor, scale: Tensor, codebook: Tensor, out: Tensor) -> None:
        n, k = codes.shape
        kind, unit = self._decoders.of(codebook)
        scale = (scale if unit == 1.0 else scale * unit).expand(n)
        if k >= LINE:
            self._run(out.numel(), f"dequantize_{kind}", codes, scale, codebook, out)
            return
        padded = _floats(n, LINE)
        self._run(padded.numel(), f"dequantize_{kind}", F.pad(codes, (0, LINE - k)), scale, codebook, padded)
        out.copy_(padded[:, :k])

    @torch.no_grad()
    def _dequantize_and_multiply(
        self, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, codebook: Tensor, kind: str
    ) -> Tensor:
        """For many rows of x the BLAS is hard to beat: decode a block that fits the cache, multiply, go on."""
        (m, k), n = x.shape, codes.shape[0]
        rows = max(1, BLOCK_BYTES // (4 * k))
        y, block = _floats(m, n), _floats(min(rows, n), k)
        for first in range(0, n, rows):
            last = min(first + rows, n)
            weights, out = block[: last - first], y[:, first:last]
            part = codes[first:last]
            self._run(part.numel(), f"dequantize_{kind}", part, scale[first:last], codebook, weights)
            if bias is None:
                torch.mm(x, weights.T, out=out)
            else:
                torch.addmm(bias[first:last], x, weights.T, out=out)
        return y

    def _workspace(self, regime: str, m: int, k: int) -> Tensor:
        """Room for the packed x: whole batches or panels of rows, whole lines of codes."""
        width = PANEL_VECTORS * self.isa.lanes if regime == "tile" else int(regime.removeprefix("rows"))
        return _floats(-(-m // width) * width * (-(-k // LINE) * LINE))

    def _run(self, work: int, name: str, *arguments: Tensor) -> None:
        if work < INLINE_BELOW:
            self._inline(1)
            try:
                self._function[name](*arguments)
            finally:
                self._inline(0)
            return
        # In a thread new to torch this call also hands its thread count to OpenMP, whose own is per thread.
        torch.get_num_threads()
        self._function[name](*arguments)


def _floats(*shape: int) -> Tensor:
    """Uninitialized float32 on the CPU, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _check_codes(codes: Tensor, scale: Tensor, codebook: Tensor) -> None:
    if codes.dim() != 2 or codes.dtype is not torch.uint8:
        raise TypeError(f"codes are {codes.dtype} with {codes.dim()} dimensions; they are an (N, K) uint8 matrix")
    if codes.shape[1] > 1 and codes.stride(1) != 1:
        raise ValueError(f"codes have the strides {tuple(codes.stride())}; make each row contiguous")
    if scale.shape not in ((1,), (codes.shape[0],)) or scale.dtype is not torch.float32:
        raise ValueError(f"scale is {scale.dtype} {tuple(scale.shape)}; it is float32, (1,) or ({codes.shape[0]},)")
    if codebook.shape != (256,) or codebook.dtype is not torch.float32:
        raise ValueError(f"codebook is {codebook.dtype} {tuple(codebook.shape)}; it holds 256 float32 values")
