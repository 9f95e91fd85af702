"""`only` and `skip` of the torch.compile backend: all names of a tied weight, typos, graph breaks, plain functions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ggpass
from ggpass import Report


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(40, 16)
        self.mid = nn.Linear(16, 16)
        self.h = nn.Linear(16, 40, bias=False)
        self.h.weight = self.e.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.h(torch.relu(self.mid(self.e(ids))))


class Broken(Tied):
    """The graph breaks inside an inner module, so that Dynamo compiles that module's frame by itself."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.second = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    def __init__(self) -> None:
        super().__init__()
        self.mid = Broken.Inner()  # type: ignore[assignment]


IDS = torch.arange(12).view(3, 4)


def lowered(model: nn.Module, way: str = "torch.compile", **options: Any) -> set[str]:
    """Return the names of the weights that became codes, merges aside."""
    torch._dynamo.reset()
    reports: list[Report] = []
    options = {"target": "rf8-reference", "inner": "eager", "report": reports.append, **options}
    call: Callable[..., Tensor] = model
    if way == "Module.compile":
        model.compile(backend="ggpass", options=options)
    elif way == "a function":
        call = torch.compile(lambda x: model(x), backend="ggpass", options=options)
    else:
        call = torch.compile(model, backend="ggpass", options=options)
    with torch.no_grad():
        call(IDS)
    return {name for report in reports for c in report.changes if c.bytes_after for name in c.name.split(" = ")}


WAYS = ("torch.compile", "Module.compile")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pattern", ["h", "e", "h.weight", "e.*"])
def test_any_name_of_a_tied_weight_skips_it(pattern: str, way: str) -> None:
    model = Tied().eval()
    assert lowered(model, way, skip=[pattern]) == {"mid.weight"}
    module = ggpass.compile(Tied().eval(), target="rf8-reference", skip=[pattern])
    assert {c.name for c in ggpass.report(module).changes} == {"mid.weight"}


@pytest.mark.parametrize("way", WAYS)
def test_any_name_of_a_tied_weight_selects_it(way: str) -> None:
    assert lowered(Tied().eval(), way, only=["h"]) == {"e.weight", "h.weight"}
    assert lowered(Tied().eval(), way, only="e") == {"e.weight", "h.weight"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("option", ["skip", "only"])
def test_a_typo_is_refused_with_the_names(option: str, way: str) -> None:
    with pytest.raises(Exception, match=rf"{option}='typo' matches no weight of the model; its weights are e\.weight"):
        lowered(Tied().eval(), way, **{option: ["typo"]})


def test_names_start_at_the_compiled_module_behind_a_graph_break() -> None:
    everything = {"e.weight", "h.weight", "mid.first.weight", "mid.second.weight"}
    assert lowered(Broken().eval()) == everything
    assert lowered(Broken().eval(), skip=["mid.second"]) == everything - {"mid.second.weight"}
    assert lowered(Broken().eval(), skip=["h", "mid.first.*"]) == {"mid.second.weight"}


def test_a_plain_function_has_the_names_of_its_graph() -> None:
    found = lowered(Tied().eval(), "a function")
    assert {"mid.weight", "e.weight"} <= found
    assert "mid.weight" not in lowered(Tied().eval(), "a function", skip=["mid"])
