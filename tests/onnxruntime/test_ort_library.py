"""The custom-op library against float64, for every operator, format, activation type and instruction set."""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.closeness import assert_rejects_corruption, assert_within, dot_bound, store_bound
from support.ort_models import CODEBOOKS, TensorProto, Weights, initializer, library, model, node, run, session, value

from ggpass.kernels.cpu.isa import ALL, portable

FLOATS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
ISAS = [isa.name for isa in ALL if isa.triple == portable().triple]


def use_isa(name: str | None) -> str | None:
    function = ctypes.CDLL(library()).ggpass_onnxruntime_use_isa
    function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_char_p]
    used = function(None if name is None else name.encode())
    return None if used is None else used.decode()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest):
    if use_isa(request.param) is None:
        pytest.skip(f"this machine cannot run {request.param} kernels")
    yield request.param
    use_isa(None)


def bound_of(x: torch.Tensor, weights: Weights, bias: torch.Tensor | None, expected: torch.Tensor, dtype: str):
    bound = dot_bound(x, weights.values, weights.scale, bias) * (1 + 3 / (x.shape[-1] + 3))
    return bound if dtype == "float32" else store_bound(expected, bound, torch.float16)


def matmul_model(weights: Weights, dtype: str, bias: torch.Tensor | None):
    extra = [] if bias is None else [initializer("bias", bias.numpy())]
    names = ["x", *weights.names, *(["bias"] if extra else [])]
    kind = FLOATS[dtype]
    nodes = [node(f"{weights.operators}MatMul", names)]
    shape = ["B", "S", weights.codes.shape[1]]
    return model(nodes, [value("x", kind, shape)], [value("y", kind)], weights.initializers + extra)


def check_matmul(weights: Weights, ms, dtype: str = "float32", with_bias: bool = True, threads: int = 2) -> None:
    n, k = weights.codes.shape
    bias = torch.randn(n).to(getattr(torch, dtype)) if with_bias else None
    ready = session(matmul_model(weights, dtype, bias), threads)
    assert ready.get_outputs()[0].shape in (["B", "S", n], [])
    for m in ms:
        x = torch.randn(1, m, k).to(getattr(torch, dtype))
        y = torch.from_numpy(ready.run(None, {"x": x.numpy()})[0])
        assert y.dtype is x.dtype
        expected = x.double() @ weights.values.double().T * weights.scale.double()
        expected = expected if bias is None else expected + bias.double()
        bound = bound_of(x, weights, bias, expected, dtype)
        assert_within(y, expected, bound)
        if m > 2 and n > 2 and k > 2 and dtype == "float32":
            assert_rejects_corruption(y, expected, bound)


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_matmul_is_within_the_accumulation_bound_for_every_format(isa: str, name: str, dtype: str) -> None:
    check_matmul(Weights(name, 67, 200), (1, 2, 3, 8, 9, 17, 40, 300), dtype)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 31), (5, 63), (7, 64), (13, 65), (129, 1100)])
def test_matmul_of_odd_sizes(isa: str, n: int, k: int) -> None:
    check_matmul(Weights("rf8", n, k, one_scale=n % 2 == 1), (1, 5, 20, 70), with_bias=k % 2 == 0)
    check_matmul(Weights("any", n, k), (1, 20), with_bias=k % 2 == 1)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_matmul_on_any_number_of_threads(threads: int) -> None:
    check_matmul(Weights("rf8", 777, 512), (1, 4, 64, 513), threads=threads)


def test_alias_codes_have_their_value_even_though_no_encoder_emits_them() -> None:
    check_matmul(Weights("rf8", 64, 256, aliases=True), (1, 2, 8, 64))


def test_codes_may_be_computed_by_the_graph_and_change_between_runs() -> None:
    """Whether they are canonical is then looked up in every run."""
    names = ["x", "codes", "scale"]
    inputs = [value("x", 1, ["B", 64]), value("codes", 2, ["N", 64]), value("scale", 1, ["N"])]
    ready = session(model([node("RF8MatMul", names)], inputs, [value("y", 1)]))
    for aliases in (False, True, False):
        weights, x = Weights("rf8", 9, 64, aliases=aliases), torch.randn(3, 64)
        feeds = {"x": x.numpy(), "codes": weights.codes.numpy(), "scale": weights.scale.numpy()}
        y = torch.from_numpy(ready.run(None, feeds)[0])
        expected = x.double() @ weights.values.double().T * weights.scale.double()
        assert_within(y, expected, dot_bound(x, weights.values, weights.scale))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 70), (3, 0, 70), (3, 5, 0), (0, 0, 0)])
