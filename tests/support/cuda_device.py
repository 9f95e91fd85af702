"""A GPU for the tests: what is launched on the stub driver is computed on the CPU, from the parameters alone."""

import ctypes
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ggpass.kernels import cache
from ggpass.kernels.cuda import compiler
from ggpass.kernels.cuda.build import Builder
from ggpass.kernels.cuda.compiler import Compiled, Source
from ggpass.kernels.cuda.kernels import CudaKernels
from ggpass.targets import cuda
from support.cuda_stub import Launched, Stub

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}

LINEAR = ("x", "codes", "scale", "codebook", "bias", "y", "m", "n", "k", "scale_stride", "bias_on")
EMBEDDING = ("ids", "codes", "scale", "codebook", "y", "m", "n", "k", "scale_stride")
DEQUANTIZE = ("codes", "scale", "codebook", "y", "m", "k", "scale_stride")
PARAMETERS = {"small": LINEAR, "gemm": LINEAR, "embedding": EMBEDDING, "dequantize": DEQUANTIZE}


def parameters_of(entry: str) -> tuple[str, ...]:
    return PARAMETERS[entry.partition("_")[0]]


def describe(variant: object) -> Source:
    """A source without text: the device below computes by the kernel's name."""
    name = variant.name
    return Source("", name, parameters_of(name))


def elf(arch: int, entry: str, abi: int = 8) -> bytes:
    """As much of a cubin as a driver looks at before it reads code: the header, and the entry's name."""
    head = bytearray(64)
    head[:9] = b"\x7fELF\x02\x01\x01\x41" + bytes([abi])
    head[40:48] = (64 + len(entry) + 1).to_bytes(8, "little")
    head[48:52] = (arch << 8 if abi >= 8 else arch).to_bytes(4, "little")
    return bytes(head) + entry.encode() + b"\0"


@dataclass
class NameCompiler:
    """Builds cubins that hold their kernel's name and no code."""

    label: str = "nvcc13.0.88"
    major: int = 13
    built: list[tuple[str, str]] = field(default_factory=list)

    def compile(self, source: str, arch: str, name: str) -> Compiled:
        self.built.append((name, arch))
        log = "0 bytes spill stores, 0 bytes spill loads\nUsed 40 registers, 512 bytes smem"
        return Compiled(elf(int(arch.removeprefix("sm_")), name), log)


def array(address: int, shape: tuple[int, ...], dtype: object) -> np.ndarray:
    """Memory as an array."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


def compute(launch: Launched) -> None:
    """What a kernel of this name computes, in float64; alignment and strides are what kernels rely on."""
    values = launch.values(parameters_of(launch.name))
    dtype = next(kind for name, kind in DTYPES.items() if name in launch.name)
    m, k = values["m"], values["k"]
    n = values.get("n", m)
    for name in ("x", "codes", "y"):
        assert values.get(name, 0) % 16 == 0, f"{name} lies at {values[name]:#x}"
    codes = array(values["codes"], (n, k), np.uint8)
    codebook = array(values["codebook"], (256,), np.float32).astype(np.float64)
    # As in the kernels, the table's values are those of the activations' dtype.
    weights = (codebook if "_rf8_" in launch.name else codebook.astype(dtype).astype(np.float64))[codes]
    stride = values["scale_stride"]
    scale = array(values["scale"], (n if stride else 1,), np.float32).astype(np.float64)[:, None] * np.ones((n, 1))
    y = array(values["y"], (m, k if "x" not in values else n), dtype)
    if "x" in values:
        x = array(values["x"], (m, k), dtype).astype(np.float64)
        sums = x @ (weights * scale).T
        y[...] = sums + (array(values["bias"], (n,), np.float32) if values["bias_on"] else 0)
    elif "ids" in values:
        ids = array(values["ids"], (m,), np.int64)
        inside = (ids >= 0) & (ids < n)
        y[...] = np.where(inside[:, None], (weights * scale)[np.where(inside, ids, 0)], np.nan)
    else:
        y[...] = weights * scale


def build_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> NameCompiler:
    """`compile(..., arch=)` with a compiler that writes names."""
    fake = NameCompiler()
    monkeypatch.setattr(compiler, "_compilers", lambda: iter([fake]))
    monkeypatch.setattr(cache, "default_directory", lambda: folder)
    monkeypatch.setattr(cuda, "generate", describe)
    return fake


@dataclass
class Gpu:
    """The stub, kernels on it, and what was built for it."""

    stub: Stub
    kernels: CudaKernels
    compiler: NameCompiler
    directory: Path

    @property
    def last(self) -> Launched:
        return self.stub.launches[-1]

    def again(self) -> "Gpu":
        """A second process on the same machine: nothing loaded, the same disk."""
        return dataclasses.replace(self, kernels=kernels_of(self.stub, self.directory))


def kernels_of(stub: Stub, directory: Path, stream: int = 7) -> CudaKernels:
    driver = stub.driver()
    return CudaKernels(driver, driver.device(0), lambda: stream, Builder(describe, directory))


def make_gpu(stub: Stub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A GPU whose kernels compute by name; the compiler writes only names.

    Triton brings a compiler of its own, which does not: here it counts as not installed, whether or not it is.
    """
    version_of = cache.version_of
    monkeypatch.setattr(cache, "version_of", lambda name: None if name == "triton" else version_of(name))
    fake = NameCompiler()
    monkeypatch.setattr(compiler, "_compilers", lambda: iter([fake]))
    stub.on_launch(compute)
    return Gpu(stub, kernels_of(stub, folder), fake, folder)
