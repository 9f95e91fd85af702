"""`benchmarks/cuda.py` on the stub GPU: its checks find wrong results, its figures become the right verdicts."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support import cuda_device
from support.cuda_device import Gpu, make_gpu
from support.cuda_stub import Stub, stub  # noqa: F401

from ggpass.kernels.cuda import cubin
from ggpass.kernels.cuda.cubin import FileKernels

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu"))
    names = ("timing", "checks", "peers", "verdicts", "benchmark")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = {name: importlib.import_module(name) for name in names}
    for name in names:
        if hasattr(found[name], "DEVICE"):
            monkeypatch.setattr(found[name], "DEVICE", "cpu")
        monkeypatch.delitem(sys.modules, name)
    return found


@pytest.fixture
def gpu(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:  # noqa: F811
    monkeypatch.setattr(cubin, "FROM_FILES", FileKernels())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    return make_gpu(stub, tmp_path / "kernels", monkeypatch)


def test_without_a_gpu_it_says_why_and_that_nothing_was_shown() -> None:
    run = subprocess.run([sys.executable, BENCHMARKS / "cuda.py"], capture_output=True, text=True, check=False)
    if run.returncode != 77:
        assert torch.cuda.is_available(), run.stderr
        pytest.skip("a GPU is here")
    assert "nothing was checked or timed" in run.stdout
    assert "install" in run.stdout


def test_the_checks_accept_right_results_and_tell_wrong_ones(modules: dict[str, ModuleType], gpu: Gpu) -> None:
    checks = modules["checks"]
    wrong, missing = checks.check_linear(gpu.kernels, few=True)
    assert wrong == []
    assert all("triton is not installed" in line for line in missing)
    assert checks.check_rows(gpu.kernels) == []
    launched = {launch.name for launch in gpu.stub.launches}
    assert {"small", "gemm", "embedding", "dequantize"} == {name.partition("_")[0] for name in launched}

    def wrong(launch: object) -> None:
        cuda_device.compute(launch)
        values = launch.values(cuda_device.parameters_of(launch.name))
        if launch.name.startswith("gemm"):
            cuda_device.array(values["y"], (1,), "uint16")[0] ^= 0x40

    gpu.stub.on_launch(wrong)
    found, _ = checks.check_linear(gpu.kernels, few=True)
    assert found
    assert all(line.startswith("gemm") for line in found)


def test_a_layer_is_timed_and_absent_peers_say_why(
    modules: dict[str, ModuleType], gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = modules["benchmark"]
    monkeypatch.setattr(benchmark, "FOOTPRINT", 2 * 64 * 32)
    monkeypatch.setattr(benchmark, "captured", lambda run: (run(), (run, True))[1])
    monkeypatch.setattr(modules["timing"], "milliseconds", lambda run, repeats: 6.0)
    monkeypatch.setattr(gpu.kernels, "tune", lambda *_: {"small": 1.0})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(modules["peers"], "PEERS", modules["peers"].PEERS[:3])
    kept = [peer for peer in benchmark.PEERS if "ggpass" in peer.name or "cuBLAS" in peer.name]

    def missing(weights: object, kernels: object) -> list:
        raise modules["peers"].Absent("not installed")

    monkeypatch.setattr(benchmark, "PEERS", [*kept, modules["peers"].Peer("torchao", missing)])
    rows = benchmark.time_layer(gpu.kernels, 64, 32, [1, 16], rounds=3, seconds=0.01)
    assert {(row["peer"], row["m"]) for row in rows if "ms" in row and "peer" in row} == {
        (peer.name, m) for peer in kept for m in (1, 16)
    }
    assert all(row["ms"] == 3.0 for row in rows if "graph" in row)
    assert [row["absent"] for row in rows if row["peer" if "peer" in row else "variant"] == "torchao"] == [
        "not installed"
    ]
    head, *lines = benchmark.table_of(rows, 64, 32, [1, 16])
    assert head == ["(64, 32), µs", "M = 1", "M = 16"]
    assert ["cuBLAS bf16", "3000.0 ± 0.0 (1.00x)", "3000.0 ± 0.0 (1.00x)"] in lines
    assert ["torchao", "not installed", "not installed"] in lines


def test_the_verdicts_are_those_of_the_figures(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    verdicts = modules["verdicts"]
    moved = verdicts.bytes_moved(1, 4096, 4096)
    assert moved == 4096 * 4096 + 4 * 4096 + 2 * 4096 + 2 * 4096

    def rows(ours: float, m: int) -> list[dict]:
        shape = {"n": 4096, "k": 4096, "m": m, "spread": 0.0, "graph": True}
        return [{"peer": "cuBLAS bf16", "ms": 1.0, **shape}, {"peer": "ggpass rf8", "ms": ours, **shape}]

    for m, least in ((1, 1.7), (16, 1.5), (512, 0.9), (4096, 0.9)):
        good, bad = (verdicts.verdicts(rows(1 / (least * by), m), 1e3 * moved) for by in (1.01, 0.99))
        assert [v.holds for v in good][-1]
        assert not [v.holds for v in bad][-1]
    assert verdicts.verdicts(rows(1.0, 64), 1e9) == []
    for share, holds in ((0.86, True), (0.84, False)):
        found = verdicts.verdicts(rows(0.5, 1), moved / 0.5e-3 / share)
        assert [v.holds for v in found] == [holds, True]
        assert found[0].figure == f"{share:.1%}"
    result = {"machine": {"gpu": "G", "arch": "sm_90", "time": "now", "versions": {}}, "bandwidth": 1e12, "wrong": []}
    modules["benchmark"].write(tmp_path, result, [[["a", "b"], ["c", "d"]]], found)
    text = (tmp_path / "cuda.md").read_text()
    assert "| a | b |\n|---|---|\n| c | d |" in text
    assert "**does not hold**: M = 1, (4096, 4096): at least 85% of copy bandwidth: 84.0%" in text
