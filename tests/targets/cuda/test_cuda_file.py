"""Kernels in a model's file: saved, found again by a process that can build none, refused where they are damaged."""

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.cuda_device import compute, describe, elf, kernels_of, parameters_of
from support.cuda_stub import Stub, stub  # noqa: F401
from torch import nn

import ggpass
from ggpass import FormatError
from ggpass.errors import KernelsUnavailable
from ggpass.file import PackedFile, unpack
from ggpass.file.kernels import PREFIX, read_kernels
from ggpass.file.kernels import kernels_of as carried_by
from ggpass.kernels.cuda import compiler, cubin, uses, variants
from ggpass.kernels.cuda.build import Builder
from ggpass.kernels.cuda.cubin import Cubin, FileKernels
from ggpass.packed.manifest import KEY
from ggpass.targets import cuda_operators
from ggpass.targets.cuda import CudaArtifact

BF16 = torch.bfloat16
X = torch.randn(3, 64).to(BF16)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubin, "FROM_FILES", FileKernels())


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)).to(BF16).eval()


def built(arch: str = "sm_90") -> tuple[Cubin, ...]:
    """Kernels without code for every variant that the net calls."""
    wanted = uses.variants_for([uses.Use("linear", BF16, k) for k in (64, 48)], "rf8")
    number = int(arch.removeprefix("sm_"))
    return tuple(
        Cubin(v.name, arch, v.name, parameters_of(v.name), "nvcc13.0.88", cubin.interface(), "log", elf(number, v.name))
        for v in wanted
    )


