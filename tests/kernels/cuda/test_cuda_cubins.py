"""CUDA C to cubin to the stub driver: nvcc and nvrtc, the disk cache, what files carry, and what is said without."""

import dataclasses
import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.cuda_stub import Stub, stub  # noqa: F401

from ggpass.errors import KernelsUnavailable
from ggpass.kernels import cache
from ggpass.kernels.cuda import build, compiler, cubin
from ggpass.kernels.cuda.build import Builder
from ggpass.kernels.cuda.compiler import Compiled
from ggpass.kernels.cuda.cubin import Cubin, FileKernels
from ggpass.kernels.cuda.launch import Kernel

AXPY = """\
extern "C" __global__ void __launch_bounds__(256) axpy(const float* x, const float* scale, float* y, int n) {
  int i = blockIdx.x * 256 + threadIdx.x;
  if (i < n) y[i] += scale[0] * x[i];
}
"""


@dataclass(frozen=True)
class Source:
    text: str = AXPY
    entry: str = "axpy"
    parameters: tuple[str, ...] = ("x", "scale", "y", "n")


@dataclass(frozen=True)
class Variant:
    name: str = "axpy"


@dataclass(frozen=True)
class Launch:
    grid: tuple[int, int, int] = (1, 1, 1)
    block: int = 256
    shared: int = 0


def generate(variant: Variant) -> Source:
    return Source()


@dataclass
class FakeCompiler:
    """Counts; its cubin is no code."""

    label: str = "nvcc13.0.88"
    major: int = 13
    count: int = 0

    def compile(self, source: str, arch: str, name: str) -> Compiled:
        self.count += 1
        return Compiled(b"\x7fELF" + f"{self.label} {arch} {name}".encode(), "Used 40 registers, 512 bytes smem")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    made = FakeCompiler()
    monkeypatch.setattr(compiler, "_compilers", lambda: iter([made]))
    monkeypatch.setattr(cubin, "FROM_FILES", FileKernels())
    return made


@functools.cache
def real(kind: str) -> compiler.Nvcc | compiler.Nvrtc:
    """nvcc or nvrtc of this machine; skips where there is none."""
    for found in compiler._compilers():
        if found.label.startswith(kind):
            return found
    pytest.skip(f"no {kind} on this machine")


