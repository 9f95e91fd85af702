"""Weights of a Program and of a module: all names, one choice for every front end, one sentence for a reason."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.toy_pass import Halve
from torch import Tensor, nn

import ggpass
from ggpass import Program, WeightError
from ggpass.graph.weights import Selection, matches, weights_of_module
from ggpass.passes import DeepShape


class Tied(nn.Module):
    """An embedding tied to a head, a linear, a norm, a float buffer that the graph multiplies by."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(400, 64)
        self.mid = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.h = nn.Linear(64, 400, bias=False)
        self.h.weight = self.e.weight
        self.register_buffer("mix", torch.randn(64, 64))

    def forward(self, ids: Tensor) -> Tensor:
        return self.h(self.norm(self.mid(self.e(ids))) @ self.mix)


IDS = torch.arange(12).view(3, 4)


def model() -> Tied:
    torch.manual_seed(0)
    return Tied().eval()


def trace(module: nn.Module) -> Program:
    return Program.trace(module, (IDS,))


def test_a_tied_weight_is_one_weight_with_all_its_names() -> None:
    found = {weight.title for weight in trace(model()).weights()}
    assert found == {"e.weight = h.weight", "mid.weight"}
    assert {w.title for w in weights_of_module(model()) if w.is_matrix} == found


@pytest.mark.parametrize("name", ["e", "h", "e.weight", "h.weight", "?.weight"])
def test_any_name_selects_and_skips(name: str) -> None:
    program = trace(model())
    assert [w.title for w in program.weights(only=name)] == ["e.weight = h.weight"]
    assert [w.title for w in program.weights(skip=(name,))] == ["mid.weight"]


def test_a_typo_is_refused_with_the_names() -> None:
    for options in ({"only": "typo"}, {"skip": ["typo"]}):
        with pytest.raises(WeightError, match=r"'typo' matches no weight of the model; its weights are e\.weight"):
            trace(model()).weights(**options)  # type: ignore[arg-type]


def test_each_other_float_tensor_is_reported_with_its_reason() -> None:
    report = ggpass.Report("any")
    trace(model()).weights(skip="mid", report=report)
    assert {skip.name: skip.reason for skip in report.skips} == {
        "mid.weight": "matches skip='mid'",
        "mid.bias": "1-D (bias, norm): stays as it is",
        "norm.weight": "1-D (bias, norm): stays as it is",
        "norm.bias": "1-D (bias, norm): stays as it is",
        "mix": "a buffer, not a parameter",
    }


@pytest.mark.parametrize("step", [Halve(skip=("h",)), Halve(only=("mid",)), Halve()])
def test_a_pass_in_ten_lines(step: Halve) -> None:
    float_model = model()
    before = copy.deepcopy(float_model.state_dict())
    artifact = ggpass.compile(float_model, (IDS,), target="rf8-reference", passes=[step], skip="*")
    for name, tensor in float_model.state_dict().items():
        assert torch.equal(tensor, before[name]), "the traced model stays as it was"
    wanted = model()
    with torch.no_grad():
        wanted.mid.weight.mul_(0.5)
        if not step.skip and not step.only:
            wanted.e.weight.mul_(0.5)
        # Halving is exact, so nothing but the order of sums may differ: none does.
        assert torch.equal(artifact(IDS), wanted(IDS))
    assert {change.name for change in artifact.report.parts[0].changes} >= {"mid.weight"}


@pytest.mark.parametrize("name", ["e", "h"])
def test_the_second_name_of_a_tied_weight_in_passes(name: str) -> None:
    step = DeepShape(skip=(name,), rare=0)
    artifact = ggpass.compile(model(), (IDS,), target="rf8-reference", passes=[step])
    assert [change.name for change in artifact.report.parts[0].changes] == ["mid.weight"]
    module = model()
    assert [c.name for c in ggpass.shape_(module, skip=(name,), rare=0).changes] == ["mid.weight"]


def test_names_follow_a_weight_that_a_pass_has_replaced() -> None:
    program = trace(model())
    Halve()(program)
    assert [w.title for w in Program.copy(program).weights(only="h")] == ["e.weight = h.weight"]
    artifact = ggpass.compile(model(), (IDS,), target="rf8-reference", passes=[Halve(), Halve(only=("h",))], skip=["h"])
    assert "e.weight" in {skip.name for part in artifact.report.parts for skip in part.skips if "skip=" in skip.reason}


NAMES = st.lists(st.sampled_from(["a.weight", "a.b.weight", "b.weight", "c.d.e.weight"]), min_size=1, unique=True)
PATTERNS = st.lists(st.sampled_from(["a", "a.*", "*.weight", "b", "c.d", "?.weight", "nothing"]), unique=True)


@given(NAMES, PATTERNS, PATTERNS)
@settings(deadline=None)
def test_a_selection_is_only_less_skip_by_any_name(names: list[str], only: list[str], skip: list[str]) -> None:
    def meant(patterns: list[str]) -> bool:
        return any(matches(name, pattern) for name in names for pattern in patterns)

    selection = Selection(tuple(only), tuple(skip))
    assert (selection.reason(names) == "") == ((not only or meant(only)) and not meant(skip))
    known: dict[str, Any] = {"only": only, "skip": skip}
    if all(any(matches(n, p) for n in names) for patterns in known.values() for p in patterns):
        selection.check(names)
    else:
        with pytest.raises(WeightError, match="matches no weight"):
            selection.check(names)
