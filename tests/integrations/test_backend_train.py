"""torch.compile(model, backend="ggpass", options={"train": …}): gradients of the loss term, without recompiling."""

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.closeness import assert_within
from torch import Tensor, nn

import ggpass
from ggpass import InputError, Report
from ggpass.ggd import smooth_bits
from ggpass.integrations.dynamo.backend import ggpass_backend
from ggpass.integrations.dynamo.training import _default_inner, settings_of
from ggpass.passes import BackSlash
from ggpass.training import Schedule

U = 2.0**-53
FIXED = {"shape": 0.8, "scale": 0.3, "epsilon": 0.02}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.norm = nn.Embedding(10, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.inner(self.embed(ids)))))


class Broken(Net):
    """The same with a graph break in its middle."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.inner(self.embed(ids))
        torch._dynamo.graph_break()
        return self.head(torch.relu(self.norm(x)))


def compiled(model: nn.Module, train: Any, **options: Any) -> Any:
    fullgraph = options.pop("fullgraph", False)
    return torch.compile(
        model, backend="ggpass", fullgraph=fullgraph, options={"train": train, "inner": "aot_eager", **options}
    )


def term(model: nn.Module, strength: float) -> Tensor:
    weights = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    return strength * sum((smooth_bits(w, 0.8, 0.3, 1.0, 0.02).sum() for w in weights), torch.zeros(()))


def same_gradients(model: nn.Module, fast: Any, ids: Tensor, strength: float) -> None:
    """Those that a step gets are of eager training with the term: some hundred roundings of float64 below 64."""
    twin = copy.deepcopy(model)
    model.zero_grad()
    fast(ids).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    (twin(ids).square().mean() + term(twin, strength)).backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            assert_within(a.grad, b.grad, 300 * U * 64, name)


@pytest.mark.parametrize("kind", [Net, Broken])
def test_gradients_are_those_of_the_loss_term_at_any_batch_size(kind: type[Net]) -> None:
    model, reports = kind().double().train(), list[Report]()
    fast = compiled(model, {"strength": 0.1, **FIXED}, fullgraph=kind is Net, report=reports.append)
    for size in (8, 5, 3, 8, 7):
        same_gradients(model, fast, torch.randint(0, 10, (size,)), 0.1)
    graphs = 2 if kind is Broken else 1
    assert len(reports) <= 2 * graphs, "one graph for the first size, one for all others"
    assert {c.name for r in reports for c in r.changes} == {"embed.weight = head.weight", "inner.weight"}


def test_inductor_fuses_it_and_says_the_same() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    fast = torch.compile(model, backend="ggpass", options={"train": BackSlash(mode="coupled", strength=0.1, **FIXED)})
    same_gradients(model, fast, torch.randn(3, 4, dtype=torch.float64), 0.1)


def test_a_second_module_of_the_class_has_its_own_fits_and_strength() -> None:
    first, second, reports = nn.Linear(6, 6).double(), nn.Linear(6, 6).double(), list[Report]()
    with torch.no_grad():
        second.weight.mul_(30.0)
    settings = BackSlash(mode="coupled", strength=0.1)
    x = torch.zeros(1, 6, dtype=torch.float64)
    slopes = []
    for layer in (first, second, first):
        layer.zero_grad()
        compiled(layer, settings, report=reports.append)(x).sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.0).step()
        slopes.append(layer.weight.grad.clone())  # x = 0: nothing but the slope
    assert len(reports) == 1, "the second module of a class runs the first one's graph"
    assert torch.equal(slopes[0], slopes[2])
    # The slope in bits is that of w/α: weights 30 times as large have a slope 1/30 as large, but for ε.
    ratio = (slopes[0] / slopes[1]).abs().median()
    assert 15 < float(ratio) < 60


def test_an_attached_regularizer_moves_the_strength_without_recompiling() -> None:
    settings = BackSlash(
        mode="coupled", strength=0.05, refit_every=2, total_steps=8, schedule=Schedule(warm_up=2, tail=2)
    )
    model, reports = Net().double().train(), list[Report]()
    twin = copy.deepcopy(model)
    fast = compiled(model, settings, report=reports.append)
    mine, theirs = (torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, twin))
    regularizer, other = settings.attach(model, mine), settings.attach(twin, theirs)
    for _ in range(8):
        ids = torch.randint(0, 10, (8,))
        for run, optimizer in ((fast, mine), (twin, theirs)):
            optimizer.zero_grad()
            run(ids).square().mean().backward()
            optimizer.step()
    assert len(reports) == 1
    assert regularizer.steps == other.steps == 8
    for a, b in zip(model.parameters(), twin.parameters()):
        assert_within(a, b.detach(), 8 * 1000 * U * 16)


def test_without_gradients_the_inner_backend_or_the_target_takes_the_graph() -> None:
    model, ids, reports = Net().eval(), torch.randint(0, 10, (5,)), list[Report]()
    with torch.no_grad():
        assert torch.equal(compiled(model, {"strength": 0.1}, report=reports.append)(ids), model(ids))
        assert not reports
        torch._dynamo.reset()
        fast = compiled(model, {"strength": 0.1}, report=reports.append, target="rf8-cpu")
        torch.testing.assert_close(fast(ids), ggpass.compile(model, target="rf8-cpu")(ids), rtol=0, atol=1e-4)
        assert reports[0].lowered_share == 1.0
    model.requires_grad_(False)
    torch._dynamo.reset()
    assert torch.equal(compiled(model, {"strength": 0.1})(ids), model(ids))


def test_bfloat16_frozen_and_empty_weights() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 0)).bfloat16()
    model[1].requires_grad_(False)
    reports = list[Report]()
    fast = compiled(model, {"strength": 0.5}, report=reports.append)
    fast(torch.zeros(2, 6, dtype=torch.bfloat16)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert model[0].weight.grad is not None
    assert model[0].weight.grad.dtype == torch.bfloat16
    assert bool(model[0].weight.grad.isfinite().all())
    assert model[0].weight.grad.any()
    assert model[1].weight.grad is None
    assert {s.name: s.reason for s in reports[0].skips}["1.weight"].startswith("is frozen")


@pytest.mark.parametrize("kind", [Net, Broken])
@pytest.mark.parametrize("pattern", ["embed", "head.weight", "h*"])
def test_any_name_of_a_tied_weight_selects_it(kind: type[Net], pattern: str) -> None:
    reports = list[Report]()
    fast = compiled(kind().train(), {"strength": 0.1, "skip": pattern}, report=reports.append)
    fast(torch.randint(0, 10, (5,)))
    assert {c.name for r in reports for c in r.changes} == {"inner.weight"}
    assert {s.reason for r in reports for s in r.skips if s.name == "embed.weight"} == {f"matches skip={pattern!r}"}
    torch._dynamo.reset()
    reports.clear()
    fast = compiled(kind().train(), {"strength": 0.1, "only": pattern}, report=reports.append)
    fast(torch.randint(0, 10, (5,)))
    assert {c.name for r in reports for c in r.changes} == {"embed.weight = head.weight"}


@pytest.mark.parametrize("option", ["only", "skip"])
def test_a_pattern_that_matches_nothing_is_refused(option: str) -> None:
    fast = compiled(Net().train(), {"strength": 0.1, option: "typo"})
    with pytest.raises(Exception, match=f"{option}='typo' matches no weight of the model"):
        fast(torch.randint(0, 10, (5,)))


def test_a_plain_function_trains_the_weights_that_it_reads() -> None:
    model, reports = Net().double().train(), list[Report]()
    fast = torch.compile(
        lambda ids: model(ids),
        backend="ggpass",
        options={"train": {"strength": 0.1, **FIXED}, "inner": "aot_eager", "report": reports.append},
    )
    same_gradients(model, fast, torch.randint(0, 10, (5,)), 0.1)
    assert len({c.name for r in reports for c in r.changes}) == 2


def test_options_are_checked() -> None:
    graph = torch.fx.symbolic_trace(nn.Linear(2, 2))
    for train, what in (
        (3, "not int"),
        ({"strenght": 1.0}, "strenght"),
        (BackSlash(target_bits=2.0), "after the optimizer's step"),
        ({}, "exactly one of"),
    ):
        with pytest.raises(InputError, match=what):
            ggpass_backend(graph, [], options={"train": train})
    assert settings_of({"strength": 1.0}).mode == "coupled"


def test_without_a_compiler_the_graph_runs_unfused_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> str:
        raise torch._inductor.exc.InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    _default_inner.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "ggpass"):
            for width in (4, 5):
                model, reports = nn.Linear(width, width).double(), list[Report]()
                fast = torch.compile(
                    model,
                    backend="ggpass",
                    options={"train": {"strength": 0.1, **FIXED}, "report": reports.append},
                )
                same_gradients(model, fast, torch.randn(3, width, dtype=torch.float64), 0.1)
                assert any("aot_eager" in note for note in reports[0].notes)
        assert sum("aot_eager" in record.message for record in caplog.records) == 1
    finally:
        _default_inner.cache_clear()