def test_matmul_of_empty_dimensions(dtype: str, m: int, n: int, k: int) -> None:
    weights, bias = Weights("rf8", n, k), torch.randn(n).to(getattr(torch, dtype))
    y = run(matmul_model(weights, dtype, bias), x=np.ones((2, m, k), dtype))
    assert np.array_equal(y, np.broadcast_to(bias.numpy(), (2, m, n)))


def test_the_same_session_runs_in_several_threads_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    weights = Weights("rf8", 300, 300)
    ready = session(matmul_model(weights, "float32", None))
    x = torch.randn(8, 1, 20, 300)
    alone = [ready.run(None, {"x": one.numpy()})[0] for one in x]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda one: ready.run(None, {"x": one.numpy()})[0], x))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together))


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [5, 64, 200])
def test_gather_and_dequantize_round_once(isa: str, name: str, dtype: str, k: int) -> None:
    weights = Weights(name, 11, k)
    exact = weights.values.double() * weights.scale.double()[:, None]
    bound = exact.abs() * (1 + weights.extra_roundings) * 2.0**-24
    bound = bound if dtype == "float32" else store_bound(exact, bound, torch.float16)
    kind = FLOATS[dtype]
    whole = [node(f"{weights.operators}Dequantize", weights.names, to=kind)]
    assert_within(torch.from_numpy(run(model(whole, [], [value("y", kind)], weights.initializers))), exact, bound)
    gather = [node(f"{weights.operators}Gather", ["ids", *weights.names], to=kind)]
    for ids in (np.array([[3, 10], [0, -1]]), np.array([], np.int64), np.array([7], np.int32)):
        of = TensorProto.INT64 if ids.dtype == np.int64 else TensorProto.INT32
        proto = model(gather, [value("ids", of, list("AB")[: ids.ndim])], [value("y", kind)], weights.initializers)
        y = torch.from_numpy(run(proto, ids=ids))
        rows = torch.from_numpy(ids).long() % 11
        assert y.shape == (*ids.shape, k)
        assert_within(y, exact[rows], bound[rows])


def test_gather_takes_a_single_id() -> None:
    weights = Weights("rf8", 11, 70)
    proto = model(
        [node("RF8Gather", ["ids", *weights.names])], [value("ids", 7, [])], [value("y", 1)], weights.initializers
    )
    y = torch.from_numpy(run(proto, ids=np.array(4)))
    assert torch.equal(y, weights.values[4] * weights.scale[4])


def test_every_code_decodes_bit_exactly(isa: str) -> None:
    weights = Weights("rf8", 7, 256)
    every = torch.stack([torch.arange(256).roll(i) for i in range(7)]).to(torch.uint8)
    proto = model(
        [node("RF8Dequantize", ["codes", "scale"])],
        [],
        [value("y", 1)],
        [initializer("codes", every.numpy()), initializer("scale", np.ones(1, np.float32))],
    )
    assert np.array_equal(run(proto), weights.codebook[every.long()].numpy())


