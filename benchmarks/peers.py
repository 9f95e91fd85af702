"""The linear layer of each peer: builds L layers from the same weights and runs all of them once.

Every peer lives in its own process (`worker`), so that one's spinning thread pool never slows another. A call runs
all layers, one after the other: whatever it reads has been pushed out of the cache by the time it is read again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor

Run = Callable[[], object]


class Absent(Exception):
    """The peer is not here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """`build(weights, threads)` returns a function that prepares a run of all layers for one x of (M, K)."""

    name: str
    packages: tuple[str, ...]
    build: Callable[[Sequence[Tensor], int], Callable[[Tensor], Run]]


def _torch(weights: Sequence[Tensor], threads: int) -> Callable[[Tensor], Run]:
    linear = torch.nn.functional.linear
    return lambda x: lambda: [linear(x, w) for w in weights]


def _ggpass(name: str) -> Callable[[Sequence[Tensor], int], Callable[[Tensor], Run]]:
    def build(weights: Sequence[Tensor], threads: int) -> Callable[[Tensor], Run]:
        from ggpass.errors import KernelsUnavailable
        from ggpass.formats import FORMATS
        from ggpass.kernels.cpu.library import load
        from ggpass.kernels.cpu.memory import aligned_empty

        try:
            kernels = load()
        except KernelsUnavailable as error:
            raise Absent(str(error)) from error
        fmt = FORMATS[name]
        layers = []
        for w in weights:
            scale = w.abs().amax(dim=1) / fmt.amax
            codes = aligned_empty(w.shape, torch.uint8)
            codes.copy_(fmt.encode(w / scale[:, None]))
            layers.append((codes, scale))
        return lambda x: lambda: [kernels.linear(x, codes, scale, None, fmt.codebook) for codes, scale in layers]

    return build


def _onnx_session(nodes: list, initializers: list, names: list[str], k: int, threads: int) -> Callable[[Tensor], Run]:
    import onnxruntime as ort
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
        initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def prepare(x: Tensor) -> Run:
        feed = {"x": x.numpy()}
        return lambda: session.run(None, feed)

    return prepare


def _ort_fp32(weights: Sequence[Tensor], threads: int) -> Callable[[Tensor], Run]:
    from onnx import helper, numpy_helper

    names = [f"y{i}" for i in range(len(weights))]
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [name]) for i, name in enumerate(names)]
    constants = [numpy_helper.from_array(w.T.contiguous().numpy(), f"w{i}") for i, w in enumerate(weights)]
    return _onnx_session(nodes, constants, names, weights[0].shape[1], threads)