@pytest.mark.parametrize("kind", ["nvcc", "nvrtc"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_90a"])
def test_a_cubin_is_built_loaded_and_launched(stub: Stub, kind: str, arch: str) -> None:  # noqa: F811
    made = real(kind).compile(AXPY, arch, "axpy")
    assert made.cubin[:4] == b"\x7fELF"
    cubin = Cubin("axpy", arch, "axpy", Source().parameters, real(kind).label, "", made.log, made.cubin)
    assert cubin.spills == 0
    assert 0 < (cubin.registers or 0) < 64
    assert f"for '{arch}'" in made.log
    stub.device(0, "Some GPU", *((8, 6) if arch == "sm_80" else (9, 0)))
    driver = stub.driver()
    Kernel(driver, driver.device(0), cubin)(Launch(), 7, {"x": 1, "scale": 2, "y": 3, "n": 4})
    (launch,) = stub.launches
    assert launch.values(Source().parameters) == {"x": 1, "scale": 2, "y": 3, "n": 4}


@pytest.mark.parametrize("kind", ["nvcc", "nvrtc"])
def test_a_refusal_carries_the_compilers_words(kind: str) -> None:
    with pytest.raises(KernelsUnavailable, match=r'cannot compile axpy for sm_90[\s\S]*identifier "z" is undefined'):
        real(kind).compile(AXPY.replace("y[i]", "z[i]"), "sm_90", "axpy")
    with pytest.raises(KernelsUnavailable, match=r"does it know sm_77\?"):
        real(kind).compile(AXPY, "sm_77", "axpy")


def test_nvrtc_from_its_package(tmp_path: Path) -> None:
    """A package's folder is not the linker's, and nvrtc opens a second library by name."""
    if not [path for path in compiler._nvrtc_paths() if "/nvidia/" in path]:
        pytest.skip("no nvrtc package on this machine")
    script = f"""if True:
        from ggpass.kernels.cuda import compiler
        nvrtc = next(filter(None, map(compiler.nvrtc_at, compiler._nvrtc_paths())))
        print(nvrtc.compile({AXPY!r}, "sm_90", "axpy").log)
    """
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "registers" in run.stdout


def test_without_a_compiler_both_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_compilers", lambda: iter([]))
    with pytest.raises(
        KernelsUnavailable, match=r"nvcc is neither.*libnvrtc is neither.*pip install nvidia-cuda-nvrtc"
    ):
        compiler.find()


def test_a_compiler_the_driver_cannot_follow_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = FakeCompiler(), FakeCompiler("nvrtc12.8", 12)
    monkeypatch.setattr(compiler, "_compilers", lambda: iter([new, old]))
    assert compiler.find() is new
    assert compiler.find(13) is new
    assert compiler.find(12) is old
    with pytest.raises(
        KernelsUnavailable, match=r"takes cubins of CUDA 11.*nvcc13\.0\.88, nvrtc12\.8 would make newer"
    ):
        compiler.find(11)


def test_nvcc_is_looked_for_where_the_toolkit_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.61'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = compiler.find()
    assert (found.label, found.major) == ("nvcc12.8.61", 12)
    monkeypatch.setenv("PATH", str(nvcc.parent))
    monkeypatch.delenv("CUDA_HOME")
    assert compiler.find().label == "nvcc12.8.61"
    assert compiler.nvcc_at("/bin/true") is None
    assert compiler.nvrtc_at("libc.so.6") is None


def test_a_kernel_is_built_once_for_each_architecture(tmp_path: Path, fake: FakeCompiler) -> None:
    first = Builder(generate, tmp_path).obtain(Variant(), "sm_90")
    again = Builder(generate, tmp_path).obtain(Variant(), "sm_90")
    assert fake.count == 1
    assert again == first
    assert (first.arch, first.entry, first.parameters, first.cuda) == ("sm_90", "axpy", Source().parameters, 13)
    assert (first.registers, first.shared, first.spills) == (40, 512, None)
    Builder(generate, tmp_path).obtain(Variant(), "sm_80")
    Builder(generate, tmp_path).obtain(Variant("other"), "sm_90")
    assert fake.count == 3


def test_the_key_follows_generator_and_compiler(tmp_path: Path, fake: FakeCompiler, monkeypatch) -> None:
    version_of = cache.version_of
    for change in ("nothing", "compiler", "generator", "tvm"):
        if change == "compiler":
            fake.label = "nvrtc13.0"
        elif change == "generator":
            monkeypatch.setattr(build, "key", lambda: "0123456789abcdef")
        elif change == "tvm":
            monkeypatch.setattr(cache, "version_of", lambda name: "9" if name == "apache-tvm" else version_of(name))
        Builder(generate, tmp_path).obtain(Variant(), "sm_90")
    assert fake.count == 4


@pytest.mark.parametrize("damage", ["cut", "flipped", "no cubin"])
def test_a_damaged_file_is_built_anew(tmp_path: Path, fake: FakeCompiler, damage: str) -> None:
    good = Builder(generate, tmp_path).obtain(Variant(), "sm_90")
    (path,) = tmp_path.glob("*.cubin")
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-1], "flipped": data[:-1] + b"!", "no cubin": b""}[damage])
    assert Builder(generate, tmp_path).obtain(Variant(), "sm_90") == good
    assert fake.count == 2


def test_without_tvm_what_any_version_built_serves(tmp_path: Path, fake: FakeCompiler, monkeypatch) -> None:
    good = Builder(generate, tmp_path).obtain(Variant(), "sm_90")
    version_of = cache.version_of
    monkeypatch.setattr(cache, "version_of", lambda name: None if name == "apache-tvm" else version_of(name))
    fake.label, fake.major = "nvrtc12.1", 12
    assert Builder(generate, tmp_path).find(Variant(), (9, 0)) == good
    assert fake.count == 1
    with pytest.raises(KernelsUnavailable, match=r"apache-tvm is not installed.*pip install 'ggpass\[tvm\]'"):
        Builder(generate, tmp_path).obtain(Variant("other"), "sm_90")
    with pytest.raises(KernelsUnavailable, match="apache-tvm is not installed"):
        Builder(generate, tmp_path).obtain(Variant(), "sm_90", 12)


