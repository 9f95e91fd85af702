"""init_ and GGInit: the values that are drawn, whose they are, and what must not change."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaln
from scipy.stats import gennorm, kstest
from torch import nn

import ggpass
from ggpass import InputError, Program, Report, WeightError
from ggpass.passes import GGInit


def kurtosis(nu: float) -> float:
    """E[x⁴]/E[x²]² of a generalized Gaussian."""
    return math.exp(gammaln(5 / nu) + gammaln(1 / nu) - 2 * gammaln(3 / nu))


def assert_variance(weight: torch.Tensor, expected: float, nu: float) -> None:
    """The mean square is within 5 of its own deviations, √((κ − 1)/N), of the variance of the distribution."""
    power = weight.detach().double().square().mean().item()
    assert abs(power / expected - 1) <= 5 * math.sqrt((kurtosis(nu) - 1) / weight.numel()), (power, expected)


def assert_drawn_from(weight: torch.Tensor, nu: float, variance: float) -> None:
    """Kolmogorov and Smirnov accept ν and α, and would reject a scale off by a quarter."""
    alpha = math.sqrt(variance * math.exp(gammaln(1 / nu) - gammaln(3 / nu)))
    values = weight.detach().double().flatten().numpy()
    assert kstest(values, gennorm(nu, scale=alpha).cdf).pvalue > 1e-4
    assert kstest(values, gennorm(nu, scale=1.25 * alpha).cdf).pvalue < 1e-4


def words(report: Report, name: str) -> str:
    """What the report says was done with a weight."""
    return next(change.what for change in report.changes if name in change.name.split(" = "))


def reason(report: Report, name: str) -> str:
    return next(skip.reason for skip in report.skips if skip.name == name)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 5)
        self.norm = nn.BatchNorm2d(64)
        self.head = nn.Linear(64, 500)
        self.table = nn.Embedding(300, 500, padding_idx=7)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3))) + self.table(ids).mean(1)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 8, 8), torch.zeros(2, 3, dtype=torch.long)


@settings(max_examples=4, deadline=None)
@given(nu=st.floats(0.2, 8), seed=st.integers())
def test_variance_is_gain_over_fan_whatever_the_shape(nu: float, seed: int) -> None:
    net = Net()
    ggpass.init_(net, inputs(), shape=nu, seed=seed)
    assert_variance(net.conv.weight, 2 / 75, nu)
    assert_variance(net.head.weight, 1 / 64, nu)


@pytest.mark.parametrize("nu", [0.5, 1.0, 1.5, 2.0, 4.0])
def test_values_are_generalized_gaussian(nu: float) -> None:
    net = Net()
    ggpass.init_(net, inputs(), shape=nu)
    assert_drawn_from(net.head.weight, nu, 1 / 64)
    assert_drawn_from(net.conv.weight, nu, 2 / 75)
    drawn = torch.cat([net.table.weight[:7], net.table.weight[8:]])
    assert_drawn_from(drawn, nu, 1.0)


def test_shape_two_and_gain_two_is_he_normal() -> None:
    """ν = 2 before a ReLU: what kaiming_normal_ draws, by its own formula std = √2/√fan_in."""
    net = Net()
    ggpass.init_(net, inputs(), shape=2)
    he = nn.init.kaiming_normal_(torch.empty(64, 3, 5, 5), nonlinearity="relu", generator=torch.Generator())
    assert_drawn_from(net.conv.weight, 2.0, 2 / 75)
    assert kstest(net.conv.weight.detach().flatten().numpy(), he.flatten().numpy()).pvalue > 1e-4


def test_norms_biases_buffers_and_padding_stay_bit_for_bit() -> None:
    net = Net()
    for name, tensor in net.state_dict().items():
        if tensor.dim() == 1:
            torch.nn.init.normal_(tensor) if name != "norm.running_var" else tensor.uniform_(0.5, 2)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    parameters = dict(net.named_parameters())
    report = ggpass.init_(net, inputs())
    changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"conv.weight", "head.weight", "table.weight"}
    assert torch.equal(net.table.weight[7], torch.zeros(500))
    assert (net.table.weight[:7] != before["table.weight"][:7]).all()
    assert all(parameters[name] is p and p.requires_grad for name, p in net.named_parameters())
    assert "1-D" in reason(report, "norm.weight")


def test_a_model_and_its_program_get_the_same_values_and_a_program_leaves_the_model_alone() -> None:
    net, args = Net(), inputs()
    program = Program.trace(net, args)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    GGInit(shape=1.3, seed=4)(program)
    program.check()
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert program.weight("head.weight").requires_grad
    ggpass.init_(net, args, shape=1.3, seed=4)
    for name in ("conv.weight", "head.weight", "table.weight"):
        assert torch.equal(program.weight(name), net.get_parameter(name))
    GGInit(shape=1.3, seed=5, inplace=True)(Program.trace(net, args))
    assert not torch.equal(program.weight("head.weight"), net.head.weight)


def test_a_training_graph_is_drawn_in_the_callers_own_parameters() -> None:
    net, other, args = Net(), Net(), inputs()
    other.load_state_dict(net.state_dict())
    parameters = dict(net.named_parameters())
    program = Program(Program.trace(net, args).graph_module, net, training=True)
    GGInit(shape=1.3, seed=4, skip="conv")(program)
    ggpass.init_(other, args, shape=1.3, seed=4, skip="conv")
    for name, parameter in net.named_parameters():
        assert parameters[name] is parameter
        assert parameter.requires_grad
        assert torch.equal(parameter, other.get_parameter(name))


def test_a_weight_depends_on_the_seed_and_its_own_name_alone() -> None:
    """Another order, other weights beside it, another state of torch's generator: the same values."""
    one = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    other = nn.ModuleDict({"c": nn.Conv2d(2, 2, 3), "b": nn.Linear(8, 8), "a": nn.Linear(8, 8)})
    ggpass.init_(one, seed=3)
    torch.randn(17)
    ggpass.init_(other, seed=3)
    assert torch.equal(one["a"].weight, other["a"].weight)
    assert torch.equal(one["b"].weight, other["b"].weight)
    assert not torch.equal(one["a"].weight, one["b"].weight)
    ggpass.init_(other, seed=4)
    assert not torch.equal(one["a"].weight, other["a"].weight)


