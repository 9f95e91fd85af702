"""`ggpass shape`: the file it writes, what it prints, and how it says that something is wrong."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.staging import left_in
from torch import nn

from ggpass.cli import main
from ggpass.passes import DeepShape

SETTINGS = ("--rare", "0", "--granularity", "tensor")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tied = torch.randn(50, 40) / 10
    tensors = {
        "layers.0.weight": torch.randn(64, 40) / 10,
        "layers.0.bias": torch.randn(64),
        "layers.1.weight": (torch.randn(64, 40) / 10).bfloat16(),
        "embed.weight": tied,
        "head.weight": tied.clone(),
        "zeros.weight": torch.zeros(40, 40),
        "ids": torch.arange(6).view(2, 3),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "in.safetensors", metadata={"format": "pt", "made by": "a test"})
    return tmp_path / "in.safetensors"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main(["shape", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(exit_info.value.code or 0), captured.out, captured.err


def test_the_file_holds_what_the_pass_makes(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    target = checkpoint.with_name("out.safetensors")
    source = checkpoint.read_bytes()
    code, out, err = run(capsys, checkpoint, target, *SETTINGS, "--mode", "compensated")
    assert (code, err) == (0, "")
    assert checkpoint.read_bytes() == source
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == ["in.safetensors", "out.safetensors"]
    assert max(map(len, out.splitlines())) <= 80
    for part in ("layers.0", "layers.1", "embed", "all 3 matrices", "zeros.weight: all of its weights are zero"):
        assert part in out
    old, new = load_file(checkpoint), load_file(target)
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert (new[name].dtype, new[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(new[name], tensor) == (name in ("layers.0.bias", "zeros.weight", "ids", "empty")), name
    assert torch.equal(new["embed.weight"], new["head.weight"])
    with safe_open(target, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "made by": "a test"}
    layer = nn.Linear(40, 64)
    layer.weight = nn.Parameter(old["layers.0.weight"].clone())
    DeepShape(mode="compensated", granularity="tensor", rare=0).on_module(layer)
    assert torch.equal(layer.weight.detach(), new["layers.0.weight"])


def test_patterns_and_an_untouched_model(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = checkpoint.with_name("out.safetensors")
    assert run(capsys, checkpoint, target, *SETTINGS, "--skip", "layers", "--only", "head")[0] == 0
    old, new = load_file(checkpoint), load_file(target)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"embed.weight", "head.weight"}  # equal tensors go together, as tied weights do
    target.unlink()
    code, out, _ = run(capsys, checkpoint, target, "--rare", "1e9")
    assert code == 0
    assert "nothing was reshaped" in out
    assert "rarer than rare=1e+09" in out.replace("\n", " ")
    assert all(torch.equal(a, b) for a, b in zip(load_file(target).values(), old.values()))


def test_errors_are_said_in_one_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint.parent
    (folder / "there.safetensors").write_bytes(b"x")
    save_file({"bad": torch.full((40, 40), torch.nan)}, folder / "nan.safetensors")
    cases = [
        ((checkpoint, folder / "there.safetensors"), "exists already"),
        ((checkpoint, checkpoint), "exists already"),
        ((folder / "none.safetensors", folder / "o.safetensors"), "is no file"),
        ((folder, folder / "o.safetensors"), "is not named .safetensors"),
        ((checkpoint, folder / "o.bin"), "is not named .safetensors"),
        ((checkpoint, folder / "x" / "o.safetensors"), "is no directory"),
        ((folder / "there.safetensors", folder / "o.safetensors"), "there.safetensors"),
        ((folder / "nan.safetensors", folder / "o.safetensors"), "'bad' holds NaN or infinity"),
        ((checkpoint, folder / "o.safetensors", "--skip", "nothere"), "'nothere' matches no"),
        ((checkpoint, folder / "o.safetensors", "--step", "0"), "step is a positive number"),
    ]
    for arguments, part in cases:
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (1, ""), arguments
        assert len(err.strip().splitlines()) == 1, err
        assert part in err
        assert not (folder / "o.safetensors").exists()
    assert (folder / "there.safetensors").read_bytes() == b"x"


def test_an_interrupted_run_goes_on(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ggpass.file import shape
    from ggpass.packed.writer import Writer

    whole = checkpoint.with_name("whole.safetensors")
    assert run(capsys, checkpoint, whole, *SETTINGS)[0] == 0
    target, write, written = checkpoint.with_name("out.safetensors"), Writer.write, []

    def fail_late(self: Writer, name: str, *arguments: object, **more: object) -> object:
        written.append(name)
        if len(written) == 4:
            raise KeyboardInterrupt
        return write(self, name, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(shape.Writer, "write", fail_late)
    with pytest.raises(KeyboardInterrupt):
        shape.shape_file(checkpoint, target, DeepShape(granularity="tensor", rare=0))
    assert not target.exists()
    assert left_in(target.parent).is_dir()
    assert run(capsys, checkpoint, target, *SETTINGS)[0] == 0
    assert target.read_bytes() == whole.read_bytes()
    assert len(written) == 4 + len(load_file(whole)) - 3
