# mypy: ignore-errors
"""y[m, n] = scale[n] · Σ_k x[m, k] · w[n, k] + bias[n] as yᵀ = w · xᵀ, for the tensor cores from Hopper on.

Their full rate needs instructions that a whole group of warps issues: Hopper's wgmma, Blackwell's tcgen05. These read
operand B from shared memory, where decoded weights would have to be written first; operand A may stay in registers
(Hopper) or go to tensor memory (Blackwell). Hence the weights are A, and x, transposed, is B.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from ggpass.kernels.cuda.generate.triton.decode import DECODE
from ggpass.kernels.cuda.variants import Triton

#: In the kernel's order. Triton adds two pointers to scratch memory, which these kernels have none of.
PARAMETERS = ("x", "codes", "scale", "bias", "y", "m", "n", "k", "scale_stride", "bias_on", "scratch", "scratch")


@triton.jit
def gemm(
    x, codes, scale, bias, y, m, n, k, scale_stride, bias_on,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TOGETHER: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """Return one block of ROWS rows of x and COLUMNS rows of codes; TOGETHER blocks of rows share codes in the L2."""
    in_bundle = TOGETHER * tl.cdiv(n, COLUMNS)
    block = tl.program_id(0)
    first = block // in_bundle * TOGETHER
    count = min(tl.cdiv(m, ROWS) - first, TOGETHER)
    row = (first + block % in_bundle % count) * ROWS + tl.arange(0, ROWS)
    column = block % in_bundle // count * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    # Rows that do not exist read the first: what they give is not stored.
    from_x = x + tl.where(row < m, row, 0).to(tl.int64)[None, :] * k + depth[:, None]
    from_codes = codes + tl.where(column < n, column, 0).to(tl.int64)[:, None] * k + depth[None, :]
    sums = tl.zeros((COLUMNS, ROWS), tl.float32)
    for step in range(tl.cdiv(k, DEPTH)):
        left = k - step * DEPTH
        bytes_ = tl.load(from_codes, mask=depth[None, :] < left, other=0)
        values = tl.load(from_x, mask=depth[:, None] < left, other=0)
        weights = tl.inline_asm_elementwise(DECODE, "=r,=r,r", [bytes_], dtype=values.dtype, is_pure=True, pack=4)
        sums = tl.dot(weights, values, sums)
        from_codes += DEPTH
        from_x += DEPTH
    factor = tl.load(scale + column * scale_stride, mask=column < n, other=0)
    shift = tl.load(bias + column, mask=(column < n) & (bias_on != 0), other=0)
    rounded = (sums * factor[:, None] + shift[:, None]).to(y.dtype.element_ty)
    to = y + row.to(tl.int64)[None, :] * n + column[:, None]
    tl.store(to, rounded, mask=(column[:, None] < n) & (row[None, :] < m))


@dataclass(frozen=True)
class Built:
    """A cubin of Triton's.

    Attributes:
        cubin: the image.
        entry: the kernel's name in it.
        parameters: their names, in order.
        cuda: the CUDA release of Triton's assembler.
        arch: what it runs on: Hopper's and Blackwell's wide instructions belong to one capability alone.
        shared: bytes of dynamic shared memory.
        log: what Triton says of it.
    """

    cubin: bytes
    entry: str
    parameters: tuple[str, ...]
    cuda: int
    arch: str
    shared: int
    log: str


def build(variant: Triton, arch: str) -> Built:
    """Compile for "sm_90" or another of `Triton.ARCHS`; no GPU is needed.

    Raises:
        RuntimeError: this Triton's kernel takes more shared memory than the variant says.
    """
    kind = {"bfloat16": "bf16", "float16": "fp16"}[variant.dtype]
    pointers = {"x": f"*{kind}", "codes": "*u8", "scale": "*fp32", "bias": "*fp32", "y": f"*{kind}"}
    numbers = dict.fromkeys(("m", "n", "k", "scale_stride", "bias_on"), "i32")
    constants = {
        "ROWS": variant.rows, "COLUMNS": variant.columns, "DEPTH": variant.depth, "TOGETHER": variant.together,
        "DECODE": DECODE[variant.dtype],
    }  # fmt: skip
    signature = pointers | numbers | dict.fromkeys(constants, "constexpr")
    whole = [list(signature).index(name) for name in ("x", "codes", "y", "n", "k")]
    source = ASTSource(gemm, signature, constants, {(at,): [["tt.divisibility", 16]] for at in whole})
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True}
    # Triton keeps what it compiles; here our own cache does.
    with tempfile.TemporaryDirectory(prefix="ggpass-triton-") as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        compiled = triton.compile(source, target=target, options=options)
    found = compiled.metadata
    if found.shared > variant.launch(1, 1, 1).shared or found.global_scratch_size or found.profile_scratch_size:
        raise RuntimeError(
            f"Triton {triton.__version__} makes {variant.name} with {found.shared} bytes of shared memory and "
            f"{found.global_scratch_size} of scratch memory, which this ggpass is not made for"
        )
    log = f"triton {triton.__version__}: {found.shared} bytes of dynamic shared memory, {found.num_warps} warps"
    cuda = int(get_ptxas(target.arch).version.partition(".")[0])
    return Built(compiled.asm["cubin"], found.name, PARAMETERS, cuda, f"{arch}a", found.shared, log)