#: Shape of x, output channels, kernel_shape, and the attributes of the node.
CONVOLUTIONS = {
    "3x3, padded": ((2, 8, 9, 11), 13, (3, 3), {"pads": [1, 1, 1, 1]}),
    "stride, dilation, uneven pads": (
        (1, 5, 17, 13), 9, (3, 2), {"pads": [2, 0, 1, 3], "strides": [2, 3], "dilations": [3, 2]}
    ),
    "1x1": ((2, 70, 6, 7), 24, (1, 1), {}),
    "groups": ((2, 6, 10, 10), 32, (3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    "depthwise": ((2, 16, 10, 9), 16, (3, 3), {"group": 16, "pads": [1, 1, 1, 1], "strides": [2, 1]}),
    "depthwise, all padding": ((1, 3, 1, 1), 3, (5, 5), {"group": 3, "pads": [4, 4, 4, 4]}),
    "one dimension": ((2, 20, 41), 12, (5,), {"pads": [2, 3], "strides": [2], "dilations": [2]}),
    "many positions": ((1, 3, 40, 40), 16, (7, 7), {"pads": [3, 3, 3, 3], "strides": [2, 2]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CODEBOOKS)
def test_conv_is_within_the_accumulation_bound(case: str, dtype: str, name: str) -> None:
    shape, out, kernel, given = CONVOLUTIONS[case]
    groups, axes = given.get("group", 1), len(kernel)
    weights = Weights(name, out, shape[1] // groups * int(np.prod(kernel)))
    to = getattr(torch, dtype)
    x, bias = torch.randn(shape).to(to), torch.randn(out).to(to)
    names = ["x", *weights.names, "bias"]
    kind = FLOATS[dtype]
    proto = model(
        [node(f"{weights.operators}Conv", names, kernel_shape=kernel, **given)],
        [value("x", kind, ["B", *shape[1:]])],
        [value("y", kind)],
        [*weights.initializers, initializer("bias", bias.numpy())],
    )
    y = torch.from_numpy(run(proto, x=x.numpy()))

    pads = given.get("pads", [0] * 2 * axes)
    torch_pads = [p for axis in reversed(range(axes)) for p in (pads[axis], pads[axes + axis])]
    options = {"stride": given.get("strides", 1), "dilation": given.get("dilations", 1), "groups": groups}
    convolve = torch.nn.functional.conv2d if axes == 2 else torch.nn.functional.conv1d
    w = weights.values.double().reshape(out, -1, *kernel) * weights.scale.double().reshape(-1, *[1] * (axes + 1))
    padded = torch.nn.functional.pad(x.double(), torch_pads)
    expected = convolve(padded, w, bias.double(), **options)
    magnitude = convolve(padded.abs(), w.abs(), bias.double().abs(), **options)
    # As in dot_bound, with the magnitudes convolved instead of multiplied; three more roundings as in bound_of.
    nu = (weights.codes.shape[1] + 6) * 2.0**-24
    bound = 1.0001 * nu / (1 - nu) * magnitude
    bound = bound if dtype == "float32" else store_bound(expected, bound, torch.float16)
    assert_within(y, expected, bound)
    if dtype == "float32" and magnitude.min() > 0:
        assert_rejects_corruption(y, expected, bound)


def test_conv_output_shape_is_inferred_when_the_model_is_loaded() -> None:
    weights = Weights("rf8", 4, 27)
    proto = model(
        [node("RF8Conv", ["x", *weights.names], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])],
        [value("x", 1, ["B", 3, 11, "W"])],
        [value("y", 1)],
        weights.initializers,
    )
    shape = session(proto).get_outputs()[0].shape
    assert shape == [] or (shape[:3] == ["B", 4, 6] and isinstance(shape[3], str))


MEMORY = """
import json, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from support.ort_models import session

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

x = np.ones((1, 4096), np.float32)
session(sys.argv[2]).run(None, {"x": x})
before = anonymous()
ready = session(sys.argv[3])
y = ready.run(None, {"x": x})[0]
print(json.dumps({"kib": anonymous() - before, "sum": float(y.sum())}))
"""


def large_model(folder, layers: int) -> str:
    """`layers` matrices of 4096 x 4096 in one external file, one after the other."""
    import onnx

    folder.mkdir()
    weights = Weights("rf8", 4096, 4096)
    names = [f"codes{i}" for i in range(layers)]
    nodes = [
        node("RF8MatMul", [f"x{i}" if i else "x", name, "scale"], f"x{i + 1}", name) for i, name in enumerate(names)
    ]
    tensors = [initializer(name, weights.codes.numpy()) for name in names]
    scale = initializer("scale", np.full(1, 2.0**-6, np.float32))
    proto = model(nodes, [value("x", 1, ["B", 4096])], [value(f"x{layers}", 1)], [*tensors, scale])
    path = folder / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="weights", size_threshold=1024)
    return str(path)


def test_codes_stay_memory_mapped(tmp_path) -> None:
    """200 MB of codes add at most 20 MB of memory of the process's own to that of an almost empty session."""
    library()
    small, large = large_model(tmp_path / "small", 1), large_model(tmp_path / "large", 12)
    command = [sys.executable, "-c", MEMORY, str(Path(__file__).parents[1]), small, large]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert np.isfinite(result["sum"])
    assert result["kib"] < 20 << 10
