"""DeepShapePull: the node's gradient is that of the explicit loss; it survives checks, training and compilers."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import ggpass
from ggpass import FormatError, Program, WeightError
from ggpass.ggd import GGD
from ggpass.passes import DeepShapePull
from ggpass.passes.deepshape.pull import PullState, pull_node, target_quantiles


def pull_loss(weight: Tensor, target: GGD) -> Tensor:
    """R = ½·mean_i (w_(i) − F⁻¹((i − ½)/n))², the loss with the node's gradient, written out."""
    ordered = weight.flatten().sort().values
    return (ordered - target_quantiles(target, len(ordered)).to(ordered)).square().mean() / 2


class Net(nn.Module):
    """Two layers, the second one's weight used twice and known by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 12, bias=False)
        self.third.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def training_program(model: nn.Module, *args: Tensor) -> Program:
    return Program(torch.export.export(model.train(), args).module(check_guards=False))


def explicit_gradients(model: Net, pull: DeepShapePull, x: Tensor, targets: dict[str, GGD]) -> list[Tensor]:
    loss = model(x).square().mean()
    for name, target in targets.items():
        loss = loss + pull.strength * pull_loss(model.get_parameter(name), target)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def targets_of(pull: DeepShapePull, model: nn.Module) -> dict[str, GGD]:
    return {n: GGD(float(s["values"][1]), float(s["values"][2])) for n, s in pull.state_dict(model).items()}


@pytest.mark.parametrize("n", [1, 2, 7, 100, 40001])
def test_quantiles_are_those_of_the_target(n: int) -> None:
    target = GGD(0.9, 0.3)
    p = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert (target_quantiles(target, n) - target.quantile(p)).abs().max() <= 1e-5 * target.std
    assert torch.equal(target_quantiles(target, n), -target_quantiles(target, n).flip(0))


def test_the_node_passes_a_gradient_check_against_the_explicit_loss() -> None:
    torch.manual_seed(0)
    weight = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    target, strength = GGD(0.8, 0.5), 3.0
    state = PullState.of(weight, strength, target, 1)
    sent = torch.randn(9, 5, dtype=torch.float64)
    got = torch.autograd.grad(pull_node(weight, state.anchor, state.calls, state.values), weight, sent)[0]
    # By autograd of the sorted form, and by differences of the loss itself: the loss is quadratic between ties, so
    # that central differences err by rounding only, 2^-53·loss/h.
    by_autograd = sent + strength * torch.autograd.grad(pull_loss(weight, target), weight)[0]
    torch.testing.assert_close(got, by_autograd, rtol=1e-13, atol=1e-15)
    h = 1e-6
    for index in [(0, 0), (3, 2), (8, 4)]:
        shifted = [weight.detach().clone(), weight.detach().clone()]
        shifted[0][index] += h
        shifted[1][index] -= h
        slope = (pull_loss(shifted[0], target) - pull_loss(shifted[1], target)) / (2 * h)
        assert abs(float(slope * strength + sent[index] - got[index])) < 1e-8


def test_the_graph_has_the_gradients_of_the_loss_with_the_extra_term() -> None:
    torch.manual_seed(1)
    model, x = Net().double(), torch.randn(4, 8, dtype=torch.float64)
    program = training_program(model, x)
    pull = DeepShapePull(strength=40.0, every=1)
    report = pull(program)
    program.check()
    targets = targets_of(pull, model)
    assert set(targets) == {"first.weight", "second.weight"}  # tied: once
    assert [(s.name, s.reason[:3]) for s in report.skips] == [("first.bias", "1-D"), ("second.bias", "1-D")]
    assert torch.equal(program(x), model(x))
    want = explicit_gradients(model, pull, x, targets)
    got = torch.autograd.grad(program(x).square().mean(), list(model.parameters()))
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-14)
    pull.set_strength(model, 0.0)
    plain = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    for g, w in zip(torch.autograd.grad(program(x).square().mean(), list(model.parameters())), plain):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_the_node_survives_compilers(backend: str) -> None:
    torch.manual_seed(2)
    torch._dynamo.reset()
    model, x = Net().double(), torch.randn(4, 8, dtype=torch.float64)
    program = training_program(model, x)
    pull = DeepShapePull(strength=40.0, every=2)
    pull(program)
    program.check()
    compiled = torch.compile(program.graph_module, backend=backend, fullgraph=True)
    targets = targets_of(pull, model)
    for _ in range(2):  # the second call finds the anchors that the first one sorted
        want = explicit_gradients(model, pull, x, targets)
        got = torch.autograd.grad(compiled(x).square().mean(), list(model.parameters()))
        for g, w in zip(got, want):
            torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-13)
    assert {int(s["calls"]) for s in pull.state_dict(model).values()} == {2}


def test_training_draws_the_quantiles_to_the_target_and_ranks_refresh_every_kth_call() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(40, 50, bias=False))
    nn.init.normal_(model[0].weight, std=0.1)
    x = torch.zeros(1, 40)
    program = training_program(model, x)
    pull = DeepShapePull(strength=2000.0, shape_ratio=0.5, every=5)
    pull(program)
    program.check()
    target = targets_of(pull, model)["0.weight"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    anchors = []
    for _ in range(12):
        optimizer.zero_grad()
        program(x).sum().backward()
        anchors.append(pull.state_dict(model)["0.weight"]["anchor"])
        optimizer.step()
        with torch.no_grad():
            model[0].weight.add_(torch.randn(50, 40), alpha=0.02)  # so that ranks change
    fresh = [not torch.equal(a, b) for a, b in itertools.pairwise(anchors)]
    assert [i + 1 for i, new in enumerate(fresh) if new] == [5, 10]
    for _ in range(20):
        optimizer.zero_grad()
        program(x).sum().backward()
        optimizer.step()
    # Plain descent at η·s/n = 0.2 leaves 0.8^15 of the distance after the last sort.
    assert math.sqrt(2 * float(pull_loss(model[0].weight.detach(), target))) < 0.05 * target.std
    assert target.std == pytest.approx(0.1, rel=0.1)


def test_two_forwards_before_a_backward_are_no_error_and_no_grad_sorts_nothing() -> None:
    torch.manual_seed(4)
    model, x = Net(), torch.randn(4, 8)
    program = training_program(model, x)
    pull = DeepShapePull(strength=1.0, every=1)
    pull(program)
    program.check()
    with torch.no_grad():
        program(x)
    assert {int(s["calls"]) for s in pull.state_dict(model).values()} == {0}
    (program(x) + program(2 * x)).sum().backward()
    assert {int(s["calls"]) for s in pull.state_dict(model).values()} == {2}


def test_prepare_takes_it_and_a_second_trace_keeps_target_and_state() -> None:
    torch.manual_seed(5)
    model, x = Net().double(), torch.randn(4, 8, dtype=torch.float64)
    pull = DeepShapePull(strength=40.0, every=1)
    prepared = ggpass.prepare(model, (x,), passes=[pull])
    targets = targets_of(pull, model)
    with torch.no_grad():
        model.first.weight.mul_(2)
    prepared.to(torch.float64)  # drops the graphs
    got = torch.autograd.grad(prepared(x).square().mean(), list(model.parameters()))
    assert targets_of(pull, model) == targets
    for g, w in zip(got, explicit_gradients(model, pull, x, targets)):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-14)


def test_state_is_saved_and_loaded() -> None:
    torch.manual_seed(6)
    x, pull = torch.randn(4, 8), DeepShapePull(strength=1.0)
    model, other = Net(), Net()
    for m in (model, other):
        pull(training_program(m, x))
    pull.set_strength(model, 7.0)
    pull.load_state_dict(other, pull.state_dict(model))
    saved, loaded = pull.state_dict(model), pull.state_dict(other)
    assert all(torch.equal(saved[n][k], loaded[n][k]) for n in saved for k in saved[n])
    with pytest.raises(WeightError, match=r"differ in second\.weight"):
        pull.load_state_dict(other, {"first.weight": saved["first.weight"]})
    with pytest.raises(WeightError, match="pulls no weight of the model"):
        pull.state_dict(Net())


def test_half_weights_get_a_gradient_of_their_dtype_rounded_once() -> None:
    torch.manual_seed(7)
    weight = torch.randn(64, dtype=torch.bfloat16, requires_grad=True)
    state = PullState.of(weight, 5.0, GGD(1.0, 0.4), 1)
    sent = torch.randn(64, dtype=torch.bfloat16)
    got = torch.autograd.grad(pull_node(weight, state.anchor, state.calls, state.values), weight, sent)[0]
    want = sent.double() + 5 / 64 * (weight.detach().double() - state.anchor.double())
    assert got.dtype == torch.bfloat16
    # Half a unit in the last place of bfloat16's 8 digits, and float32's own rounding.
    assert bool(((got.double() - want).abs() <= 2.0**-8 * want.abs() * 1.01 + 1e-6).all())


def test_what_is_not_pulled_is_reported_and_settings_are_checked() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 8))
    nn.init.zeros_(model[1].weight)
    model[0].weight.requires_grad_(False)
    program = training_program(model, torch.randn(2, 8))
    reasons = {s.name: s.reason for s in DeepShapePull(strength=1.0, skip="3")(program).skips}
    assert reasons["0.weight"] == "is frozen (requires_grad is False)"
    assert reasons["1.weight"] == "all of its weights are zero"
    assert reasons["2.weight"].startswith("has 16 weights, too few")
    assert reasons["3.weight"] == "matches skip='3'"
    with pytest.raises(WeightError, match="nothere"):
        DeepShapePull(strength=1.0, only="nothere")(program)
    for bad in ({"strength": -1.0}, {"strength": 1.0, "every": 0}, {"strength": 1.0, "mode": "x"}):
        with pytest.raises(FormatError):
            DeepShapePull(**bad)
    with torch.no_grad():
        model[3].weight[0, 0] = math.nan
    fresh = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        fresh[0].weight[0, 0] = math.nan
    with pytest.raises(WeightError, match=r"'0\.weight' holds NaN"):
        DeepShapePull(strength=1.0)(training_program(fresh, torch.randn(2, 8)))
