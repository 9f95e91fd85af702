"""y = (x @ codebook[codes]ᵀ) · scale + bias on a GPU: which kernel computes it, and its launch.

A call allocates nothing but its result, from torch's own allocator, and waits for nothing: it can be captured in a
CUDA graph once it has run for a shape outside of one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ggpass.errors import GgpassError, KernelsUnavailable
from ggpass.kernels.cuda import choice, cubin, variants
from ggpass.kernels.cuda.archs import arch_for
from ggpass.kernels.cuda.build import Builder
from ggpass.kernels.cuda.choice import Choices
from ggpass.kernels.cuda.driver import Device, Driver
from ggpass.kernels.cuda.launch import Kernel
from ggpass.kernels.cuda.uses import DTYPES, ROW_DTYPES, Table, table_of
from ggpass.kernels.cuda.variants import Launch, Variant
from ggpass.kernels.tensor_cache import TensorCache

logger = logging.getLogger("ggpass")

#: Kernels read activations and codes 16 bytes at a time.
ALIGNMENT = 16

#: Cached launches; sequences of every length would otherwise pile up.
_MOST_PLANS = 4096


class NotPrepared(GgpassError, RuntimeError):
    """A kernel would have to be loaded while a CUDA graph is captured."""


class CudaKernels:
    """The kernels of one GPU, called with torch tensors. Any thread may call.

    Attributes:
        device: which GPU.
    """

    def __init__(
        self,
        driver: Driver,
        device: Device,
        stream: Callable[[], int],
        builder: Builder,
    ) -> None:
        """Nothing is built or loaded yet.

        Args:
            stream: the handle of torch's current stream on that GPU.
            builder: of kernels; measured choices are kept in its directory.
        """
        self.device = device
        self._driver, self._stream, self._builder = driver, stream, builder
        self._choices = Choices(device, builder.directory)
        self._tables = TensorCache(table_of)
        self._scaled: dict[float, TensorCache[Tensor]] = {}
        self._kernels: dict[str, Kernel] = {}
        self._failed: dict[str, tuple[int, str]] = {}
        self._plans: dict[tuple[Any, ...], tuple[Kernel, Launch]] = {}
        self._lock = threading.RLock()
        self._said: set[str] = set()

    def linear(self, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, codebook: Tensor) -> Tensor:
        """(x @ codebook[codes]ᵀ) · scale + bias, sums in float32.

        Args:
            x: (…, K) bfloat16 or float16; copied if it is not contiguous or its address no multiple of 16.
            codes: (N, K) uint8, canonical; likewise.
            scale: (N,) or (1,) float32.
            bias: (N,) or (1,) floating, or None.
            codebook: (256,) float32.

        Returns:
            (…, N) of x's dtype, no view of anything.

        Raises:
            KernelsUnavailable: the kernel for this shape cannot be had.
            NotPrepared: a graph is being captured, and this shape was never run before.
        """
        n, k = codes.shape
        shape = (*x.shape[:-1], n)
        if n == 0 or x.numel() == 0:
            y = x.new_zeros(shape)
            return y if bias is None else y + bias.to(x.dtype)
        m = x.numel() // k
        table, scale = self._table(codebook, scale)
        kernel, launch = self._plan("linear", table.decoder, DTYPES[x.dtype], m, n, k)
        x, codes = aligned(x), self._codes(codes)
        if bias is not None and not (bias.dtype is torch.float32 and bias.shape[0] == n and bias.is_contiguous()):
            bias = bias.to(torch.float32).expand(n).contiguous()
        y = torch.empty(shape, dtype=x.dtype, device=x.device)
        self._run(kernel, launch, (m, n, k), table, codes, scale, codebook, y, x=x, bias=bias)
        return y

    def embedding(self, ids: Tensor, codes: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
        """codebook[codes[ids]] · scale[ids]: (L,) int64 -> (L, K) bfloat16, float16 or float32.

        Ids are looked at on the device, where an error cannot be raised without waiting for it: the row of an id
        outside [0, N) is NaN.

        Raises:
            KernelsUnavailable, NotPrepared: as `linear`.
        """
        m, (n, k) = ids.shape[0], codes.shape
        y = torch.empty((m, k), dtype=dtype, device=codes.device)
        if m == 0 or k == 0:
            return y
        table, scale = self._table(codebook, scale)
        kernel, launch = self._plan("embedding", table.decoder, ROW_DTYPES[dtype], m, n, k)
        self._run(kernel, launch, (m, n, k), table, self._codes(codes), scale, codebook, y, ids=ids.long().contiguous())
        return y

    def dequantize(self, codes: Tensor, scale: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
        """codebook[codes] · scale: (N, K) bfloat16, float16 or float32, rounded once.

        Raises:
            KernelsUnavailable, NotPrepared: as `linear`.
        """
        n, k = codes.shape
        y = torch.empty((n, k), dtype=dtype, device=codes.device)
        if n == 0 or k == 0:
            return y
        table, scale = self._table(codebook, scale)
        kernel, launch = self._plan("dequantize", table.decoder, ROW_DTYPES[dtype], n, n, k)
        self._run(kernel, launch, (n, n, k), table, self._codes(codes), scale, codebook, y)
        return y

    def load(self, wanted: Sequence[Variant]) -> list[cubin.Cubin]:
        """Build and load variants ahead of their first call, several at a time; see `Builder.obtain_all`.

        Raises:
            KernelsUnavailable: one cannot be had.
        """
        newest, capability = self._driver.version[0], self.device.capability
        missing = [v for v in wanted if cubin.FROM_FILES.find(v.name, capability, newest) is None]
        arch = arch_for(capability)
        built = self._builder.obtain_all(missing, arch, newest)
        there = {made.name for made in built}
        left_out = {variant.name for variant in missing if variant.name not in there}
        return [self._kernel(variant).cubin for variant in wanted if variant.name not in left_out]

    def tune(
        self,
        m: int,
        codes: Tensor,
        scale: Tensor,
        codebook: Tensor,
        dtype: torch.dtype,
        measure: Callable[[Callable[[int], None]], float] = choice.event_ms,
    ) -> dict[str, float]:
        """Time every variant that can compute m rows with these codes, and take the fastest from now on.

        Weights rotate through copies that no cache holds. Outside of graph capture only.

        Args:
            measure: milliseconds of a launch, given what queues the i-th one.

        Returns:
            Milliseconds by the variant's name; one that cannot be had is left out, with a warning.
        """
        n, k = codes.shape
        table, scale = self._table(codebook, scale)
        kind = table.decoder, DTYPES[dtype]
        x = torch.ones((m, k), dtype=dtype, device=codes.device)
        y = torch.empty((m, n), dtype=dtype, device=codes.device)
        count = max(1, min(64, choice.ROTATED_BYTES // max(1, codes.numel())))
        copies = [self._codes(codes)] + [codes.clone() for _ in range(count - 1)]
        times: dict[str, float] = {}
        for variant in self._candidates(*kind, m, n, k):
            try:
                kernel, launch = self._kernel(variant), variant.launch(m, n, k)
                kernel.prepare(launch)
            except KernelsUnavailable as error:
                self._say(f"{variant.name} is not measured: {error}")
                continue

            def run(i: int, kernel: Kernel = kernel, launch: Launch = launch) -> None:
                self._run(kernel, launch, (m, n, k), table, copies[i % count], scale, codebook, y, x=x)

            times[variant.name] = measure(run)
        if times:
            self._choices.add({choice.bucket(*kind, m, n, k): min(times, key=lambda name: times[name])})
            with self._lock:
                self._plans.clear()
        return times

    def _table(self, codebook: Tensor, scale: Tensor) -> tuple[Table, Tensor]:
        """Return the decoder, and the scales it needs."""
        table = self._tables.find(codebook)
        if table is None:
            self._refuse_capture("a codebook that it has not seen")
            table = self._tables.of(codebook)
        if table.unit == 1.0:
            return table, scale.contiguous()
        memory = self._scaled.setdefault(table.unit, TensorCache(lambda scale: _finished(scale * table.unit)))
        found = memory.find(scale)
        if found is None:
            # What a capture allocates holds nothing until the graph runs: it must not be cached.
            found = scale * table.unit if self._capturing() else memory.of(scale)
        return table, found

    def _codes(self, codes: Tensor) -> Tensor:
        if codes.is_contiguous() and codes.data_ptr() % ALIGNMENT == 0:
            return codes
        self._say(
            f"codes of shape {tuple(codes.shape)} are not contiguous at a multiple of {ALIGNMENT} bytes and are copied "
            "at each call; make them so once, with .clone(memory_format=torch.contiguous_format)"
        )
        return aligned(codes)

    def _plan(self, family: str, decoder: str, dtype: str, m: int, n: int, k: int) -> tuple[Kernel, Launch]:
        key = (family, decoder, dtype, m, n, k)
        plan = self._plans.get(key)
        if plan is None:
            with self._lock:
                plan = self._first_there(self._ordered(family, decoder, dtype, m, n, k), m, n, k)
                if len(self._plans) >= _MOST_PLANS:
                    self._plans.clear()
                self._plans[key] = plan
        return plan

    def _ordered(self, family: str, decoder: str, dtype: str, m: int, n: int, k: int) -> tuple[Variant, ...]:
        """Return the variants that compute this, the one to take first."""
        if family != "linear":
            return (variants.row_variant(family, decoder, dtype, k),)
        found = self._candidates(decoder, dtype, m, n, k)
        chosen = self._choices.pick(found, decoder, dtype, m, n, k)
        return (chosen, *(variant for variant in found if variant is not chosen))

    def _first_there(self, ordered: Sequence[Variant], m: int, n: int, k: int) -> tuple[Kernel, Launch]:
        """Return the first that can be had: some need a compiler of their own."""
        reasons = []
        for variant in ordered:
            try:
                kernel, launch = self._kernel(variant), variant.launch(m, n, k)
                kernel.prepare(launch)
            except KernelsUnavailable as error:
                reasons.append(error)
            else:
                return kernel, launch
        raise reasons[0]

    def _candidates(self, decoder: str, dtype: str, m: int, n: int, k: int) -> tuple[Variant, ...]:
        found = variants.linear_variants(decoder, dtype, m, n, k, self.device.shared)
        if not found:
            raise KernelsUnavailable(
                f"no kernel for {m} rows of {dtype} and {n} × {k} codes fits the {self.device.shared} bytes of shared "
                f"memory of {self.device.name}"
            )
        return (*found, *variants.measured_variants(decoder, dtype, m, n, k, self.device.arch))

    def _kernel(self, variant: Variant) -> Kernel:
        """Return the loaded kernel of a variant; a failure is not tried again until another file brings kernels."""
        with self._lock:
            kernel = self._kernels.get(variant.name)
            if kernel is not None:
                return kernel
            generation, reason = self._failed.get(variant.name, (-1, ""))
            if generation == cubin.FROM_FILES.generation:
                raise KernelsUnavailable(reason)
            self._refuse_capture(f"kernel {variant.name}, which is not loaded yet")
            try:
                capability, newest = self.device.capability, self._driver.version[0]
                found = self._builder.find(variant, capability, newest)
                kernel = Kernel(self._driver, self.device, found)
            except KernelsUnavailable as error:
                self._failed[variant.name] = cubin.FROM_FILES.generation, str(error)
                raise
            self._kernels[variant.name] = kernel
            return kernel

    def _capturing(self) -> bool:
        return self._driver.capturing(self._stream())

    def _refuse_capture(self, what: str) -> None:
        if self._capturing():
            raise NotPrepared(
                f"a CUDA graph is being captured and needs {what}; run the model once with inputs of this shape before "
                "the capture"
            )

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s", what)

    def _run(
        self,
        kernel: Kernel,
        launch: Launch,
        shape: tuple[int, int, int],
        table: Table,
        codes: Tensor,
        scale: Tensor,
        codebook: Tensor,
        y: Tensor,
        x: Tensor | None = None,
        ids: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        values = {
            "x": 0 if x is None else x.data_ptr(),
            "ids": 0 if ids is None else ids.data_ptr(),
            "codes": codes.data_ptr(),
            "scale": scale.data_ptr(),
            "codebook": (codebook if table.table is None else table.table).data_ptr(),
            # A pointer that the kernel does not follow; it must only be one.
            "bias": (scale if bias is None else bias).data_ptr(),
            "y": y.data_ptr(),
            "scratch": 0,
            "m": shape[0],
            "n": shape[1],
            "k": shape[2],
            "scale_stride": int(scale.shape[0] != 1),
            "bias_on": int(bias is not None),
        }
        kernel(launch, self._stream(), values)


def _finished(tensor: Tensor) -> Tensor:
    """The tensor once it is computed: one that is kept may be read on any stream."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
    return tensor


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, copied if it is not contiguous or does not start at a multiple of 16 bytes."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone(memory_format=torch.contiguous_format)
