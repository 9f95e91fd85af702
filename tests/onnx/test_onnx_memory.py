"""What lowering and loading cost in memory: a weight once, however often it is used, and never a model's worth."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.onnx_files import FLOAT, node, save, weight
from support.onnx_runs import WAYS, onnx, onnxruntime

import ggpass

helper, numpy_helper = onnx.helper, onnx.numpy_helper

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")

WIDTH = 1024


def repeated(path: Path, times: int, kind: str, opset: int = 17, separate: bool = False, **options: Any) -> Path:
    """A net that uses one weight several times, or several weights once each, written as these exporters do."""
    weights = [f"w{i}" if separate else "w" for i in range(times)]
    inputs: dict[str, Any] = {"x": (FLOAT, ["n", WIDTH])}
    shape: tuple[int, ...] = (WIDTH, WIDTH)
    if kind == "conv":
        inputs, shape = {"x": (FLOAT, ["n", 256, 6, 6])}, (256, 256, 4, 4)
    nodes = []
    for i, name in enumerate(weights):
        source = f"h{i}" if i else "x"
        if kind == "matmul":
            nodes.append(node("MatMul", [source, name], f"m{i}"))
        elif kind == "gemm":
            nodes.append(node("Gemm", [source, name], f"m{i}", transB=1))
        else:
            nodes.append(node("Conv", [source, name], f"m{i}", pads=[1, 1, 2, 2]))
        nodes.append(node("Tanh", [f"m{i}"], f"h{i + 1}"))
    nodes.append(node("Identity", [f"h{times}"], "y"))
    made = {name: weight(*shape) for name in dict.fromkeys(weights)}
    return save(path, nodes, inputs, made, (FLOAT, 4 if kind == "conv" else 2), opset, **options)


@pytest.mark.parametrize("kind", ["matmul", "gemm", "conv"])
@pytest.mark.parametrize("target", ["rf8-onnx", "int8-onnx"])
def test_onnx_runtime_decodes_a_shared_weight_once(kind: str, target: str, tmp_path: Path) -> None:
    path = repeated(tmp_path / "in.onnx", 6, kind)
    ggpass.lower_onnx(path, tmp_path / "out.onnx", target=target)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(tmp_path / "out.onnx"), options, providers=["CPUExecutionProvider"])
    tensors = [t for t in onnx.load(tmp_path / "optimized.onnx").graph.initializer if np.prod(t.dims) >= WIDTH * WIDTH]
    assert [t.data_type for t in tensors] == [FLOAT]


PEAK = """
import re, sys
from pathlib import Path
import numpy as np, onnxruntime
import ggpass

def megabytes(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def load(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

act = load if sys.argv[1] == "load" else lambda path: ggpass.lower_onnx(path, path + ".out.onnx", external_data=True)
act(sys.argv[2])  # a small model first: what the libraries themselves take is not counted
Path("/proc/self/clear_refs").write_text("5")
before = megabytes("VmHWM")
act(sys.argv[3])
print(megabytes("VmHWM") - before)
"""


def peak(what: str, small: Path, path: Path) -> float:
    """Megabytes at the highest, beyond those before."""
    command = [sys.executable, "-c", PEAK, what, str(small), str(path)]
    # Freed blocks go back to the system at once: what glibc keeps of them differs from run to run, by a factor of two.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    return float(run.stdout)


@linux
@pytest.mark.parametrize("target", ["rf8-onnx", "int8-onnx"])
def test_loading_a_shared_weight_costs_what_float_does(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "WIDTH", 2560)
    path, small = repeated(tmp_path / "in.onnx", 8, "matmul"), tmp_path / "small.onnx"
    save(small, [node("Tanh", ["x"], "y")], {"x": (FLOAT, ["n", 4])}, {})
    ggpass.lower_onnx(path, tmp_path / "out.onnx", target=target)
    assert peak("load", small, tmp_path / "out.onnx") <= 1.3 * peak("load", small, path)


@linux
@pytest.mark.parametrize("target", ["rf8-onnx", "int8-onnx"])
def test_loading_separate_weights_costs_their_indices_once(target: str, tmp_path: Path) -> None:
    """ONNX Runtime keeps what it folded of all weights to the end: codes, transposed codes, indices and floats.

    In float weights these are 1/4 + 1/4 + 1 + 1, beside the 1.1 of a float model; a fifth more is left for the rest.
    """
    path, small = repeated(tmp_path / "in.onnx", 12, "matmul", separate=True), tmp_path / "small.onnx"
    save(small, [node("Tanh", ["x"], "y")], {"x": (FLOAT, ["n", 4])}, {})
    ggpass.lower_onnx(path, tmp_path / "out.onnx", target=target)
    assert peak("load", small, tmp_path / "out.onnx") <= 2.7 * 12 * 4 * WIDTH * WIDTH / 2**20


@linux
@pytest.mark.parametrize("opset", [9, 11, 17])
@pytest.mark.parametrize("external", [True, False])
def test_lowering_never_holds_the_model(opset: int, external: bool, tmp_path: Path) -> None:
    """A conversion included: of 64 MB, less than half is ever in memory, where one copy would be all of it."""
    times = 16
    options = {"save_as_external_data": True, "location": "in.bin"} if external else {}
    path = repeated(tmp_path / "in.onnx", times, "matmul", opset, separate=True, **options)
    small = save(
        tmp_path / "small.onnx",
        [node("MatMul", ["x", "w"], "y")],
        {"x": (FLOAT, ["n", 64])},
        {"w": weight(64, 64)},
        opset=opset,
    )
    assert peak("lower", small, path) <= 0.5 * 4 * times * WIDTH * WIDTH / 2**20
    (y,) = WAYS["stock"](Path(f"{path}.out.onnx"), {"x": torch.zeros(1, WIDTH)})
    assert not y.any()
