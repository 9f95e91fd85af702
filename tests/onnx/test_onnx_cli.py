"""`ggpass export`, `lower-onnx` and `inspect` on ONNX files: what is written, what is printed, how errors read."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from support.onnx_files import FLOAT, node, save
from support.onnx_runs import WAYS, check, onnx

from ggpass.cli import main
from ggpass.formats import RF8, quantize

transformers = pytest.importorskip("transformers", reason="needs transformers; pip install 'ggpass[transformers]'")


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Runs the command line in this process, 120 columns wide."""

    def run_main(*arguments: object) -> Ran:
        monkeypatch.setenv("COLUMNS", "120")
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(int(exit_info.value.code or 0), captured.out, captured.err)

    return run_main


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied language model in a directory; its Conv1D weights are transposed."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = transformers.GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=1, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_export_writes_a_checked_file_with_open_sizes(run: Callable[..., Ran], gpt2: Path, tmp_path: Path) -> None:
    path = tmp_path / "gpt2.onnx"
    ran = run("export", gpt2, path, "--fallback", "lowmem", "--opset", "20")
    assert ran.code == 0, ran.err
    assert "checked in ONNX Runtime" in ran.out
    assert "opset 20, fallback lowmem" in ran.out
    assert "GPT2LMHeadModel exported for rf8-onnx" in ran.out
    check(path)
    ids = torch.randint(0, 100, (3, 21))
    (logits,) = WAYS["stock"](path, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert logits.shape == (3, 21, 100)
    shown = run("inspect", path)
    assert shown.code == 0
    assert "RF8Gather, RF8MatMul (2 nodes)" in shown.out  # the tied embedding
    assert "carry their own fallback" in shown.out
    plain = json.loads(run("inspect", path, "--json").out)
    assert plain["opset"] == 20
    assert plain["fallback"] is True
    for tensor in plain["tensors"]:
        stored = next(i for i in onnx.load(path).graph.initializer if i.name == tensor["name"])
        counts = np.bincount(np.frombuffer(stored.raw_data, np.uint8), minlength=256)
        p = counts[counts > 0] / counts.sum()
        assert tensor["entropy"] == pytest.approx(float(-(p * np.log2(p)).sum()), abs=1e-9)


def test_lower_onnx_and_inspect_of_float_files(run: Callable[..., Ran], tmp_path: Path) -> None:
    w = torch.randn(64, 32)
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="only")]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "one",
        [info("x", 1, ["n", 64])],
        [info("y", 1, ["n", 32])],
        [onnx.numpy_helper.from_array(w.numpy(), "w")],
    )
    path = tmp_path / "in.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    fitted = json.loads(run("inspect", path, "--json").out)["weights"]
    # The fit is of output channels as rows, however a MatMul stores them.
    assert [w["shape"] for w in fitted] == [[32, 64]]
    q = quantize(w.t(), RF8)
    error = (w.t() - RF8.decode(q.codes) * q.scale[:, None]).double()
    sqnr = 10 * torch.log10(w.double().square().sum() / error.square().sum()).item()
    assert fitted[0]["formats"]["rf8"]["sqnr_db"] == pytest.approx(sqnr, abs=1e-6)
    ran = run("lower-onnx", path, tmp_path / "out.onnx", "--target", "int8-onnx")
    assert ran.code == 0, ran.err
    assert "64×32 float → int8" in ran.out
    assert "100.00% of the bytes of matrices lowered" in ran.out
    assert "CodebookMatMul" in run("inspect", tmp_path / "out.onnx").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lower-onnx", "none.onnx", "out.onnx"], "does not exist"),
        (["lower-onnx", "bad.onnx", "out.onnx"], "holds no node"),
        (["lower-onnx", "bad.onnx", "out.bin"], ".onnx file"),
        (["export", "bad.onnx", "out.onnx"], "is not a directory"),
        (["export", ".", "out.onnx", "--target", "rf8-cpu"], "ends in -onnx"),
        (["inspect", "bad.onnx"], "holds no node"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.onnx").write_bytes(b"")
    ran = run(*arguments)
    assert ran.code == 1
    assert ran.out == ""
    assert len(ran.err.strip().splitlines()) == 1, ran.err
    assert message in ran.err


@pytest.mark.parametrize("name", ["w", "a.b"])
def test_advice_is_given_in_options(name: str, run: Callable[..., Ran], tmp_path: Path) -> None:
    """Python's errors advise skip=[…]; here one writes --skip, and it helps."""
    bad, good = torch.randn(64, 64), torch.randn(64, 64)
    bad[3, 5] = float("nan")
    path = save(
        tmp_path / "in.onnx",
        [node("MatMul", ["x", name], "h"), node("MatMul", ["h", "good"], "y")],
        {"x": (FLOAT, ["n", 64])},
        {name: bad.numpy(), "good": good.numpy()},
    )
    ran = run("lower-onnx", path, tmp_path / "out.onnx")
    assert ran.code == 1
    assert f"--skip '{name}'" in " ".join(ran.err.split())
    assert "skip=" not in ran.err
    assert run("lower-onnx", path, tmp_path / "out.onnx", "--skip", name).code == 0


def test_weights_inside_functions_are_inspected(run: Callable[..., Ran], tmp_path: Path) -> None:
    helper, w = onnx.helper, torch.randn(64, 48)
    constant = helper.make_node("Constant", [], ["w"], value=onnx.numpy_helper.from_array(w.numpy()))
    body = [constant, node("MatMul", ["a", "w"], "b")]
    model = onnx.load(
        save(tmp_path / "in.onnx", [helper.make_node("F", ["x"], ["y"], domain="my")], {"x": (FLOAT, ["n", 64])}, {})
    )
    model.functions.append(helper.make_function("my", "F", ["a"], ["b"], body, [helper.make_opsetid("", 17)]))
    model.opset_import.add(domain="my", version=1)
    onnx.save(model, tmp_path / "in.onnx")
    (fitted,) = json.loads(run("inspect", tmp_path / "in.onnx", "--json").out)["weights"]
    assert fitted["shape"] == [48, 64]