class Tied(nn.Module):
    """A table that is also the head, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(200, 64)
        self.head = nn.Linear(64, 200, bias=False)
        nn.init.normal_(self.table.weight, std=0.02)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids))


@pytest.mark.parametrize("ids", [None, torch.arange(4)], ids=["module", "graph"])
def test_a_tied_table_stays_tied_and_keeps_its_own_scale(ids: torch.Tensor | None) -> None:
    model = Tied()
    report = ggpass.init_(model, ids)
    assert model.head.weight is model.table.weight
    assert len(report.changes) == 1
    assert report.changes[0].name == "head.weight = table.weight"
    assert "tied with a linear: the embedding's rule" in report.changes[0].what
    assert_variance(model.table.weight, 0.02**2, 2)


def test_a_tied_table_stays_tied_in_a_program() -> None:
    program = Program.trace(Tied(), (torch.arange(4),))
    GGInit()(program)
    assert program.weight("head.weight") is program.weight("table.weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_stays_and_narrow_ones_are_rounded_once(dtype: torch.dtype) -> None:
    wide, narrow = nn.Linear(32, 32), nn.Linear(32, 32).to(dtype)
    ggpass.init_(wide, shape=1.0)
    ggpass.init_(narrow, shape=1.0)
    assert narrow.weight.dtype is dtype
    assert torch.equal(narrow.weight, wide.weight.to(dtype))


def test_without_inputs_the_gain_is_one_and_the_report_says_so() -> None:
    net = nn.Sequential(nn.Linear(100, 400), nn.ReLU(), nn.Linear(400, 10))
    report = ggpass.init_(net)
    assert any("no example inputs: ξ = 1" in note for note in report.notes)
    assert_variance(net[0].weight, 1 / 100, 2)
    traced = ggpass.init_(net, torch.randn(1, 100))
    assert not traced.notes
    assert_variance(net[0].weight, 2 / 100, 2)


class Untraceable(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum().item() > 0 else x


def test_a_failed_trace_is_said_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    report = ggpass.init_(nn.Sequential(Untraceable(64, 64), nn.ReLU()), torch.randn(1, 64))
    assert len(report.changes) == 1
    assert any("could not trace" in note and "ξ = 1 for every weight" in note for note in report.notes)
    assert any("could not trace" in record.getMessage() for record in caplog.records)


def test_what_is_zero_frozen_or_without_a_rule_stays_with_its_reason() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.LSTM(8, 8), nn.Bilinear(4, 4, 4), nn.Linear(4, 0))
    nn.init.zeros_(model[0].weight)
    model[1].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = ggpass.init_(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert "all zero" in reason(report, "0.weight")
    assert "frozen" in reason(report, "1.weight")
    assert "give example inputs" in reason(report, "2.weight_ih_l0")
    assert "Bilinear" in reason(report, "3.weight")
    assert "is empty" in reason(report, "4.weight")


def test_only_and_skip_choose_and_patterns_without_a_match_raise() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    report = ggpass.init_(model, only=["0", "1.*"], skip="1")
    assert [change.name for change in report.changes] == ["0.weight"]
    assert "skip='1'" in reason(report, "1.weight")
    assert "none of only=" in reason(report, "2.weight")
    for options in ({"only": "nothing"}, {"skip": ["0", "no.such"]}, {"shape": {"0": 1.0, "no*": 2.0}}):
        with pytest.raises(WeightError, match=r"'no.*' matches no weight"):
            ggpass.init_(model, **options)


def test_shapes_by_pattern_the_first_match_counts() -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100), nn.Conv1d(50, 50, 3))
    report = ggpass.init_(model, shape={"1": 0.7, "*.weight": 1.2})
    assert_drawn_from(model[0].weight, 1.2, 1 / 100)
    assert_drawn_from(model[1].weight, 0.7, 1 / 100)
    assert "ν = 0.7 (shape['1'])" in words(report, "1.weight")
    assert "no pattern matches: auto" in words(ggpass.init_(model, shape={"1": 0.7}), "0.weight")


@pytest.mark.parametrize("shape", [0, -1.0, 0.1, 9, float("nan"), "lik:x", "like:", True, None, {"0": "2"}])
def test_shapes_that_are_none_are_refused(shape: object) -> None:
    with pytest.raises(WeightError, match="ν"):
        ggpass.init_(nn.Sequential(nn.Linear(2, 2)), shape=shape)


def test_what_cannot_be_drawn_is_refused_with_the_reason() -> None:
    with pytest.raises(WeightError, match="meta device"):
        ggpass.init_(nn.Linear(4, 4, device="meta"))
    broken = nn.Linear(4, 4)
    with torch.no_grad():
        broken.weight[0, 0] = float("nan")
    with pytest.raises(WeightError, match="NaN"):
        ggpass.init_(broken)
    assert not ggpass.init_(broken, skip="weight").changes
    with pytest.raises(InputError, match="Module"):
        ggpass.init_(torch.zeros(2))
    with pytest.raises(InputError, match="seed"):
        ggpass.init_(nn.Linear(4, 4), seed=1.5)


def test_a_lowered_model_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32))
    fast = ggpass.compile(model, target="rf8-cpu", only="0")
    before = fast[2].weight.detach().clone()
    for args in (None, (torch.randn(2, 64),)):
        with pytest.raises(InputError, match=r"'0' is lowered.*init_ the float model"):
            ggpass.init_(fast, args)
    assert torch.equal(fast[2].weight, before)