def _ort_nbits(weights: Sequence[Tensor], threads: int) -> Callable[[Tensor], Run]:
    from onnx import helper, numpy_helper

    n, k = weights[0].shape
    block = 128 if k % 128 == 0 else 32
    names, nodes, constants = [f"y{i}" for i in range(len(weights))], [], []
    for i, (w, name) in enumerate(zip(weights, names)):
        blocks = w.view(n, k // block, block)
        scale = blocks.abs().amax(dim=2) / 127
        codes = (blocks / scale[..., None]).round().add(128).clamp(0, 255).to(torch.uint8)
        constants.append(numpy_helper.from_array(codes.numpy(), f"w{i}"))
        constants.append(numpy_helper.from_array(scale.flatten().numpy(), f"s{i}"))
        attributes = {"K": k, "N": n, "bits": 8, "block_size": block, "accuracy_level": 4}
        inputs = ["x", f"w{i}", f"s{i}"]
        nodes.append(helper.make_node("MatMulNBits", inputs, [name], domain="com.microsoft", **attributes))
    return _onnx_session(nodes, constants, names, k, threads)


def _ort_dynamic(weights: Sequence[Tensor], threads: int) -> Callable[[Tensor], Run]:
    from onnx import helper, numpy_helper

    names, nodes, constants = [f"y{i}" for i in range(len(weights))], [], []
    for i, (w, name) in enumerate(zip(weights, names)):
        scale = w.abs().amax(dim=1) / 127
        codes = (w / scale[:, None]).round().to(torch.int8).T.contiguous()
        constants.append(numpy_helper.from_array(codes.numpy(), f"w{i}"))
        constants.append(numpy_helper.from_array(scale.numpy(), f"s{i}"))
        nodes.append(helper.make_node("DynamicQuantizeMatMul", ["x", f"w{i}", f"s{i}"], [name], domain="com.microsoft"))
    return _onnx_session(nodes, constants, names, weights[0].shape[1], threads)


def _torchao(weights: Sequence[Tensor], threads: int) -> Callable[[Tensor], Run]:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layers = []
    for w in weights:
        layer = torch.nn.Sequential(torch.nn.Linear(w.shape[1], w.shape[0], bias=False))
        layer[0].weight.data.copy_(w)
        layer = layer.to(torch.bfloat16).eval()
        quantize_(layer, Int8WeightOnlyConfig())
        layers.append(torch.compile(layer))

    def prepare(x: Tensor) -> Run:
        half = x.to(torch.bfloat16)

        def run() -> None:
            with torch.no_grad():
                for layer in layers:
                    layer(half)

        return run

    return prepare


def _openvino(weights: Sequence[Tensor], threads: int) -> Callable[[Tensor], Run]:
    import numpy as np
    import openvino as ov
    from openvino import opset13 as ops

    x = ops.parameter([-1, weights[0].shape[1]], np.float32)
    results = []
    for w in weights:
        scale = (w.abs().amax(dim=1, keepdim=True) / 127).numpy()
        codes = ops.constant((w.numpy() / scale).round().astype(np.int8))
        weight = ops.multiply(ops.convert(codes, np.float32), ops.constant(scale))
        results.append(ops.matmul(x, weight, False, True))
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # weights only
    }
    request = ov.Core().compile_model(ov.Model(results, [x]), "CPU", settings).create_infer_request()

    def prepare(x: Tensor) -> Run:
        feed = [x.numpy()]
        return lambda: request.infer(feed)

    return prepare


PEERS = (
    Peer("torch fp32", ("torch",), _torch),
    Peer("ggpass rf8", ("ggpass",), _ggpass("rf8")),
    Peer("ggpass int8", ("ggpass",), _ggpass("int8")),
    Peer("ORT fp32", ("onnxruntime", "onnx"), _ort_fp32),
    Peer("ORT MatMulNBits 8", ("onnxruntime", "onnx"), _ort_nbits),
    Peer("ORT dynamic int8", ("onnxruntime", "onnx"), _ort_dynamic),
    Peer("torchao int8 bf16", ("torchao",), _torchao),
    Peer("OpenVINO int8", ("openvino",), _openvino),
)


def worker(pipe: Connection, index: int, shape: tuple[int, int], layers: int, threads: int) -> None:
    """Serve `(m, seconds)` requests with the times of one layer; the first message is None or why it is absent."""
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:threads]))
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        prepare = PEERS[index].build([torch.randn(shape) * 0.02 for _ in range(layers)], threads)
    except ImportError as error:
        pipe.send(f"not installed ({error})")
        return
    except Exception as error:  # a peer's failure is a line of the table, not the end of the benchmark
        pipe.send(f"{type(error).__name__}: {error}"[:200])
        return
    pipe.send(None)
    runs: dict[int, Run] = {}
    while (request := pipe.recv()) is not None:
        m, seconds = request
        try:
            if m not in runs:
                runs[m] = prepare(torch.randn(m, shape[1]))
                runs[m]()
            runs[m]()
            times, end = [], time.perf_counter() + seconds
            while not times or time.perf_counter() < end:
                start = time.perf_counter()
                runs[m]()
                times.append((time.perf_counter() - start) / layers)
            pipe.send(times)
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}"[:200])
