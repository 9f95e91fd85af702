"""What the CUDA kernels compile to, read from ptxas's log and from the machine code; no GPU is needed.

`pytest tests/test_cuda_sass.py -m "not slow"` compiles each blocking, decoder, dtype and architecture once, in half a
minute; `pytest tests/test_cuda_sass.py -m slow` every kernel for every architecture, in ten.
"""

import functools
import itertools
import re
import subprocess
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest

from ggpass.errors import KernelsUnavailable
from ggpass.kernels.cuda import compiler
from ggpass.kernels.cuda.archs import ARCHS
from ggpass.kernels.cuda.variants import DECODERS, DTYPES, Variant, every_linear, row_variant

pytest.importorskip("tvm")

KINDS = list(itertools.product(DECODERS, DTYPES, (16, 15)))
#: Registers of a multiprocessor, the same on all of ARCHS.
REGISTERS = 65536


def disassembler() -> Path:
    """nvdisasm out of its package."""
    try:
        files = metadata.files("nvidia-cuda-nvdisasm") or []
    except metadata.PackageNotFoundError:
        pytest.skip("no disassembler for machine code; `pip install nvidia-cuda-nvdisasm`")
    return next(Path(str(file.locate())) for file in files if file.name == "nvdisasm")


def every_variant() -> list[Variant]:
    linear = [variant for kind in KINDS for variant in every_linear(*kind)]
    rows = itertools.product(("embedding", "dequantize"), DECODERS, (*DTYPES, "float32"), (16, 15))
    return [*linear, *(row_variant(*kind) for kind in rows)]


def covering() -> list[tuple[Variant, str]]:
    """Blockings, kinds and architectures in turn, and two of the row kernels."""
    blockings = len(every_linear(*KINDS[0]))
    chosen: list[Variant] = [every_linear(*KINDS[i % 8])[i % blockings] for i in range(max(8, blockings))]
    chosen += [row_variant("embedding", "rf8", "bfloat16", 16), row_variant("dequantize", "table", "float32", 15)]
    return [(variant, ARCHS[i % len(ARCHS)]) for i, variant in enumerate(chosen)]


@functools.cache
def compiled(variant: Variant, arch: str) -> compiler.Compiled:
    from ggpass.kernels.cuda.generate.source import source

    try:
        found = compiler.find()
    except KernelsUnavailable as reason:
        pytest.skip(str(reason))
    return found.compile(source(variant).text, arch, variant.name)


def instructions(variant: Variant, arch: str, folder: Path) -> Counter[str]:
    """How often each instruction occurs, by its whole name."""
    program, cubin = disassembler(), folder / "kernel.cubin"
    cubin.write_bytes(compiled(variant, arch).cubin)
    run = subprocess.run([program, "-c", cubin], capture_output=True, text=True, check=True)
    return Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", run.stdout, re.MULTILINE))


def count(found: Counter[str], pattern: str) -> int:
    return sum(number for name, number in found.items() if re.fullmatch(pattern, name))


def check_log(variant: Variant, arch: str) -> None:
    """Nothing is spilled, nothing is on a stack, and the registers of a block's threads exist."""
    log = compiled(variant, arch).log
    assert re.search(r"Compiling entry function '(\w+)' for '(\w+)'", log).groups() == (variant.name, arch)
    numbers = re.findall(r"(\d+) bytes (stack frame|spill stores|spill loads)", log)
    assert numbers == [("0", "stack frame"), ("0", "spill stores"), ("0", "spill loads")]
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    assert registers * variant.launch(1, 1, 16).block <= REGISTERS


def check_instructions(variant: Variant, arch: str, folder: Path) -> None:
    found = instructions(variant, arch, folder)
    assert count(found, r"(LD|ST)L(\..*)?") == 0, "local memory"
    assert count(found, r"EXIT") >= 1
    decodes = r"HMUL2\..*|HFMA2\..*|HMUL2|HFMA2" if variant.decoder == "rf8" else r"LDS(\.U)?"
    assert count(found, decodes) >= 1
    assert variant.decoder == "table" or count(found, r"PRMT") >= 4
    if variant.family in ("small", "gemm"):
        suffix = r"\.BF16" if variant.dtype == "bfloat16" else ""
        assert count(found, rf"HMMA\.16816\.F32{suffix}") >= 8
        whole = count(found, r"LDGSTS\.E\..*128")
        # Those copies begin before the loop and in it; rows that begin anywhere are read byte by byte.
        assert (whole >= 4) == variant.aligned
        assert (count(found, r"LDG\.E\.U8(\..*)?") >= 16) != variant.aligned
        assert count(found, r"LDS\.128") >= 3
    elif variant.aligned:
        assert count(found, r"STG\.E\.128(\..*)?") >= 4
        assert count(found, r"LDG\.E(\.64)?(\..*)?") >= 4


@pytest.mark.parametrize(("variant", "arch"), covering(), ids=lambda value: getattr(value, "name", value))
def test_a_kernel_uses_the_tensor_cores_wide_copies_and_no_stack(variant: Variant, arch: str, tmp_path: Path) -> None:
    check_log(variant, arch)
    check_instructions(variant, arch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("variant", every_variant(), ids=lambda variant: variant.name)
def test_every_kernel_for_every_architecture(variant: Variant, arch: str, tmp_path: Path) -> None:
    check_log(variant, arch)
    check_instructions(variant, arch, tmp_path)


def test_covering_meets_every_choice() -> None:
    """Each blocking, decoder, dtype, alignment and architecture occurs in what is compiled by default."""
    linear = [(v, arch) for v, arch in covering() if v.family in ("small", "gemm")]
    assert {v.name.split("_rf8")[0].split("_table")[0] for v, _ in linear} == {
        v.name.split("_rf8")[0] for v in every_linear("rf8", "bfloat16", 16)
    }
    assert {(v.decoder, v.dtype, v.aligned) for v, _ in linear} == {(d, t, k == 16) for d, t, k in KINDS}
    assert {arch for _, arch in covering()} == set(ARCHS)
