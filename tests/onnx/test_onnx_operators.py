"""Each ai.ggpass operator, alone in a file, three ways against float64; and what its schema refuses."""

import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support.closeness import assert_rejects_corruption, assert_within, dot_bound, store_bound
from support.onnx_runs import WAYS, check, onnx
from torch import Tensor

from ggpass.errors import InputError
from ggpass.formats import FORMATS, Format
from ggpass.onnx import bodies, schema
from ggpass.onnx.names import operator_name, takes_codebook
from ggpass.onnxruntime import library_or_reason

helper, numpy_helper = onnx.helper, onnx.numpy_helper

ROWS, COLUMNS = 48, 64
CONV = {"kernel_shape": [2, 2], "strides": [1, 2], "pads": [1, 0, 0, 1], "dilations": [1, 1], "group": 2}
DTYPES = {torch.float32: 1, torch.float16: 10}


@dataclass
class Case:
    """One node, its inputs, and what it must compute.

    Attributes:
        expected, bound: float64; bound 0 where the result is one rounding of an exact product or exact.
    """

    feed: dict[str, Tensor]
    constants: dict[str, Tensor]
    expected: Tensor
    bound: Tensor
    attributes: dict[str, Any] = field(default_factory=dict)


def make(operation: str, fmt: Format, dtype: torch.dtype = torch.float32, lead: tuple[int, ...] = (2, 5)) -> Case:
    """Random operands; every code of the format occurs, aliases too."""
    codes = torch.randint(0, 256, (ROWS, COLUMNS), dtype=torch.uint8)
    codes[~torch.isfinite(fmt.decode(codes))] = 0
    # The largest weights lie between 1/8 and 8, so that float16 holds the products of every format.
    scale = 2.0 ** torch.randint(-3, 3, (ROWS,)).float() / 2.0 ** math.ceil(math.log2(fmt.amax))
    values = fmt.decode(codes)
    constants = {"codes": codes, "scale": scale}
    if takes_codebook(fmt.name):
        constants["codebook"] = fmt.codebook
    weight = values.double() * scale.double()[:, None]
    to = {"to": DTYPES[dtype]}
    # The product codebook · scale is exact in float32 for powers of two. Kernels that decode by a unit multiply it into
    # the scale: two roundings, and the codebook's own is one more. `to` rounds once.
    off = weight.abs() * (3 * 2.0**-24 if fmt.decoder.unit != 1 else 0.0)
    if operation == "Dequantize":
        return Case({}, constants, weight, store_bound(weight, off, dtype), to)
    if operation == "Gather":
        ids = torch.randint(0, ROWS, lead)
        return Case({"x": ids}, constants, weight[ids], store_bound(weight[ids], off[ids], dtype), to)
    bias = torch.randn(ROWS).to(dtype)
    constants["bias"] = bias
    if operation == "MatMul":
        x = torch.randn(*lead, COLUMNS).to(dtype)
        expected = x.double() @ weight.T + bias.double()
        bound = store_bound(expected, dot_bound(x, values, scale, bias), dtype)
        return Case({"x": x}, constants, expected, bound)
    x = torch.randn(lead[0], 2 * COLUMNS // 4, 7, 9).to(dtype)
    columns = torch.nn.functional.pad(x.double(), (0, 1, 1, 0)).unfold(2, 2, 1).unfold(3, 2, 2)
    # (B, groups, C/g, H, W, 2, 2) → products of (B·H·W, K) rows with each group's rows of the weight.
    parts = columns.reshape(lead[0], 2, -1, *columns.shape[2:]).permute(0, 1, 3, 4, 2, 5, 6).flatten(4)
    halves = [slice(0, ROWS // 2), slice(ROWS // 2, ROWS)]
    expected = torch.cat([(parts[:, g] @ weight[h].T).movedim(-1, 1) for g, h in enumerate(halves)], 1)
    expected = expected + bias.double()[:, None, None]
    limits = [dot_bound(parts[:, g], values[h], scale[h], bias[h]).movedim(-1, 1) for g, h in enumerate(halves)]
    return Case({"x": x}, constants, expected, store_bound(expected, torch.cat(limits, 1), dtype), CONV)


def write(path: Path, name: str, case: Case, dtype: torch.dtype, opset: int, fallback: bodies.Fallback) -> Path:
    inputs = [
        helper.make_tensor_value_info(k, numpy_helper.from_array(v.numpy()).data_type, [None] * v.dim())
        for k, v in case.feed.items()
    ]
    node = helper.make_node(name, [*case.feed, *case.constants], ["y"], domain="ai.ggpass", **case.attributes)
    output = helper.make_tensor_value_info("y", DTYPES[dtype], [None] * case.expected.dim())
    constants = [numpy_helper.from_array(v.numpy(), k) for k, v in case.constants.items()]
    model = helper.make_model(
        helper.make_graph([node], "one", inputs, [output], constants),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("ai.ggpass", 1)],
        ir_version=10,
        functions=bodies.functions([name], opset, fallback),
    )
    onnx.save(model, path)
    return path


OPERATIONS = ["MatMul", "Gather", "Dequantize", "Conv"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fallback", ["fast", "lowmem"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_way_computes_the_operator(
    operation: str,
    format_name: str,
    dtype: torch.dtype,
    fallback: bodies.Fallback,
    way: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bodies, "BLOCK_WEIGHTS", 10 * COLUMNS)  # several blocks, the last one shorter
    case = make(operation, FORMATS[format_name], dtype)
    name = operator_name(format_name, operation)
    path = write(tmp_path / "one.onnx", name, case, dtype, 21, fallback)
    check(path)
    (y,) = WAYS[way](path, case.feed)
    assert y.dtype is dtype
    assert_within(y, case.expected, case.bound)
    assert_rejects_corruption(y, case.expected, case.bound)


@pytest.mark.parametrize("opset", [13, 14, 15, 18, 23])
@pytest.mark.parametrize("fallback", ["fast", "lowmem"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_bodies_in_every_opset(operation: str, fallback: bodies.Fallback, opset: int, tmp_path: Path) -> None:
    case = make(operation, FORMATS["rf8"])
    path = write(tmp_path / "one.onnx", f"RF8{operation}", case, torch.float32, opset, fallback)
    check(path)
    for way in ("stock", "reference"):
        assert_within(WAYS[way](path, case.feed)[0], case.expected, case.bound, way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lead", [(), (0, 5), (5, 0), (1,), (1, 1, 1, 1)])
@pytest.mark.parametrize("operation", ["MatMul", "Gather"])
def test_every_rank_and_empty_inputs(operation: str, lead: tuple[int, ...], way: str, tmp_path: Path) -> None:
    case = make(operation, FORMATS["rf8"], lead=lead)
    for fallback in ("fast", "lowmem"):
        path = write(tmp_path / "one.onnx", f"RF8{operation}", case, torch.float32, 21, fallback)  # type: ignore[arg-type]
        assert_within(WAYS[way](path, case.feed)[0], case.expected, case.bound)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fallback", ["fast", "lowmem"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_scale_for_the_tensor(operation: str, fallback: bodies.Fallback, way: str, tmp_path: Path) -> None:
    case = make(operation, FORMATS["rf8"])
    weight = FORMATS["rf8"].decode(case.constants["codes"]).double() * 0.25
    case.constants["scale"] = torch.tensor([0.25])
    path = write(tmp_path / "one.onnx", f"RF8{operation}", case, torch.float32, 21, fallback)
    (y,) = WAYS[way](path, case.feed)
    if operation in ("Dequantize", "Gather"):
        assert_within(y, weight[case.feed["x"]] if case.feed else weight, 0.0)
    else:
        # Exactly the result of that scale given for each channel.
        case.constants["scale"] = torch.full((ROWS,), 0.25)
        path = write(tmp_path / "rows.onnx", f"RF8{operation}", case, torch.float32, 21, fallback)
        assert torch.equal(y, WAYS[way](path, case.feed)[0])


SHAPES = {"x": ["b", "t", 8], "codes": [4, 8], "scale": [4], "bias": [4]}


def infer(name: str, shapes: dict[str, list[Any]], kinds: dict[str, int] | None = None, **attributes: Any) -> list[Any]:
    """The output's dimensions by strict shape inference."""
    schema.register()
    kinds = {"codes": 2, **(kinds or {})}
    inputs = [helper.make_tensor_value_info(k, kinds.get(k, 1), v) for k, v in shapes.items()]
    node = helper.make_node(name, list(shapes), ["y"], domain="ai.ggpass", **attributes)
    model = helper.make_model(
        helper.make_graph([node], "one", inputs, [onnx.ValueInfoProto(name="y")]),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("ai.ggpass", 1)],
    )
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    return [d.dim_param or d.dim_value for d in inferred.graph.output[0].type.tensor_type.shape.dim]


def test_shapes_are_inferred_through_symbols() -> None:
    assert infer("RF8MatMul", SHAPES) == ["b", "t", 4]
    assert infer("RF8MatMul", {**SHAPES, "x": [8]}) == [4]
    assert infer("RF8Gather", {"x": ["b"], "codes": [4, 8], "scale": [1]}, {"x": 7}) == ["b", 8]
    image = {"x": ["b", 3, 32, 20], "codes": [4, 27], "scale": [4]}
    assert infer("RF8Conv", image, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 1]) == ["b", 4, 16, 20]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": ["b", 7]}, "x is (…, 8)"),
        ({"codes": [4, 2, 4]}, "codes are (N, K)"),
        ({"scale": [3]}, "scale is (N) or (1)"),
        ({"scale": [4, 1]}, "scale is (N) or (1)"),
        ({"bias": [8]}, "bias is (4)"),
    ],
)
def test_inference_refuses_shapes_that_do_not_fit(change: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(onnx.shape_inference.InferenceError, match=r"\[ggpass\]") as refused:
        infer("RF8MatMul", {**SHAPES, **change})
    assert message in str(refused.value)


def test_inference_refuses_types_and_attributes() -> None:
    with pytest.raises(onnx.shape_inference.InferenceError, match="codes"):
        infer("RF8MatMul", SHAPES, {"codes": 3})
    with pytest.raises(onnx.shape_inference.InferenceError, match="to is 1"):
        infer("RF8Dequantize", {"codes": [4, 8], "scale": [4]}, to=16)
    with pytest.raises(onnx.shape_inference.InferenceError, match="shorter than the kernel"):
        infer("RF8Conv", {"x": [1, 3, 2, 9], "codes": [4, 27], "scale": [4]}, kernel_shape=[3, 3])


def test_bodies_refuse_what_they_cannot_be_written_in() -> None:
    with pytest.raises(InputError, match="opset 13"):
        bodies.functions(["RF8MatMul"], 12, "fast")
    with pytest.raises(InputError, match="fallback is"):
        bodies.functions(["RF8MatMul"], 21, "slow")  # type: ignore[arg-type]


MEMORY_SCRIPT = """
import re, sys
from pathlib import Path
import numpy as np, onnxruntime
from ggpass.onnxruntime import session_options

def megabytes(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

path, empty, how = sys.argv[1:]
options = session_options() if how == "library" else onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
x = np.ones((1, 2048), np.float32)
onnxruntime.InferenceSession(empty, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})
Path("/proc/self/clear_refs").write_text("5")
anonymous, peak = megabytes("RssAnon"), megabytes("VmHWM")
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
for _ in range(2):
    session.run(None, {"x": x})
print(megabytes("RssAnon") - anonymous, megabytes("VmHWM") - peak)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("how", ["library", "lowmem"])
def test_codes_stay_mapped_and_lowmem_decodes_a_block_at_a_time(how: str, tmp_path: Path) -> None:
    if how == "library" and isinstance(library_or_reason(), str):
        pytest.skip(str(library_or_reason()))
    layers, width = 12, 2048
    info, paths = helper.make_tensor_value_info, {}
    for name, count in (("empty", 0), ("full", layers)):
        names = ["x", *(f"h{i}" for i in range(count))]
        nodes = [
            helper.make_node("RF8MatMul", [names[i], f"c{i}", "s", "b"], [names[i + 1]], domain="ai.ggpass")
            for i in range(count)
        ]
        constants = {f"c{i}": torch.randint(0, 256, (width, width), dtype=torch.uint8) for i in range(count)}
        constants |= {"s": torch.full((1,), 2.0**-5), "b": torch.zeros(width)} if count else {}
        model = helper.make_model(
            helper.make_graph(
                [*nodes, helper.make_node("Identity", [names[-1]], ["y"])],
                name,
                [info("x", 1, ["m", width])],
                [info("y", 1, ["m", width])],
                [numpy_helper.from_array(v.numpy(), k) for k, v in constants.items()],
            ),
            opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("ai.ggpass", 1)],
            ir_version=10,
            functions=bodies.functions(["RF8MatMul"], 21, "lowmem"),
        )
        paths[name] = tmp_path / f"{name}.onnx"
        onnx.save(model, paths[name], save_as_external_data=True, location=f"{name}.bin")
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(paths["full"]), str(paths["empty"]), how],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    anonymous, peak = map(float, run.stdout.split())
    codes = layers * width * width / 2**20
    if how == "library":
        assert anonymous <= 20
    # Decoded blocks: int32 indices, floats and their transposes of BLOCK_WEIGHTS weights each, beside the mapped codes.
    assert peak <= 1.5 * codes
    # Below it the measurement itself would be wrong: a run has read every code.
    assert peak >= 0.5 * codes
