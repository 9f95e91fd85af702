"""From tensors to tensors: TVM's text, nvcc's cubin, the driver's bytes of parameters, and the text run on the CPU.

What the other tests replace by doubles is real here but for the GPU: a launch that reaches the stub driver runs on the
emulator, at the addresses that it was handed.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.closeness import assert_rejects_corruption, dot_bound
from support.cuda_device import array
from support.cuda_stub import Launched, Stub, stub  # noqa: F401

from ggpass.errors import KernelsUnavailable
from ggpass.formats import FORMATS, quantize
from ggpass.kernels.cuda import compiler, cubin
from ggpass.kernels.cuda.build import Builder
from ggpass.kernels.cuda.cubin import FileKernels
from ggpass.kernels.cuda.kernels import CudaKernels
from ggpass.kernels.cuda.variants import Launch
from ggpass.targets import cuda_operators

pytest.importorskip("tvm")

WIDTHS = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}


class Emulated:
    """The stub's launches on the emulator, and the sources that were compiled, by entry."""

    def __init__(self) -> None:
        self.sources: dict[str, compiler.Source] = {}
        self.failure: Exception | None = None

    def generate(self, variant: object) -> compiler.Source:
        made = cuda_operators.generate(variant)
        self.sources[made.entry] = made
        return made

    def launch(self, launched: Launched) -> None:
        from support.cuda_emulator.run import run

        source = self.sources[launched.name]
        given = launched.values(tuple(source.parameters))
        m, n, k = given["m"], given.get("n", given["m"]), given["k"]
        kind = next(width for name, width in WIDTHS.items() if name in launched.name)
        columns = n if "x" in given else k
        shapes = {
            "x": ((m, k), kind),
            "codes": ((n, k), np.uint8),
            "scale": ((n if given["scale_stride"] else 1,), np.float32),
            "codebook": ((256,), np.float32),
            "bias": ((n if given.get("bias_on") else 1,), np.float32),
            "ids": ((m,), np.int64),
            "y": ((m, columns), kind),
        }
        arguments = {name: array(value, *shapes[name]) if name in shapes else value for name, value in given.items()}
        outputs = {"y": arguments.pop("y")}
        launch = Launch(launched.grid, launched.block, launched.shared)
        try:
            run(source, launch, arguments, outputs, in_place=True)
        except Exception as error:  # an exception does not come through the driver's C
            self.failure = error


@pytest.fixture
def emulated(stub: Stub) -> Emulated:  # noqa: F811
    made = Emulated()
    stub.on_launch(made.launch)
    return made


@pytest.fixture
def gpu(stub: Stub, emulated: Emulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CudaKernels:  # noqa: F811
    try:
        compiler.find()
    except KernelsUnavailable as reason:
        pytest.skip(str(reason))
    monkeypatch.setattr(cubin, "FROM_FILES", FileKernels())
    driver = stub.driver()
    return CudaKernels(driver, driver.device(0), lambda: 0, Builder(emulated.generate, tmp_path))


@pytest.mark.parametrize(
    ("m", "n", "k", "name", "dtype"),
    [(1, 24, 64, "rf8", torch.bfloat16), (5, 9, 83, "int8", torch.float16), (40, 70, 128, "rf8", torch.float16)],
)
def test_linear(gpu: CudaKernels, emulated: Emulated, m: int, n: int, k: int, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    made = quantize(torch.randn(n, k), FORMATS[name])
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    codebook = FORMATS[name].codebook
    y = gpu.linear(x, made.codes, made.scale, bias, codebook)
    assert emulated.failure is None, emulated.failure
    weights = codebook[made.codes.int()]
    expected = x.double() @ (weights.double() * made.scale.double()[:, None]).T + bias.double()
    bound = dot_bound(x, weights, made.scale, bias)
    bound = bound + torch.finfo(dtype).eps / 2 * (expected.abs() + bound)
    assert_rejects_corruption(y, expected, bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_embedding_and_dequantize(gpu: CudaKernels, emulated: Emulated, dtype: torch.dtype) -> None:
    made = quantize(torch.randn(11, 40), FORMATS["rf8"])
    values = FORMATS["rf8"].codebook.double()[made.codes.int()] * made.scale.double()[:, None]
    ids = torch.tensor([3, 0, 10, 3, 11, -1])
    rows = gpu.embedding(ids, made.codes, made.scale, FORMATS["rf8"].codebook, dtype)
    assert emulated.failure is None, emulated.failure
    # RF8's values times a power of two are exact in either dtype.
    assert torch.equal(rows[:4].double(), values[ids[:4]])
    assert rows[4:].isnan().all()
    whole = gpu.dequantize(made.codes, made.scale, FORMATS["rf8"].codebook, dtype)
    assert emulated.failure is None, emulated.failure
    assert torch.equal(whole.double(), values)
