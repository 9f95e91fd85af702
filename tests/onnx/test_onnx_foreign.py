"""lower_onnx on what others write: half precision, functions, sparse tensors, odd names, old opsets, any operator."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.onnx_files import FLOAT, HALF, INT64, node, operators, rounded, same, save, weight
from support.onnx_runs import WAYS, check, onnx

import ggpass
from ggpass.formats import FORMATS

pytest.importorskip("onnx_ir", reason="needs onnx-ir; pip install 'ggpass[onnx]'")
helper, numpy_helper = onnx.helper, onnx.numpy_helper

X = {"x": (FLOAT, ["n", 64])}


def close(path: Path, source: Path, feed: dict[str, np.ndarray], most: float, ways: Any = tuple(WAYS)) -> None:
    """The lowered file computes what its source does, to the error of eight bits; an exact copy fails too."""
    tensors = {name: torch.from_numpy(value) for name, value in feed.items()}
    (want,) = WAYS["stock"](source, tensors)
    for way in ways:
        (got,) = WAYS[way](path, tensors)
        error = float((got.float() - want.float()).norm() / want.float().norm())
        assert 1e-4 < error < most, (way, error)


def small_net(opset: int, path: Path) -> Any:
    """Two matrices, a convolution, a table; float32, as an exporter writes it."""
    nodes = [
        node("MatMul", ["x", "a"], "h"),
        node("Relu", ["h"], "r"),
        node("Gemm", ["r", "b", "c"], "g", transB=1),
        node("Gather", ["e", "ids"], "q"),
        node("Add", ["g", "q"], "s"),
        node("Reshape", ["s", "shape"], "image"),
        node("Conv", ["image", "k"], "y"),
    ]
    made = {
        "a": weight(64, 64) / 8,
        "b": weight(64, 64) / 8,
        "c": weight(64),
        "e": weight(20, 64),
        "k": weight(8, 4, 3, 3),
    }
    inputs = {**X, "ids": (INT64, ["n"])}
    return onnx.load(save(path, nodes, inputs, {**made, "shape": np.array([-1, 4, 4, 4])}, (FLOAT, 4), opset, 7))


@pytest.mark.parametrize("opset", [11, 13, 14, 15])
@pytest.mark.parametrize("keep_io", [True, False])
@pytest.mark.parametrize("fallback", ["fast", "lowmem"])
def test_half_precision_by_a_converter(opset: int, keep_io: bool, fallback: Any, tmp_path: Path) -> None:
    float16 = pytest.importorskip("onnxruntime.transformers.float16")
    model = float16.convert_float_to_float16(small_net(opset, tmp_path / "float.onnx"), keep_io_types=keep_io)
    # Annotations are optional, and some converters leave those of the float model: they must not matter.
    del model.graph.value_info[:]
    path = tmp_path / "in.onnx"
    onnx.save(model, path)
    report = ggpass.lower_onnx(path, tmp_path / "out.onnx", fallback=fallback)
    assert len(report.changes) == 4
    check(tmp_path / "out.onnx")
    x = weight(3, 64) if keep_io else weight(3, 64, dtype=np.float16)
    close(tmp_path / "out.onnx", path, {"x": x, "ids": np.array([1, 5, 3])}, 0.15)


def test_annotations_that_lie_do_not_matter(tmp_path: Path) -> None:
    inputs = {"x": (HALF, ["n", 64])}
    made = {"a": weight(64, 48, dtype=np.float16), "b": weight(48, 32, dtype=np.float16)}
    nodes = [node("MatMul", ["x", "a"], "h"), node("MatMul", ["h", "b"], "y")]
    path = save(tmp_path / "in.onnx", nodes, inputs, made, (HALF, 2), opset=13)
    exact = {name: rounded(value, True) for name, value in made.items()}
    want = save(tmp_path / "want.onnx", nodes, inputs, exact, (HALF, 2), opset=13)
    model = onnx.load(path)
    model.graph.value_info.append(helper.make_tensor_value_info("h", FLOAT, None))
    onnx.save(model, path)
    ggpass.lower_onnx(path, tmp_path / "out.onnx")
    same(tmp_path / "out.onnx", want, {"x": weight(5, 64, dtype=np.float16) / 8})


@pytest.mark.parametrize("opset", [14, 17])
def test_half_precision_by_torchs_older_exporter(opset: int, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 32)).half().eval()
    x = torch.randn(3, 64).half()
    torch.onnx.export(model, (x,), str(tmp_path / "in.onnx"), dynamo=False, opset_version=opset, input_names=["x"])
    report = ggpass.lower_onnx(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert len(report.changes) == 2
    close(tmp_path / "out.onnx", tmp_path / "in.onnx", {"x": x.numpy()}, 0.1)


def as_sparse(w: np.ndarray, name: str, flat: bool) -> Any:
    indices = np.flatnonzero(w) if flat else np.argwhere(w)
    return helper.make_sparse_tensor(
        numpy_helper.from_array(w[w != 0], name), numpy_helper.from_array(indices.astype(np.int64)), list(w.shape)
    )


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("constant", [True, False])
def test_sparse_weights_are_weights(flat: bool, constant: bool, tmp_path: Path) -> None:
    w = weight(64, 48) * (np.random.default_rng(0).random((64, 48)) < 0.2)
    product = node("MatMul", ["x", "w"], "y")
    want = save(tmp_path / "want.onnx", [product], X, {"w": rounded(w, True)})
    made = helper.make_node("Constant", [], ["w"], sparse_value=as_sparse(w, "w", flat))
    path = save(tmp_path / "in.onnx", [made, product] if constant else [product], X, {})
    if not constant:
        model = onnx.load(path)
        model.graph.sparse_initializer.append(as_sparse(w, "w", flat))
        onnx.save(model, path)
    report = ggpass.lower_onnx(path, tmp_path / "out.onnx")
    assert [c.name for c in report.changes] == ["w"]
    same(tmp_path / "out.onnx", want, {"x": weight(5, 64)}, ["stock", "reference", "library"])


def test_a_sparse_tensor_cannot_ask_for_any_size(tmp_path: Path) -> None:
    path = save(tmp_path / "in.onnx", [node("MatMul", ["x", "w"], "y")], X, {})
    sparse = as_sparse(np.eye(64, dtype=np.float32), "w", True)
    sparse.dims[1] = 1 << 40
    model = onnx.load(path)
    model.graph.sparse_initializer.append(sparse)
    onnx.save(model, path)
    with pytest.raises(ggpass.FormatError, match=r"'w' takes 281474976710656 bytes once it is dense"):
        ggpass.lower_onnx(path, tmp_path / "out.onnx")


def test_functions_are_looked_into(tmp_path: Path) -> None:
    """A weight inside a function, one given to a function, one function in another, and two calls of each."""
    inner, outer = weight(64, 64) / 8, weight(64, 64) / 8
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]

    def functions(w: np.ndarray) -> list[Any]:
        constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(w))
        one = helper.make_function("my", "One", ["a"], ["b"], [constant, node("MatMul", ["a", "w"], "b")], opsets)
        call = helper.make_node("One", ["a"], ["h"], domain="my")
        two = helper.make_function("my", "Two", ["a", "v"], ["b"], [call, node("MatMul", ["h", "v"], "b")], opsets)
        return [one, two]

    def write(name: str, w: np.ndarray, v: np.ndarray) -> Path:
        calls = [
            helper.make_node("Two", ["x", "v"], ["h"], domain="my", name="first"),
            helper.make_node("Two", ["h", "v"], ["y"], domain="my", name="second"),
        ]
        model = onnx.load(save(tmp_path / name, calls, X, {"v": v}))
        model.functions.extend(functions(w))
        model.opset_import.add(domain="my", version=1)
        onnx.save(model, tmp_path / name)
        return tmp_path / name

    path, want = write("in.onnx", inner, outer), write("want.onnx", rounded(inner, True), rounded(outer, True))
    report = ggpass.lower_onnx(path, tmp_path / "out.onnx")
    assert len(report.changes) == 2
    assert report.lowered_share == 1.0
    assert operators(tmp_path / "out.onnx") == ["RF8MatMul"] * 4
    codes = [i for i in onnx.load(tmp_path / "out.onnx").graph.initializer if i.data_type == onnx.TensorProto.UINT8]
    assert len(codes) == 2  # calls share what they are given, and what the function holds
    same(tmp_path / "out.onnx", want, {"x": weight(5, 64)}, ["stock", "reference", "library"])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_weights_that_are_quantized_already_are_reported(dtype: Any, tmp_path: Path) -> None:
    q = np.random.default_rng(0).integers(0, 100, (64, 64)).astype(dtype)
    nodes = [
        node("DequantizeLinear", ["q", "s", "z"], "w"),
        node("MatMul", ["x", "w"], "h"),
        node("MatMul", ["h", "v"], "y"),
    ]
    made = {"q": q, "s": np.float32(0.01), "z": dtype(0), "v": weight(64, 64)}
    report = ggpass.lower_onnx(save(tmp_path / "in.onnx", nodes, X, made), tmp_path / "out.onnx")
    (skip,) = [s for s in report.skips if s.name == "q"]
    assert skip.reason == f"is {np.dtype(dtype).name}: quantized already"
    assert skip.bytes == q.nbytes
    assert report.lowered_share == pytest.approx(0.8)


#: Names of the model's own that this package would have chosen for its own, and the roles they play.
NAMES = [
    {"bias": "0.weight_scale", "hidden": "0.weight_codes", "factor": "ggpass_zeros_8"},
    {"bias": "ggpass_zeros_8", "hidden": "ggpass_int8_codebook", "factor": "0.weight_scale"},
    {"bias": "0.weight_codes_2", "hidden": "0.weight_codes", "factor": "1.weight_shape"},
]


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("target", ["rf8-onnx", "int8-onnx"])
def test_new_names_are_new(names: dict[str, str], target: str, tmp_path: Path) -> None:
    bias, hidden, factor = names["bias"], names["hidden"], names["factor"]
    nodes = [
        node("Conv", ["x", "0.weight", bias], "c"),
        node("Relu", ["c"], hidden),
        node("Mul", [hidden, factor], "m"),
        node("Conv", ["m", "1.weight"], "y", auto_pad="SAME_UPPER"),
    ]
    made = {"0.weight": weight(8, 4, 3, 3), bias: weight(8), factor: np.float32(2), "1.weight": weight(8, 8, 3, 3)}
    path = save(tmp_path / "in.onnx", nodes, {"x": (FLOAT, ["n", 4, 9, 9])}, made, (FLOAT, 4))
    assert len(ggpass.lower_onnx(path, tmp_path / "out.onnx", target=target).changes) == 2
    check(tmp_path / "out.onnx")
    close(tmp_path / "out.onnx", path, {"x": weight(2, 4, 9, 9)}, 0.1)


@pytest.mark.parametrize("second", FORMATS)
@pytest.mark.parametrize("first", ["rf8", "int8"])
def test_lowering_in_two_steps(first: str, second: str, tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "a"], "h"), node("MatMul", ["h", "b"], "y")]
    path = save(tmp_path / "in.onnx", nodes, X, {"a": weight(64, 64) / 8, "b": weight(64, 64) / 8})
    ggpass.lower_onnx(path, tmp_path / "half.onnx", target=f"{first}-onnx", only="a", fallback="lowmem")
    report = ggpass.lower_onnx(tmp_path / "half.onnx", tmp_path / "out.onnx", target=f"{second}-onnx")
    assert [c.name for c in report.changes] == ["b"]
    assert next(s.reason for s in report.skips if s.name == "a_codes") == "holds codes already"
    check(tmp_path / "out.onnx")
    close(tmp_path / "out.onnx", path, {"x": weight(5, 64)}, 0.15)


@pytest.mark.parametrize("imports", [["ai.onnx"], ["ai.onnx", "ai.onnx.ml"]])
@pytest.mark.parametrize("fallback", ["fast", None])
def test_the_standard_domain_by_its_other_name(imports: list[str], fallback: Any, tmp_path: Path) -> None:
    w = weight(64, 48)
    path = save(tmp_path / "in.onnx", [node("MatMul", ["x", "w"], "y")], X, {"w": w})
    want = save(tmp_path / "want.onnx", [node("MatMul", ["x", "w"], "y")], X, {"w": rounded(w, True)})
    model = onnx.load(path)
    del model.opset_import[:]
    for domain in imports:
        model.opset_import.add(domain=domain, version=17 if domain == "ai.onnx" else 3)
    model.graph.node[0].domain = "ai.onnx"
    onnx.save(model, path)
    ggpass.lower_onnx(path, tmp_path / "out.onnx", fallback=fallback)
    same(tmp_path / "out.onnx", want, {"x": weight(5, 64)}, ["library"] if fallback is None else ["stock", "library"])


def test_a_model_without_a_standard_operator(tmp_path: Path) -> None:
    scaler = helper.make_node("Scaler", ["x"], ["y"], domain="ai.onnx.ml", offset=[1.0] * 64, scale=[2.0] * 64)
    model = onnx.load(save(tmp_path / "in.onnx", [scaler], X, {}))
    del model.opset_import[:]
    model.opset_import.add(domain="ai.onnx.ml", version=3)
    onnx.save(model, tmp_path / "in.onnx")
    assert not ggpass.lower_onnx(tmp_path / "in.onnx", tmp_path / "out.onnx").changes
    x = torch.randn(3, 64)
    assert torch.equal(WAYS["stock"](tmp_path / "out.onnx", {"x": x})[0], 2 * (x - 1))


@pytest.mark.parametrize("opset", [8, 9, 12])
@pytest.mark.parametrize("fallback", ["fast", None])
def test_models_of_before_ir_version_4(opset: int, fallback: Any, tmp_path: Path) -> None:
    """Initializers were inputs then; and they must not be given to be found once the inputs are gone."""
    w = weight(64, 48)
    nodes = [
        node("MatMul", ["x", "w"], "h"),
        node("Unsqueeze", ["h"], "u", axes=[0]),
        node("Squeeze", ["u"], "y", axes=[0]),
    ]
    path = save(tmp_path / "in.onnx", nodes, {**X, "w": (FLOAT, [64, 48])}, {"w": w}, opset=opset, ir_version=3)
    want = save(tmp_path / "want.onnx", nodes, X, {"w": rounded(w, True)}, opset=opset, ir_version=4)
    ggpass.lower_onnx(path, tmp_path / "out.onnx", fallback=fallback)
    assert [i.name for i in onnx.load(tmp_path / "out.onnx").graph.input] == ["x"]
    same(tmp_path / "out.onnx", want, {"x": weight(5, 64)}, ["library"] if fallback is None else ["stock", "library"])


def test_conversion_reaches_bodies_and_functions(tmp_path: Path) -> None:
    """Opset 12: a large weight in the body of an If, another in a function."""
    inside, outside = weight(64, 64) / 8, weight(64, 64) / 8

    def write(name: str, w: np.ndarray, v: np.ndarray) -> Path:
        def branch(label: str) -> Any:
            nodes = [
                node("MatMul", ["h", "w"], f"{label}_h"),
                node("Unsqueeze", [f"{label}_h"], f"{label}_u", axes=[0]),
            ]
            out = helper.make_tensor_value_info(f"{label}_u", FLOAT, None)
            return helper.make_graph(nodes, label, [], [out], [numpy_helper.from_array(w, "w")])

        call = helper.make_node("Mul3", ["x"], ["h"], domain="my")
        chosen = node("If", ["flag"], "y", then_branch=branch("then"), else_branch=branch("else"))
        model = onnx.load(save(tmp_path / name, [call, chosen], {**X, "flag": (9, [])}, {}, (FLOAT, 3), opset=12))
        constant = helper.make_node("Constant", [], ["v"], value=numpy_helper.from_array(v))
        opsets = [helper.make_opsetid("", 12)]
        body = [constant, node("MatMul", ["a", "v"], "b")]
        model.functions.append(helper.make_function("my", "Mul3", ["a"], ["b"], body, opsets))
        model.opset_import.add(domain="my", version=1)
        onnx.save(model, tmp_path / name)
        return tmp_path / name

    path = write("in.onnx", inside, outside)
    want = write("want.onnx", rounded(inside, True), rounded(outside, True))
    report = ggpass.lower_onnx(path, tmp_path / "out.onnx")
    assert len(report.changes) == 3
    for flag in (True, False):
        same(tmp_path / "out.onnx", want, {"x": weight(5, 64), "flag": np.array(flag)})


def test_a_conversion_that_does_not_open_is_no_success(tmp_path: Path) -> None:
    """Scan changed in opset 9, and onnx's converter leaves it as it was."""
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [node("Add", ["s", "e"], "t"), node("Identity", ["t"], "o")],
        "body",
        [info("s", FLOAT, [64]), info("e", FLOAT, [64])],
        [info("t", FLOAT, [64]), info("o", FLOAT, [64])],
    )
    scan = helper.make_node("Scan", ["", "start", "h"], ["last", "y"], body=body, num_scan_inputs=1)
    nodes = [node("MatMul", ["x", "w"], "h"), scan]
    inputs = {"x": (FLOAT, [2, 5, 64])}
    made = {"w": weight(64, 64), "start": np.zeros((2, 64), np.float32)}
    path = save(tmp_path / "in.onnx", nodes, inputs, made, (FLOAT, 3), opset=8, ir_version=4)
    WAYS["stock"](path, {"x": torch.randn(2, 5, 64)})
    with pytest.raises(ggpass.GgpassError, match=r"onnx cannot convert it|does not open what was written"):
        ggpass.lower_onnx(path, tmp_path / "out.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["in.onnx"]


def recurrent(kind: str, gates: int) -> tuple[list[Any], dict[str, np.ndarray], dict[str, Any]]:
    made = {"w": weight(1, gates * 64, 64) / 8, "r": weight(1, gates * 64, 64) / 8, "axes": np.array([1])}
    nodes = [helper.make_node(kind, ["x", "w", "r"], ["all"], hidden_size=64), node("Squeeze", ["all", "axes"], "y")]
    return nodes, made, {"x": (FLOAT, [7, 2, 64])}


def table(operator: str) -> tuple[list[Any], dict[str, np.ndarray], dict[str, Any]]:
    return [node(operator, ["x", "w"], "y")], {"w": weight(1, 40, 64)}, {"x": (FLOAT, ["n", 40, 64])}


IMAGE = {"x": (FLOAT, ["n", 32, 9, 9])}
CUBE = {"x": (FLOAT, ["n", 8, 5, 5, 5])}
SEQUENCE = {"x": (FLOAT, ["n", 7, 64])}
#: name → nodes, constants, inputs, the rank of the output, the domain of the operator.
DECODED: dict[str, tuple[tuple[list[Any], dict[str, np.ndarray], dict[str, Any]], int, str]] = {
    "LSTM": (recurrent("LSTM", 4), 3, ""),
    "GRU": (recurrent("GRU", 3), 3, ""),
    "RNN": (recurrent("RNN", 1), 3, ""),
    "Add": (table("Add"), 3, ""),
    "Mul": (table("Mul"), 3, ""),
    "ConvTranspose": (([node("ConvTranspose", ["x", "w"], "y")], {"w": weight(32, 16, 3, 3)}, IMAGE), 4, ""),
    "Conv3d": (([node("Conv", ["x", "w"], "y")], {"w": weight(16, 8, 3, 3, 3)}, CUBE), 5, ""),
    "batched MatMul": (
        ([node("MatMul", ["x", "w"], "y")], {"w": weight(4, 64, 64)}, {"x": (FLOAT, [4, "n", 64])}),
        3,
        "",
    ),
    "from the left": (([node("MatMul", ["w", "x"], "y")], {"w": weight(48, 64)}, {"x": (FLOAT, [64, "n"])}), 2, ""),
    "both orientations": (
        ([node("MatMul", ["x", "w"], "h"), node("Gemm", ["h", "w"], "y", transB=1)], {"w": weight(64, 64) / 8}, X),
        2,
        "",
    ),
    "alpha": (([node("Gemm", ["x", "w"], "y", alpha=0.5)], {"w": weight(64, 48)}, X), 2, ""),
    "gather of columns": (
        ([node("Gather", ["w", "ids"], "y", axis=1)], {"w": weight(64, 64)}, {"ids": (INT64, [3])}),
        2,
        "",
    ),
    "FusedMatMul": (
        ([node("FusedMatMul", ["x", "w"], "y", transB=1, alpha=0.5, domain="com.microsoft")], {"w": weight(48, 64)}, X),
        2,
        "com.microsoft",
    ),
    "FusedConv": (
        (
            [node("FusedConv", ["x", "w"], "y", activation="Relu", domain="com.microsoft")],
            {"w": weight(16, 32, 3, 3)},
            IMAGE,
        ),
        4,
        "com.microsoft",
    ),
    "Attention": (
        (
            [node("Attention", ["x", "w", "b"], "y", num_heads=4, domain="com.microsoft")],
            {"w": weight(64, 192) / 8, "b": weight(192)},
            SEQUENCE,
        ),
        3,
        "com.microsoft",
    ),
    "EmbedLayerNormalization": (
        (
            [
                helper.make_node(
                    "EmbedLayerNormalization", ["ids", "", "w", "p", "", "g", "b"], ["y", "m"], domain="com.microsoft"
                )
            ],
            {"w": weight(60, 64), "p": weight(40, 64), "g": weight(64), "b": weight(64)},
            {"ids": (6, ["n", 7])},
        ),
        3,
        "com.microsoft",
    ),
}


@pytest.mark.parametrize("target", ["rf8-onnx", "int8-onnx"])
@pytest.mark.parametrize("case", DECODED)
def test_any_float_operator_gets_its_matrix_from_codes(case: str, target: str, tmp_path: Path) -> None:
    (nodes, made, inputs), rank, domain = DECODED[case]
    path = save(tmp_path / "in.onnx", nodes, inputs, made, (FLOAT, rank))
    if domain:
        model = onnx.load(path)
        model.opset_import.add(domain=domain, version=1)
        onnx.save(model, path)
    report = ggpass.lower_onnx(path, tmp_path / "out.onnx", target=target)
    assert report.lowered_share == 1.0
    assert report.bytes_after <= 0.3 * report.bytes_before
    feed = {
        name: np.random.default_rng(0).integers(0, 40, [s if isinstance(s, int) else 3 for s in shape]).astype(np.int32)
        if kind == 6
        else np.array([3, 1, 2])
        if kind == INT64
        else weight(*[s if isinstance(s, int) else 3 for s in shape])
        for name, (kind, shape) in inputs.items()
    }
    close(tmp_path / "out.onnx", path, feed, 0.1, ("stock", "library") if domain else tuple(WAYS))


def test_numbers_that_are_no_weights_stay(tmp_path: Path) -> None:
    """Anchors of a detector, a mask, scales of blocks: exact, with the reason."""
    grid = np.stack([np.tile(np.arange(64), 40), np.repeat(np.arange(40), 64)]).astype(np.float32)
    mask = np.triu(np.full((64, 64), -np.inf, np.float32), 1)
    nodes = [
        node("Sub", ["x", "anchors"], "h"),
        node("Reshape", ["h", "shape"], "r"),
        node("Add", ["r", "mask"], "y"),
    ]
    made = {"anchors": grid, "mask": mask, "shape": np.array([-1, 64, 64])}
    path = save(tmp_path / "in.onnx", nodes, {"x": (FLOAT, [4, 2, 2560])}, made, (FLOAT, 3))
    report = ggpass.lower_onnx(path, tmp_path / "out.onnx")
    reasons = {s.name: s.reason for s in report.skips}
    assert "a grid or a mask" in reasons["anchors"]
    assert "holds -inf (row 0)" in reasons["mask"]
    x = {"x": torch.randn(4, 2, 2560)}
    assert torch.equal(WAYS["stock"](path, x)[0], WAYS["stock"](tmp_path / "out.onnx", x)[0])


def test_one_row_of_padding_keeps_its_table_and_no_other(tmp_path: Path) -> None:
    padded = weight(26, 8)
    padded[3] = np.inf
    nodes = [
        node("Gather", ["t", "ids"], "b"),
        node("ReduceMin", ["b"], "s", keepdims=0),
        node("MatMul", ["x", "w"], "h"),
    ]
    nodes.append(node("Add", ["h", "s"], "y"))
    made = {"t": padded, "w": weight(64, 64)}
    path = save(tmp_path / "in.onnx", nodes, {**X, "ids": (INT64, ["k"])}, made)
    report = ggpass.lower_onnx(path, tmp_path / "out.onnx")
    assert [c.name for c in report.changes] == ["w"]
    assert {s.name: s.reason for s in report.skips}["t"].startswith("holds inf (row 3)")
    close(tmp_path / "out.onnx", path, {"x": weight(5, 64), "ids": np.array([1, 2])}, 0.1)
