"""Every kernel against float64 on every class of shape, before anything is timed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from timing import DEVICE
from torch import Tensor

from ggpass.errors import KernelsUnavailable
from ggpass.kernels.cuda.kernels import CudaKernels
from ggpass.kernels.cuda.launch import Kernel
from ggpass.kernels.cuda.variants import Variant, every_linear, linear_variants, measured_variants, row_variant

# The tests' inputs and bounds: the same for the emulator there and for the GPU here.
sys.path.append(str(Path(__file__).parents[2] / "tests"))
from support.cuda_cases import DTYPES, FORMATS, Linear, random_codes, random_linear

#: Rows of x around every tile, and (n, k): whole tiles, no multiple of any, K % 16 ≠ 0, shorter than a step.
ROWS = (1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 127, 128, 129, 513, 1100)
LAYERS = ((128, 256), (131, 1040), (96, 100), (1, 16), (7, 1), (528, 2064))


def linear_cases(few: bool, arch: str) -> Iterator[tuple[Variant, Linear]]:
    """Each variant with each class that it can compute; `few` for a run under a sanitizer."""
    rows = (1, 9, 33, 65, 129) if few else ROWS
    layers = LAYERS[:5] if few else LAYERS
    for decoder, formats in FORMATS.items():
        for name, dtype in DTYPES.items():
            for i, m in enumerate(rows):
                for j, (n, k) in enumerate(layers):
                    format = formats[(i + j) % len(formats)]
                    case = random_linear(format, dtype, m, n, k, one_scale=(i + j) % 3 == 0, bias=(i + j) % 2 == 0)
                    always = linear_variants(decoder, name, m, n, k, shared=1 << 20)
                    for variant in (*always, *measured_variants(decoder, name, m, n, k, arch)):
                        yield variant, case


def run_variant(kernels: CudaKernels, loaded: dict[str, Kernel], variant: Variant, case: Linear) -> Tensor:
    """y of a case, by this variant and no other."""
    kernel, launch = loaded[variant.name], variant.launch(*case.shape)
    kernel.prepare(launch)
    m, n, k = case.shape
    x, codes, scale, codebook = (t.to(DEVICE) for t in (case.x, case.codes, case.scale, case.format.codebook))
    bias = scale if case.bias is None else case.bias.to(DEVICE)
    y = torch.full((m, n), torch.nan, dtype=x.dtype, device=DEVICE)
    tensors = {"x": x, "codes": codes, "scale": scale, "codebook": codebook, "bias": bias, "y": y}
    values = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    values |= {
        "scratch": 0,
        "m": m,
        "n": n,
        "k": k,
        "scale_stride": int(scale.numel() > 1),
        "bias_on": int(case.bias is not None),
    }
    kernel(launch, torch.cuda.current_stream().cuda_stream, values)
    torch.cuda.synchronize()
    return y.cpu()


def load_all(kernels: CudaKernels) -> tuple[dict[str, Kernel], list[str]]:
    """Every kernel for this device by its variant's name, and why Triton's are not among them."""
    kinds = [(decoder, name) for decoder in FORMATS for name in DTYPES]
    wanted = [variant for kind in kinds for k in (16, 15) for variant in every_linear(*kind, k)]
    cubins = kernels.load([v for v in wanted if v.launch(1, 1, 1).shared <= kernels.device.shared])
    missing = []
    for variant in [v for kind in kinds for v in measured_variants(*kind, 4096, 4096, 4096, kernels.device.arch)]:
        try:
            cubins += kernels.load([variant])
        except KernelsUnavailable as error:
            missing.append(str(error))
    return {cubin.name: Kernel(kernels._driver, kernels.device, cubin) for cubin in cubins}, missing


def check_linear(kernels: CudaKernels, few: bool) -> tuple[list[str], list[str]]:
    """Run every variant; returns what is wrong, one line for each, and what could not be built."""
    loaded, missing = load_all(kernels)
    wrong = []
    for variant, case in linear_cases(few, kernels.device.arch):
        if variant.name not in loaded:
            continue
        try:
            case.check(run_variant(kernels, loaded, variant, case), chopped=True)
        except AssertionError as error:
            wrong.append(f"{variant.name} at (m, n, k) = {case.shape}: {error}")
    return wrong, missing


def check_rows(kernels: CudaKernels) -> list[str]:
    """Embedding and dequantization, bit for bit: one product in float32 and one rounding."""
    wrong = []
    for decoder, formats in FORMATS.items():
        for name, dtype in DTYPES.items():
            for n, k in LAYERS:
                codes, scale = random_codes(formats[0], n, k), torch.rand(n) + 0.5
                weights = (formats[0].codebook[codes.long()] * scale[:, None]).to(dtype)
                ids = torch.randint(0, n, (37,))
                on = [t.to(DEVICE) for t in (codes, scale, formats[0].codebook)]
                found = {"embedding": (kernels.embedding(ids.to(DEVICE), *on, dtype), weights[ids])}
                found["dequantize"] = kernels.dequantize(*on, dtype), weights
                for family, (got, expected) in found.items():
                    # int8's unit is folded into the scale: another order of two roundings, one unit at most.
                    far = (got.cpu().float() - expected.float()).abs() > torch.finfo(dtype).eps * expected.float().abs()
                    if bool(far.any()) or (decoder == "rf8" and not torch.equal(got.cpu(), expected)):
                        wrong.append(f"{row_variant(family, decoder, name, k).name} at (n, k) = {(n, k)}")
    outside = kernels.embedding(torch.tensor([-1, 7], device=DEVICE), *on, dtype)
    if not bool(outside[:1].isnan().all()):
        wrong.append("the row of an id outside the codes is not NaN")
    return wrong