def test_without_a_compiler_what_is_cached_serves(tmp_path: Path, fake: FakeCompiler, monkeypatch) -> None:
    good = Builder(generate, tmp_path).obtain(Variant(), "sm_90")
    monkeypatch.setattr(compiler, "_compilers", lambda: iter([]))
    assert Builder(generate, tmp_path).obtain(Variant(), "sm_90") == good
    with pytest.raises(KernelsUnavailable, match="no CUDA compiler"):
        Builder(generate, tmp_path).obtain(Variant(), "sm_80")


def test_several_are_built_together(tmp_path: Path, fake: FakeCompiler) -> None:
    wanted = [Variant(f"axpy{i}") for i in range(20)]
    made = Builder(generate, tmp_path).obtain_all(wanted, "sm_90")
    assert [cubin.name for cubin in made] == [variant.name for variant in wanted]
    assert len({cubin.image for cubin in made}) == 20


def test_what_a_file_carried_is_taken_before_anything_is_built_and_the_newest_that_fits(
    tmp_path: Path, fake: FakeCompiler
) -> None:
    built = Builder(generate, tmp_path / "elsewhere").obtain(Variant(), "sm_90")
    for arch in ("sm_80", "sm_90", "sm_100"):
        cubin.FROM_FILES.add([dataclasses.replace(built, arch=arch, log="carried")])
    for capability, arch in (((9, 0), "sm_90"), ((8, 9), "sm_80"), ((10, 3), "sm_100")):
        found = Builder(generate, tmp_path).find(Variant(), capability)
        assert (found.arch, found.log) == (arch, "carried")
    assert Builder(generate, tmp_path).find(Variant(), (12, 0)).arch == "sm_120"
    assert cubin.FROM_FILES.find("axpy", (9, 0), 12) is None


@pytest.mark.parametrize("without", ["nothing", "compiler", "tvm"])
def test_what_this_machine_built_comes_before_what_a_file_carried(
    tmp_path: Path, fake: FakeCompiler, without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's kernels serve every model of the process: they replace none that works."""
    built = Builder(generate, tmp_path).obtain(Variant(), "sm_90")
    cubin.FROM_FILES.add([dataclasses.replace(built, log="carried")])
    version_of = cache.version_of
    if without == "compiler":
        monkeypatch.setattr(compiler, "_compilers", lambda: iter([]))
    if without == "tvm":
        monkeypatch.setattr(cache, "version_of", lambda name: None if name == "apache-tvm" else version_of(name))
    assert Builder(generate, tmp_path).find(Variant(), (9, 0)) == built
    assert Builder(generate, tmp_path / "empty").find(Variant(), (9, 0)).log == "carried"
    assert fake.count == 1


def test_a_kernel_of_another_ggpass_is_not_taken(tmp_path: Path, fake: FakeCompiler) -> None:
    built = Builder(generate, tmp_path).obtain(Variant(), "sm_90")
    foreign = cubin.FROM_FILES.add([dataclasses.replace(built, interface="0" * 16)])
    assert foreign == ["axpy for sm_90"]
    assert cubin.FROM_FILES.find("axpy", (9, 0)) is None


def test_a_cubin_survives_its_bytes_and_damage_does_not(tmp_path: Path, fake: FakeCompiler) -> None:
    built = Builder(generate, tmp_path).obtain(Variant(), "sm_90")
    data = built.to_bytes()
    assert Cubin.from_bytes(data) == built
    head, _, image = data.partition(b"\n")
    fields = json.loads(head)
    for bad in (
        b"",
        image,
        head,
        head + b"\n" + image[1:],
        json.dumps({**fields, "arch": 90}).encode() + b"\n" + image,
        json.dumps({**fields, "arch": "sm_90; rm"}).encode() + b"\n" + image,
        json.dumps({**fields, "more": ""}).encode() + b"\n" + image,
        json.dumps({**fields, "parameters": "xy"}).encode() + b"\n" + image,
        json.dumps({**fields, "parameters": [1]}).encode() + b"\n" + image,
        json.dumps([*fields]).encode() + b"\n" + image,
    ):
        with pytest.raises((ValueError, KernelsUnavailable)):
            Cubin.from_bytes(bad)
