# mypy: ignore-errors
"""CUDA C of a variant: what TVM generates, behind a prelude of ours that needs no header."""

from __future__ import annotations

import re

import tvm

from ggpass.kernels.cuda.compiler import Source
from ggpass.kernels.cuda.generate.device import PRELUDE
from ggpass.kernels.cuda.generate.gemm import gemm_kernel
from ggpass.kernels.cuda.generate.rows import rows_kernel
from ggpass.kernels.cuda.generate.small import small_kernel
from ggpass.kernels.cuda.variants import Variant

_MAKERS = {"small": small_kernel, "gemm": gemm_kernel, "embedding": rows_kernel, "dequantize": rows_kernel}


def source(variant: Variant) -> Source:
    """Return the source of a variant; TVM lowers and prints it, nothing is compiled."""
    function = _MAKERS[variant.family](variant).with_attr("global_symbol", variant.name)
    # The architecture chooses nothing in what TVM prints for these kernels: what depends on it is in device functions.
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_80"}, host="llvm")
    module = tvm.compile(tvm.IRModule({variant.name: function}), target=target).mod.imports[0]
    return _own(module.inspect_source(), variant.name)


def _own(text: str, name: str) -> Source:
    """TVM's text from its first device function on, its kernel renamed, and the kernel's parameters."""
    entry = f"{name}_kernel"
    text = PRELUDE + text[_first_function(text) :]
    text = re.sub(rf"\b{entry}\b", name, text)
    signature = re.search(rf'extern "C" __global__ [^(]*\([^)]*\) {name}\(([^)]*)\) {{', text)
    if signature is None:
        raise RuntimeError(f"TVM's CUDA source of {name} has no kernel of that name; this TVM is not the pinned one")
    names = tuple(re.split(r"[\s*]+", p.strip())[-1].removesuffix("_ptr") for p in signature[1].split(","))
    return Source(text, name, names)


def _first_function(text: str) -> int:
    starts = [
        found for mark in ("__device__ __forceinline__", 'extern "C" __global__') if (found := text.find(mark)) >= 0
    ]
    return min(starts)
