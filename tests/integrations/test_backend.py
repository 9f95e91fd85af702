"""torch.compile(model, backend="ggpass"): codes follow the tensors of each call."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import ggpass
from ggpass import InputError, Report
from ggpass.formats import FORMATS
from ggpass.integrations.dynamo.arguments import parameter_name
from ggpass.integrations.dynamo.backend import ggpass_backend
from ggpass.integrations.dynamo.code_cache import CACHE


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="ggpass", options={"target": "rf8-cpu", "inner": "eager", **options})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(50, 16), nn.Conv1d(16, 16, 3, padding=1)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8, bias=False), nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.head(torch.relu(self.q(x)) * self.v(x)) + self.k(x).sum()


def test_the_backend_is_found_by_name() -> None:
    assert "ggpass" in torch._dynamo.list_backends(exclude_tags=())


@pytest.mark.parametrize(
    ("inner", "target"), [("inductor", "rf8-cpu"), *(("eager", f"{name}-cpu") for name in FORMATS)]
)
@torch.no_grad()
def test_same_as_the_lowered_module(inner: str, target: str) -> None:
    model, ids = Net().eval(), torch.randint(0, 50, (2, 7))
    reports: list[Report] = []
    got = compiled(model, target=target, inner=inner, report=reports.append)(ids)
    # Merged and apart, the float32 sums of 16 products may differ in order.
    torch.testing.assert_close(got, ggpass.compile(model, target=target)(ids), rtol=0, atol=1e-4)
    assert reports[0].lowered_share == 1.0
    assert {c.name for c in reports[0].changes} == {
        "embed.weight = head.weight",
        *(f"{n}.weight" for n in ("conv", "q", "k", "v")),
        "q.weight + v.weight + k.weight",
    }


@torch.no_grad()
def test_three_layers_of_one_class_give_three_right_answers() -> None:
    x = torch.randn(3, 8)
    layers = [nn.Linear(8, 8) for _ in range(3)]
    fast = [compiled(layer) for layer in layers]
    for _ in range(2):
        for layer, quick in zip(layers, fast):
            torch.testing.assert_close(quick(x), ggpass.compile(layer, target="rf8-cpu")(x), rtol=0, atol=1e-5)


@torch.no_grad()
def test_load_state_dict_and_edits_after_compiling_are_honoured() -> None:
    layer, other, x = nn.Linear(8, 8), nn.Linear(8, 8), torch.randn(3, 8)
    fast = compiled(layer)
    fast(x)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(fast(x), ggpass.compile(other, target="rf8-cpu")(x), rtol=0, atol=1e-5)
    layer.weight.mul_(3.0)
    torch.testing.assert_close(fast(x), ggpass.compile(layer, target="rf8-cpu")(x), rtol=0, atol=1e-5)
    layer.weight.data = torch.randn(8, 8)
    torch.testing.assert_close(fast(x), ggpass.compile(layer, target="rf8-cpu")(x), rtol=0, atol=1e-5)


@torch.no_grad()
def test_schemes_do_not_share_codes_and_the_inner_backend_is_the_one_named() -> None:
    layer, x, called = nn.Linear(8, 8), torch.randn(3, 8), list[int]()

    def inner(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        called.append(len(inputs))
        assert not any(isinstance(i, torch.Tensor) and i.shape == (8, 8) and i.is_floating_point() for i in inputs)
        return module

    for scheme in (ggpass.Scheme(), ggpass.Scheme("tensor"), ggpass.Scheme(rounding="paper")):
        torch._dynamo.reset()
        expected = ggpass.compile(layer, target="rf8-cpu", scheme=scheme)(x)
        torch.testing.assert_close(compiled(layer, scheme=scheme, inner=inner)(x), expected, rtol=0, atol=1e-5)
    assert len(called) == 3


@torch.no_grad()
def test_ten_lengths_cause_no_more_than_two_compilations() -> None:
    model, reports = Net().eval(), list[Report]()
    fast = compiled(model, report=reports.append)
    lowered = ggpass.compile(model, target="rf8-cpu")
    for length in range(3, 13):
        ids = torch.randint(0, 50, (2, length))
        torch.testing.assert_close(fast(ids), lowered(ids), rtol=0, atol=1e-4)
    assert len(reports) <= 2


@torch.no_grad()
def test_a_module_that_was_lowered_first_is_merged_and_keeps_no_floats() -> None:
    model, ids, reports = Net().eval(), torch.randint(0, 50, (2, 7)), list[Report]()
    lowered = ggpass.compile(model, target="rf8-cpu")
    got = compiled(lowered, report=reports.append)(ids)
    torch.testing.assert_close(got, lowered(ids), rtol=0, atol=1e-4)
    assert [c.name for c in reports[0].changes] == ["q + v + k"]


@torch.no_grad()
def test_codes_die_with_their_weights() -> None:
    gc.collect()
    before = len(CACHE)
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    fast = compiled(layer)
    fast(x)
    assert len(CACHE) == before + 1
    del layer, fast
    torch._dynamo.reset()
    gc.collect()
    assert len(CACHE) == before


def test_trainable_use_is_refused_with_the_reason() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    with pytest.raises(Exception, match=r"'weight' is trainable.*no_grad\(\).*requires_grad_\(False\)"):
        compiled(layer)(x)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(layer)(x), ggpass.compile(layer, target="rf8-cpu")(x), rtol=0, atol=1e-5)
    torch._dynamo.reset()
    layer.requires_grad_(False)
    x.requires_grad_(True)
    compiled(layer)(x).sum().backward()
    assert x.grad is not None


def test_options_are_checked_and_patterns_honoured() -> None:
    with pytest.raises(InputError, match=r"no option fast; it has target"):
        ggpass_backend(torch.fx.symbolic_trace(nn.Linear(2, 2)), [], options={"fast": True})
    model, ids, reports = Net().eval(), torch.randint(0, 50, (2, 7)), list[Report]()
    with torch.no_grad():
        compiled(model, skip="q", report=reports.append)(ids)
    assert {s.name: s.reason for s in reports[0].skips if s.matrix} == {"q.weight": "matches skip='q'"}


def test_inference_tensors_are_refused_with_the_reason() -> None:
    with torch.inference_mode():
        layer = nn.Linear(8, 8)
        with pytest.raises(Exception, match="outside inference_mode"):
            compiled(layer)(torch.randn(3, 8))


def test_parameter_names() -> None:
    assert parameter_name("L['self']._modules['a']._modules['0']._parameters['weight']") == "a.0.weight"
    assert parameter_name("L['x']") == "L['x']"
