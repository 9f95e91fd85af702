"""The Triton kernel without a GPU: its decoder's PTX on all codes, where it is offered, its blocks, its building."""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ggpass.errors import KernelsUnavailable
from ggpass.formats.rf8 import RF8
from ggpass.kernels.cuda import build
from ggpass.kernels.cuda.build import Builder
from ggpass.kernels.cuda.generate.triton.decode import DECODE
from ggpass.kernels.cuda.variants import Triton, linear_variants, measured_variants

INSTRUCTION = re.compile(r"^(\w+)\.[\w.]+ (.*);$", re.MULTILINE)
FLOATS = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def prmt(low: int, high: int, selector: int) -> int:
    """The PTX instruction in its default mode: four of eight bytes, by the low three bits of each nibble."""
    data = (high << 32 | low).to_bytes(8, "little")
    nibbles = [selector >> 4 * i & 0xF for i in range(4)]
    assert all(nibble < 8 for nibble in nibbles), "a sign would be replicated"
    return int.from_bytes(bytes(data[nibble] for nibble in nibbles), "little")


def multiply(a: int, b: int, c: int, dtype: str) -> int:
    """fma.rn.x2: two 16-bit floats, one rounding."""
    halves = [np.array([v], np.uint32).view(np.uint16).view(FLOATS[dtype]).astype(np.float64) for v in (a, b, c)]
    return int((halves[0] * halves[1] + halves[2]).astype(FLOATS[dtype]).view(np.uint16).view(np.uint32)[0])


def execute(text: str, codes: int, dtype: str) -> tuple[int, int]:
    """$0 and $1 of a block of PTX, for $2 = codes."""
    registers = {"$2": codes}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for operation, operands in INSTRUCTION.findall(text):
        target, *names = (part.strip() for part in operands.split(","))
        a, *rest = map(value, names)
        if operation == "lop3":
            assert rest[2] == 0xEA
            registers[target] = (a & rest[0]) | rest[1]
        elif operation == "fma":
            registers[target] = multiply(a, *rest, dtype)
        else:
            compute = {
                "mov": lambda a: a, "and": lambda a, b: a & b, "xor": lambda a, b: a ^ b, "prmt": prmt,
                "shr": lambda a, b: a >> b, "shl": lambda a, b: a << b & 0xFFFFFFFF,
            }[operation]  # fmt: skip
            registers[target] = compute(a, *rest)
    return registers["$0"], registers["$1"]


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_decoder_is_exact_for_every_code_at_every_place(dtype: str) -> None:
    """In float16 the kernels hold RF8's values as they are, too: all lie in its normal range."""
    codebook = RF8.codebook.numpy().astype(np.float64)
    # Every line but the declaration and the brackets is an instruction that `execute` sees.
    assert len(INSTRUCTION.findall(DECODE[dtype])) == len(DECODE[dtype].split("\n")) - 3
    for code in range(256):
        for place in range(4):
            four = [(code + 37 * i * i) % 256 for i in range(4)]
            four = four[place:] + four[:place]
            out = execute(DECODE[dtype], int.from_bytes(bytes(four), "little"), dtype)
            got = np.array(out, np.uint32).view(np.uint16).view(FLOATS[dtype]).astype(np.float64)
            expected = codebook[four]
            finite = np.isfinite(expected)
            assert np.array_equal(got[finite], expected[finite]), four


def test_it_is_offered_where_it_can_gain_and_never_first() -> None:
    offered = [v.name for v in measured_variants("rf8", "bfloat16", 512, 4096, 4096, "sm_90")]
    assert len(set(offered)) == len(offered) > 0
    for m, n, k, arch, decoder in [
        (64, 4096, 4096, "sm_90", "rf8"),
        (512, 4100, 4096, "sm_90", "rf8"),
        (512, 4096, 4100, "sm_90", "rf8"),
        (512, 4096, 4096, "sm_80", "rf8"),
        (512, 4096, 4096, "sm_103", "rf8"),
        (512, 4096, 4096, "sm_90", "table"),
    ]:
        assert measured_variants(decoder, "bfloat16", m, n, k, arch) == ()
    assert not any(isinstance(v, Triton) for v in linear_variants("rf8", "bfloat16", 512, 4096, 4096, 1 << 20))


@pytest.mark.parametrize(("m", "n"), [(65, 16), (256, 128), (257, 144), (5000, 4096)])
def test_its_blocks_cover_the_output_once(m: int, n: int) -> None:
    """The kernel's order of blocks, in NumPy."""
    for variant in measured_variants("rf8", "float16", m, n, 64, "sm_90"):
        block = np.arange(variant.launch(m, n, 64).grid[0])
        rows, columns = -(-m // variant.rows), -(-n // variant.columns)
        in_bundle = variant.together * columns
        first = block // in_bundle * variant.together
        count = np.minimum(rows - first, variant.together)
        tiles = set(
            zip((first + block % in_bundle % count).tolist(), (block % in_bundle // count).tolist(), strict=True)
        )
        assert tiles == {(row, column) for row in range(rows) for column in range(columns)}
        assert len(block) == rows * columns


def refuse(variant: object) -> None:
    """In the place of TVM's generator, which Triton's kernels do not need."""
    raise AssertionError(variant)


@pytest.mark.parametrize("arch", Triton.ARCHS)
def test_it_builds_without_a_gpu(arch: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    variant = measured_variants("rf8", "bfloat16", 512, 4096, 4096, arch)[-1]
    cubin = Builder(refuse, tmp_path).obtain(variant, arch)
    assert cubin.arch == f"{arch}a"
    assert cubin.parameters[-2:] == ("scratch", "scratch")
    assert Builder(refuse, tmp_path).obtain(variant, arch) == cubin


def test_without_triton_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = build.cache.version_of
    monkeypatch.setattr(build.cache, "version_of", lambda name: None if name == "triton" else versions(name))
    variant = measured_variants("rf8", "bfloat16", 512, 4096, 4096, "sm_90")[0]
    with pytest.raises(KernelsUnavailable, match="triton is not installed"):
        Builder(refuse, tmp_path).obtain(variant, "sm_90")
