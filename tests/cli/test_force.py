"""One rule for every command that writes: an existing output is refused, and stays, unless --force is given."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ggpass.cli import main

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_main(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in arguments])
        return int(exit_info.value.code or 0), capsys.readouterr().err

    return run_main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a.weight": torch.randn(70, 50), "b.weight": torch.randn(60, 40)}, tmp_path / "in.safetensors")
    return tmp_path


#: The command, with IN and OUT, the suffix of OUT, and whether it needs a model, ONNX.
COMMANDS = {
    "pack": (("pack", "IN", "OUT"), ".safetensors"),
    "unpack": (("unpack", "PACKED", "OUT"), ".safetensors"),
    "shape": (("shape", "IN", "OUT", "--rare", "0"), ".safetensors"),
    "compile": (("compile", "BERT", "-t", "rf8-reference", "-o", "OUT"), ".safetensors"),
    "export": (("export", "BERT", "OUT"), ".onnx"),
    "lower-onnx": (("lower-onnx", "ONNX", "OUT"), ".onnx"),
}


def _arguments(folder: Path, name: str, run: Run) -> list[object]:
    """The command's arguments, each input made first."""
    command, suffix = COMMANDS[name]
    places: dict[str, Path] = {
        "IN": folder / "in.safetensors",
        "OUT": folder / f"out{suffix}",
        "PACKED": folder / "packed.safetensors",
        "BERT": folder / "bert",
        "ONNX": folder / "in.onnx",
    }
    if "PACKED" in command:
        assert run("pack", places["IN"], places["PACKED"])[0] == 0
    if "BERT" in command:
        transformers = pytest.importorskip("transformers")
        shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
        transformers.BertModel(transformers.BertConfig(vocab_size=60, **shape)).save_pretrained(places["BERT"])
    if name in ("export", "lower-onnx"):
        pytest.importorskip("onnxruntime")
    if "ONNX" in command:
        program = torch.onnx.export(nn.Linear(40, 30).eval(), (torch.randn(2, 40),), dynamo=True, verbose=False)
        program.save(places["ONNX"], external_data=False)
    return [places.get(part, part) for part in command]


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_is_replaced_only_when_asked(folder: Path, run: Run, name: str) -> None:
    arguments = _arguments(folder, name, run)
    out = folder / f"out{COMMANDS[name][1]}"
    before = {path.name for path in folder.iterdir()}
    for make in (lambda: out.write_bytes(b"precious"), lambda: out.symlink_to("nowhere")):
        make()
        code, err = run(*arguments)
        assert code == 1
        assert f"{out.name} exists already" in err.replace("\n", "")
        assert "--force" in err
        assert {path.name for path in folder.iterdir()} == before | {out.name}
        assert out.is_symlink() or out.read_bytes() == b"precious"
        if not out.is_symlink():
            assert run(*arguments, "--force") == (0, "")
            assert out.read_bytes() != b"precious"
            assert {path.name for path in folder.iterdir()} - {f"{out.name}.data"} == before | {out.name}
        out.unlink()


def test_a_directory_is_replaced_only_when_asked(folder: Path, run: Run) -> None:
    source, out = folder / "in", folder / "out"
    source.mkdir()
    save_file({"w": torch.randn(64, 64)}, source / "model.safetensors")
    out.mkdir()
    (out / "mine").write_text("precious")
    for command in ("pack", "unpack"):
        assert run(command, source, out)[0] == 1
        assert (out / "mine").read_text() == "precious"
    assert run("unpack", source, out, "--force")[0] == 1, "it is not packed"
    assert (out / "mine").read_text() == "precious"
    assert {path.name for path in folder.iterdir()} == {"in.safetensors", "in", "out"}
    assert run("pack", source, out, "--force") == (0, "")
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    assert run("unpack", out, source, "--force") == (0, "")
    assert load_file(source / "model.safetensors")["w"].shape == (64, 64)
