"""Each entry that native/onnxruntime/ort_abi.h declares does what its name says, in the installed ONNX Runtime.

Entries that work on their own are called here by the index that the header gives them; the others are called by the
library, in models whose outcome tells whether the right function ran. `ENTRIES` collects which test stands for which.
"""

import ctypes
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.ort_models import TensorProto, Weights, initializer, library, model, node, ort, run, session, value

HEADER = Path(__file__).parents[2] / "native" / "onnxruntime" / "ort_abi.h"
VERSION = 21
ENTRIES: set[str] = set()


def checks(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What the decorated test stands for."""
    ENTRIES.update(names)
    return lambda test: test


def declared() -> dict[str, int]:
    """The index of each entry: one after the other, but for those that the header leaves out by number."""
    text = HEADER.read_text(encoding="utf-8")
    body = text[text.index("struct OrtApi {") : text.index("#undef ORT_SKIP")]
    index, found = 0, {}
    for first, last, name in re.findall(r"ORT_SKIP\((\d+), (\d+)\)|\(\*([A-Z]\w+)\)\(", body):
        if name:
            found[name] = index
            index += 1
        else:
            assert int(first) == index, f"ORT_SKIP({first}, {last}) follows entry {index - 1}"
            index = int(last) + 1
    return found


class Api:
    """The function table of the installed run time, by the header's names."""

    def __init__(self) -> None:
        folder = Path(ort.__file__).parent / "capi"
        found = sorted(folder.glob("libonnxruntime.so*"))
        if not found:
            pytest.skip(f"this onnxruntime brings no libonnxruntime.so in {folder}")
        base_of = ctypes.CDLL(str(found[0])).OrtGetApiBase
        base_of.restype = ctypes.POINTER(ctypes.c_void_p)
        self.base = base_of()
        get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(self.base[0])
        self.table = ctypes.cast(get_api(VERSION), ctypes.POINTER(ctypes.c_void_p))
        self.index = declared()

    def call(self, name: str, *arguments: Any) -> int | None:
        """The pointer that the entry returns; pointers and sizes in, unless ctypes says otherwise."""
        kinds = [ctypes.c_void_p if isinstance(a, int | None) else type(a) for a in arguments]
        function = ctypes.CFUNCTYPE(ctypes.c_void_p, *kinds)(self.table[self.index[name]])
        return function(*arguments)

    def ok(self, name: str, *arguments: Any) -> None:
        """An entry that returns a status, none of which is an error."""
        assert self.call(name, *arguments) is None


@pytest.fixture(scope="module")
def api() -> Api:
    return Api()


def test_every_declared_entry_is_checked() -> None:
    assert set(declared()) == ENTRIES


def test_the_base_hands_out_tables_of_known_versions_only(api: Api) -> None:
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(api.base[0])
    get_version = ctypes.CFUNCTYPE(ctypes.c_char_p)(api.base[1])
    assert get_version().decode() == ort.__version__
    assert get_api(VERSION)
    assert not get_api(1_000_000)


@checks("CreateStatus", "GetErrorMessage", "ReleaseStatus")
def test_a_status_keeps_its_text(api: Api) -> None:
    status = api.call("CreateStatus", ctypes.c_int(2), ctypes.c_char_p(b"thing, reason, way out"))
    message = api.call("GetErrorMessage", status)
    assert message is not None
    assert ctypes.string_at(message) == b"thing, reason, way out"
    api.call("ReleaseStatus", status)


@checks(
    "CreateTensorTypeAndShapeInfo", "SetTensorElementType", "SetDimensions", "GetTensorElementType",
    "GetDimensionsCount", "GetDimensions", "SetSymbolicDimensions", "GetSymbolicDimensions",
    "ReleaseTensorTypeAndShapeInfo",
)  # fmt: skip
def test_a_type_and_shape_reads_back_as_written(api: Api) -> None:
    info = ctypes.c_void_p()
    api.ok("CreateTensorTypeAndShapeInfo", ctypes.pointer(info))
    api.ok("SetTensorElementType", info, ctypes.c_int(TensorProto.FLOAT16))
    api.ok("SetDimensions", info, (ctypes.c_int64 * 2)(3, -1), ctypes.c_size_t(2))
    api.ok("SetSymbolicDimensions", info, (ctypes.c_char_p * 2)(b"", b"batch"), ctypes.c_size_t(2))
    element, rank = ctypes.c_int(), ctypes.c_size_t()
    api.ok("GetTensorElementType", info, ctypes.pointer(element))
    api.ok("GetDimensionsCount", info, ctypes.pointer(rank))
    lengths, names = (ctypes.c_int64 * 2)(), (ctypes.c_char_p * 2)()
    api.ok("GetDimensions", info, lengths, rank)
    api.ok("GetSymbolicDimensions", info, names, rank)
    assert (element.value, list(lengths), list(names)) == (TensorProto.FLOAT16, [3, -1], [b"", b"batch"])
    api.call("ReleaseTensorTypeAndShapeInfo", info)


@checks("CreateCustomOpDomain", "CustomOpDomain_Add", "AddCustomOpDomain")
def test_registering_makes_the_operators_known() -> None:
    proto = model([node("RF8Dequantize", ["codes", "scale"])], [], [value("y", 1)], Weights("rf8", 3, 5).initializers)
    with pytest.raises(Exception, match="RF8Dequantize"):
        ort.InferenceSession(proto.SerializeToString())
    session(proto)


@checks(
    "GetTensorMutableData", "GetTensorTypeAndShape", "KernelContext_GetInputCount", "KernelContext_GetInput",
    "KernelContext_GetOutput", "KernelInfo_GetInputCount",
)  # fmt: skip
def test_inputs_are_read_and_the_output_is_written() -> None:
    weights, bias = Weights("rf8", 3, 5), np.array([1, 2, 3], np.float32)
    x = np.eye(5, dtype=np.float32)
    rows = (weights.values * weights.scale[:, None]).T.numpy()
    for names, expected in ((["x", "codes", "scale"], rows), (["x", "codes", "scale", "bias"], rows + bias)):
        weights_and_bias = [*weights.initializers, initializer("bias", bias)]
        proto = model([node("RF8MatMul", names)], [value("x", 1, ["B", 5])], [value("y", 1)], weights_and_bias)
        assert np.allclose(run(proto, x=x), expected, rtol=1e-6)


@checks("KernelInfo_GetInputTypeInfo", "CastTypeInfoToTensorInfo", "ReleaseTypeInfo", "KernelInfo_GetNodeName")
def test_messages_hold_the_type_of_an_input_and_the_name_of_the_node() -> None:
    weights = [initializer("codes", np.zeros((2, 3), np.int16)), initializer("scale", np.ones(2, np.float32))]
    proto = model([node("RF8Dequantize", ["codes", "scale"], name="encoder.7")], [], [value("y", 1)], weights)
    with pytest.raises(Exception, match=r'node "encoder\.7": the input codes is int16'):
        session(proto)


@checks("KernelInfoGetAttribute_int64", "KernelInfoGetAttributeArray_int64")
def test_attributes_are_read_by_name() -> None:
    weights = Weights("rf8", 2, 1)
    attributes = {"kernel_shape": [1, 1], "strides": [2, 3], "pads": [0, 0, 1, 0], "group": 2}
    proto = model(
        [node("RF8Conv", ["x", "codes", "scale"], **attributes)], [value("x", 1)], [value("y", 1)], weights.initializers
    )
    x = np.arange(2 * 5 * 7, dtype=np.float32).reshape(1, 2, 5, 7)
    padded = np.pad(x, [(0, 0), (0, 0), (0, 1), (0, 0)])[:, :, ::2, ::3]
    assert np.allclose(run(proto, x=x), padded * (weights.values[:, 0] * weights.scale).numpy()[None, :, None, None])


@checks("KernelInfoGetConstantInput_tensor")
def test_weights_in_the_file_are_checked_when_it_is_loaded() -> None:
    scale = initializer("scale", np.ones(7, np.float32))
    codes = initializer("codes", np.zeros((2, 3), np.uint8))
    with pytest.raises(Exception, match=r"Exception during initialization: \[ggpass\] .* scale is float \(7\)"):
        session(model([node("RF8Dequantize", ["codes", "scale"])], [], [value("y", 1)], [codes, scale]))
    fed = [value("codes", TensorProto.UINT8), value("scale", 1)]
    session(model([node("RF8Dequantize", ["codes", "scale"])], fed, [value("y", 1)]))


@checks(
    "ShapeInferContext_GetInputCount", "ShapeInferContext_GetInputTypeShape", "ShapeInferContext_GetAttribute",
    "ShapeInferContext_SetOutputTypeShape", "ReadOpAttr",
)  # fmt: skip
def test_types_and_shapes_are_inferred() -> None:
    """A type comes from an attribute of one integer, a shape from attributes of several."""
    weights = Weights("rf8", 4, 9)
    ids = value("ids", TensorProto.INT64, ["A", 3, "B"])
    nodes = [node("RF8Gather", ["ids", "codes", "scale"], to=TensorProto.FLOAT16)]
    output = session(model(nodes, [ids], [value("y", TensorProto.FLOAT16)], weights.initializers)).get_outputs()[0]
    assert (output.type, output.shape) == ("tensor(float16)", ["A", 3, "B", 9])
    nodes = [node("RF8Conv", ["x", "codes", "scale"], kernel_shape=[3, 3], strides=[1, 2], dilations=[2, 1])]
    inputs = [value("x", 1, ["B", 1, 15, 16])]
    output = session(model(nodes, inputs, [value("y", 1)], weights.initializers)).get_outputs()[0]
    # Before 1.24 operators with an optional input go without: see register.cpp.
    expected = ["B", 4, 11, 7] if minor_version() >= 24 else []
    assert output.shape == expected


def minor_version() -> int:
    return int(ort.__version__.split(".")[1])


def cpu_seconds() -> dict[str, float]:
    """What each thread of this process has computed so far."""
    tick = os.sysconf("SC_CLK_TCK")
    stats = {path.parent.name: path.read_text() for path in Path("/proc/self/task").glob("*/stat")}
    return {thread: int(stat.rpartition(")")[2].split()[11]) / tick for thread, stat in stats.items()}


@checks("KernelContext_ParallelFor")
@pytest.mark.parametrize("threads", [1, 2])
def test_loops_run_on_the_threads_of_the_session(threads: int) -> None:
    weights = Weights("rf8", 2048, 2048)
    nodes = [node("RF8MatMul", ["x", "codes", "scale"])]
    proto = model(nodes, [value("x", 1, ["B", 2048])], [value("y", 1)], weights.initializers)
    options = ort.SessionOptions()
    options.register_custom_ops_library(library())
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting shall not look like work
    before = cpu_seconds()
    ready = ort.InferenceSession(proto.SerializeToString(), options)
    x = np.ones((64, 2048), np.float32)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        ready.run(None, {"x": x})
    after = cpu_seconds()
    worked = [seconds - before.get(thread, 0.0) > 0.02 for thread, seconds in after.items()]
    assert sum(worked) == threads


def install(version: str, folder: Path) -> None:
    command: Sequence[str] = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    done = subprocess.run(
        [sys.executable, *command, f"onnxruntime=={version}"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"onnxruntime {version} cannot be installed: {done.stderr.strip()[-200:]}")


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.21.1", "1.23.2"])
def test_the_library_passes_its_tests_in_other_versions(version: str, tmp_path: Path) -> None:
    """The oldest version, and one between: the table grows at its end only."""
    install(version, tmp_path)
    tests = [str(path) for path in sorted(Path(__file__).parent.glob("test_ort_library*.py"))]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *tests]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
