"""Detection of the instruction set, and what each one compiles to."""

import re
from pathlib import Path

import pytest

from ggpass.kernels.cpu.isa import ALL, AVX2, AVX2_ZEN, AVX512, NEON, PORTABLE_X86, Isa, detect, portable

FLAGS = "fpu sse2 avx avx2 fma bmi1 bmi2 f16c movbe abm"
WIDE = FLAGS + " avx512f avx512bw avx512vl avx512dq avx512cd"

only_x86 = pytest.mark.skipif(portable() is not PORTABLE_X86, reason="reads an x86 /proc/cpuinfo")


@only_x86
@pytest.mark.parametrize(
    ("vendor", "flags", "isa"),
    [
        ("GenuineIntel", FLAGS, AVX2),
        ("AuthenticAMD", FLAGS, AVX2),
        ("AuthenticAMD", FLAGS + " vaes", AVX2_ZEN),
        ("AuthenticAMD", WIDE + " vaes", AVX512),
        ("GenuineIntel", WIDE, AVX512),
        ("GenuineIntel", "fpu sse2 avx", PORTABLE_X86),
        ("GenuineIntel", FLAGS.replace("fma ", ""), PORTABLE_X86),
    ],
)
def test_detection(tmp_path: Path, vendor: str, flags: str, isa: Isa) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    assert detect(cpuinfo) is isa


@only_x86
def test_without_cpuinfo_the_portable_kernels_are_used(tmp_path: Path) -> None:
    assert detect(tmp_path / "none") is PORTABLE_X86


def assembly(isa: Isa, kernel: str) -> str:
    """The assembly of one rows or dequantize kernel, compiled for `isa` on whatever machine this is."""
    pytest.importorskip("tvm")
    import tvm

    from ggpass.kernels.cpu.generate import module
    from ggpass.kernels.cpu.generate.decoders import decoders
    from ggpass.kernels.cpu.generate.rows import rows_kernel
    from ggpass.kernels.cpu.generate.tile import tile_kernel

    decoder = decoders(isa)[0]
    function = tile_kernel(isa, decoder, module.TILE) if kernel == "tile" else rows_kernel(isa, decoder, module.ROWS[1])
    mod = tvm.IRModule({kernel: function.with_attr("global_symbol", kernel)})
    compiled = module.compile_module(isa, mod)
    return compiled.inspect_source("asm")


@pytest.mark.parametrize(
    ("isa", "instruction"),
    [
        (AVX2, r"vpshufb\s.*%ymm"),
        (AVX2_ZEN, r"vpshufb\s.*%ymm"),
        (AVX512, r"vpshufb\s.*%zmm"),
        (NEON, r"\btbl\b.*\.16b"),
    ],
    ids=lambda value: value.name if isinstance(value, Isa) else "",
)
@pytest.mark.parametrize("kernel", ["rows1", "tile"])
def test_the_decode_compiles_to_byte_shuffles(isa: Isa, instruction: str, kernel: str) -> None:
    assert re.search(instruction, assembly(isa, kernel))


@pytest.mark.parametrize("isa", [AVX2_ZEN, AVX512], ids=lambda isa: isa.name)
def test_no_kernel_assumes_an_aligned_tensor(isa: Isa) -> None:
    """Aligned moves may touch the stack and constants, never a tensor."""
    text = assembly(isa, "rows1")
    aligned = re.findall(r"vmov(?:aps|apd|dqa\w*)\s.*\(.*", text)
    assert all(re.search(r"%r[sb]p|%rip", line) for line in aligned), aligned


@pytest.mark.parametrize("isa", ALL, ids=lambda isa: isa.name)
def test_a_step_covers_every_code_once(isa: Isa) -> None:
    pytest.importorskip("tvm")
    from ggpass.kernels.cpu.generate.decoders import decoders

    for decoder in decoders(isa):
        assert sorted(decoder.order) == list(range(isa.code_bytes))


def test_one_decode_takes_thirteen_vector_operations_for_32_codes() -> None:
    """The hot loop of M = 1 holds, for two steps of two rows: 52 to decode, 16 fused multiply-adds, two prefetches."""
    loops = re.split(r"\n\.L\w+:", assembly(AVX2_ZEN, "rows1"))
    hot = next(loop for loop in loops if "prefetcht0" in loop and loop.count("vfmadd") == 16)
    count = {name: len(re.findall(rf"\bvp{name}\s", hot)) for name in ("shufb", "and", "subb", "mulld", "mulhuw")}
    unpack = len(re.findall(r"\bvpunpck[lh]bw\s", hot))
    assert count == {"shufb": 12, "and": 16, "subb": 4, "mulld": 8, "mulhuw": 4}
    assert unpack == 8
    assert hot.count("prefetcht0") == 2
    inside = hot[: hot.rindex("vfmadd")]
    assert "rsp" not in inside  # nothing spilled: x is read from memory for each row