@pytest.fixture(params=["artifact", "module"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A file of either kind that carries kernels."""
    path = tmp_path / "model.safetensors"
    if request.param == "artifact":
        art = ggpass.compile(net(), (X,), target="rf8-reference")
        CudaArtifact(art.program, "rf8-cuda", art.report, art.sizes, built()).save(path)
    else:
        model = ggpass.compile(net(), target="rf8-reference")
        model.__dict__["ggpass_kernels"] = built()
        ggpass.save(model, path)
    return path, request.param


def load(path: Path, into: object, kernels: bool = True) -> object:
    """On the reference: the CPU's own kernels are not what this is about."""
    return ggpass.load(path, into, target="reference", kernels=kernels)


def target_of(kind: str) -> object:
    if kind == "module":
        return net()
    art = ggpass.compile(net(), (X,), target="rf8-reference")
    return CudaArtifact(art.program, "rf8-cuda", art.report, art.sizes)


def test_kernels_come_back_and_serve_the_process(saved: tuple[Path, str]) -> None:
    path, kind = saved
    assert read_kernels(path) == built()
    loaded = load(path, target_of(kind))
    for made in built():
        assert cubin.FROM_FILES.find(made.name, (9, 0)) == made
    assert carried_by(loaded) == built(), "a second save would lose them"
    assert any(f"carries {len(built())} CUDA kernels for sm_90" in note for note in ggpass.report(loaded).notes)


def test_they_stay_where_they_are_when_asked_to(saved: tuple[Path, str]) -> None:
    path, kind = saved
    loaded = load(path, target_of(kind), kernels=False)
    assert cubin.FROM_FILES.archs() == []
    assert carried_by(loaded) == ()


def test_a_machine_with_a_driver_alone_runs_them(
    saved: tuple[Path, str],
    stub: Stub,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No TVM, no compiler, an empty cache: the file's kernels reach the driver, and give what the reference gives."""
    monkeypatch.setattr(compiler, "_compilers", lambda: iter([]))
    stub.on_launch(compute)
    gpu = kernels_of(stub, tmp_path / "empty")
    gpu._builder = Builder(cuda_operators.generate, tmp_path / "empty")
    model = ggpass.compile(net(), target="rf8-reference")[0].lowered
    operands = model.codes, model.scale, None, model.codebook
    with pytest.raises(KernelsUnavailable, match="no CUDA compiler"):
        gpu.linear(X, *operands)
    path, kind = saved
    load(path, target_of(kind))
    y = gpu.linear(X, *operands)
    expected = X.double() @ (model.codebook.double()[model.codes.int()] * model.scale.double()[:, None]).T
    torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=2**-7)
    assert len(stub.launches) == 1


def test_a_file_without_kernels_is_of_the_first_version_and_one_with_them_of_the_second(tmp_path: Path, saved) -> None:
    def version(path: Path) -> int:
        with PackedFile(path) as file:
            return json.loads(file.files[0].layout.metadata[KEY])["version"]

    plain = tmp_path / "plain.safetensors"
    ggpass.save(ggpass.compile(net(), target="rf8-reference"), plain)
    assert version(plain) == 1
    assert version(saved[0]) == 2
    assert read_kernels(plain) == ()


def test_other_tools_see_the_tensors_alone(saved: tuple[Path, str], tmp_path: Path) -> None:
    path, _ = saved
    with PackedFile(path) as file:
        assert not any(name.startswith(PREFIX) for name in file.names)
        assert not any(name.startswith(PREFIX) for name in file.read_all())
    unpack(path, tmp_path / "plain.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "plain.safetensors", "pt") as opened:
        assert not any(name.startswith(PREFIX) for name in opened.keys())  # noqa: SIM118
    with safe_open(path, "pt") as opened:
        assert sum(name.startswith(PREFIX) for name in opened.keys()) == len(built())  # noqa: SIM118


def test_a_damaged_kernel_is_named(saved: tuple[Path, str]) -> None:
    path, kind = saved
    data = bytearray(path.read_bytes())
    at = data.rindex(built()[-1].name.encode())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=rf"{PREFIX}sm_90/.* is damaged"):
        load(path, target_of(kind))
    assert cubin.FROM_FILES.archs() == []


def test_what_is_no_kernel_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    model = ggpass.compile(net(), target="rf8-reference")
    model.__dict__["ggpass_kernels"] = (dataclasses.replace(built()[0], image=b"#!/bin/sh"),)
    ggpass.save(model, path)
    with pytest.raises(FormatError, match="is no kernel that this ggpass knows"):
        load(path, net())


def test_kernels_of_another_version_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "model.safetensors"
    model = ggpass.compile(net(), target="rf8-reference")
    model.__dict__["ggpass_kernels"] = tuple(dataclasses.replace(c, interface="of another") for c in built())
    ggpass.save(model, path)
    with caplog.at_level(logging.WARNING, logger="ggpass"):
        loaded = load(path, net())
    assert "are of another version of ggpass and are not used: compile and save again" in caplog.text
    assert cubin.FROM_FILES.archs() == []
    assert any("another version" in note for note in ggpass.report(loaded).notes)


def test_loading_for_the_cpu_needs_no_driver(saved: tuple[Path, str]) -> None:
    """And nothing of CUDA is imported where a file carries no kernels."""
    path, kind = saved
    if kind == "artifact":
        pytest.skip("an artifact's file goes into an artifact")
    loaded = load(path, net())
    assert loaded(X).shape == (3, 32)


@pytest.fixture
def one_variant(monkeypatch: pytest.MonkeyPatch) -> variants.Variant:
    """Artifacts hold one kernel, since building takes seconds."""
    pytest.importorskip("tvm")
    (only, *_) = variants.every_linear("rf8", "bfloat16", 64)
    monkeypatch.setattr(variants, "every_linear", lambda decoder, dtype, k: (only,))
    return only


def test_real_kernels_travel(tmp_path: Path, one_variant: variants.Variant) -> None:
    """TVM and nvcc here, a process without TVM there: the file's kernel is the one that was built."""
    try:
        compiler.find()
    except KernelsUnavailable as reason:
        pytest.skip(str(reason))
    small = nn.Linear(64, 48, bias=False).to(BF16)
    art = ggpass.compile(small, (X,), target="rf8-cuda", arch="sm_90")
    path = tmp_path / "model.safetensors"
    art.save(path)
    (cubin,) = art.kernels
    assert (cubin.name, cubin.arch, cubin.spills) == (one_variant.name, "sm_90", 0)
    # The doubles of the tests' device are called with what the text takes.
    assert set(cubin.parameters) <= set(describe(one_variant).parameters)
    script = f"""if True:
        import sys
        sys.modules["tvm"] = None
        from ggpass.file.kernels import read_kernels
        for kernel in read_kernels({str(path)!r}):
            assert kernel.image[:4] == b"\\x7fELF" and kernel.entry.encode() in kernel.image, kernel.name
            print(kernel.name)
    """
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [cubin.name]
