"""A target that a user adds: a value and its registration; it compiles, saves and loads like those that are there."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.toy_target import SEEN, TOY
from torch import nn

import ggpass
from ggpass.formats import FORMATS
from ggpass.targets import TARGETS, Target, register, resolve


@pytest.fixture(autouse=True)
def _nothing_seen() -> Iterator[None]:
    SEEN.clear()
    yield
    SEEN.clear()


X = torch.randn(3, 24)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 16, bias=False)).eval()


def compiled(model: nn.Module, way: str, target: str) -> Any:
    return ggpass.compile(model, *([(X,)] if way == "traced" else []), target=target)


@pytest.mark.parametrize("way", ["traced", "module"])
@pytest.mark.parametrize("name", FORMATS)
def test_it_compiles_and_its_operators_run(name: str, way: str) -> None:
    model = net()
    fast = compiled(model, way, f"{name}-toy")
    SEEN.clear()  # tracing runs the operators, too
    assert torch.equal(fast(X), compiled(model, way, f"{name}-reference")(X))
    assert SEEN == [(3, 24), (3, 40)]
    assert ggpass.report(fast).lowered_share == 1.0
    assert ggpass.sizes(fast).ratio < 0.7


@pytest.mark.parametrize("way", ["traced", "module"])
def test_it_saves_and_fills_what_was_compiled_alike(way: str, tmp_path: Path) -> None:
    fast, other = compiled(net(), way, "rf8-toy"), compiled(net(), way, "rf8-toy")
    ggpass.save(fast, tmp_path / "m.safetensors")
    if way == "traced":
        fast.save(tmp_path / "m.safetensors")
    assert torch.equal(ggpass.load(tmp_path / "m.safetensors", into=other)(X), fast(X))


def test_a_file_is_loaded_for_it(tmp_path: Path) -> None:
    fast = compiled(net(), "module", "rf8-reference")
    ggpass.save(fast, tmp_path / "m.safetensors")
    for target in ("toy", "rf8-toy"):
        loaded = ggpass.load(tmp_path / "m.safetensors", into=net(), target=target)
        SEEN.clear()
        assert torch.equal(loaded(X), fast(X))
        assert len(SEEN) == 2


def test_copies_keep_its_operators() -> None:
    for operators in (TOY.operators, TARGETS["reference"].operators, TARGETS["cpu"].operators):
        assert copy.deepcopy(operators) == pickle.loads(pickle.dumps(operators)) == operators


def test_what_it_does_not_do_is_said() -> None:
    with pytest.raises(ggpass.TargetError, match=r"target toy builds for this machine; leave out arch=\('sm_90',\)"):
        resolve("rf8-toy", ("sm_90",))
    with pytest.raises(ggpass.TargetError, match="there is a target 'toy' already; give this one another name"):
        register(Target("toy"))
    assert TARGETS["toy"] is TOY


def test_it_is_known_to_the_tests_alone() -> None:
    code = "import ggpass.targets; print(*ggpass.targets.TARGETS)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["cpu", "cuda", "reference", "onnx"]
