"""The rate node: its backward is the gradient of λ·ΣR, by autograd in float64, and its forward is the weight itself."""

import gc
import math

import pytest
import torch
from support.closeness import assert_within, store_bound
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ggpass
from ggpass.ggd import smooth_bits
from ggpass.graph.program import Program
from ggpass.passes import BackSlash
from ggpass.passes.backslash.node import _STATES, node_state, node_values, rate_node, ready_nodes, take_carried

U = 2.0**-53


def values_of(strength: float, shape: float, scale: float, epsilon: float, loss_scale: float = 1.0) -> Tensor:
    """(ln τ, ν, ε, s) with τ = λν/(α^ν ln 2)."""
    log_factor = math.log(strength * shape / math.log(2)) - shape * math.log(scale)
    return node_values(log_factor, shape, epsilon, loss_scale)


def slope_bound(weight: Tensor, strength: float, shape: float, scale: float, epsilon: float, unit: float) -> Tensor:
    """The rounding of exp(ln τ + (ν−1)·ln(|w|+ε)) and of a power, each a few units of the terms in the exponent.

    An error of e in an exponent is a relative error of e in the result. The terms are ln τ (four roundings), the
    logarithm (one, and the sum in it one) and its product; the reference has as many. 16 covers both.
    """
    magnitude = (weight.double().abs() + epsilon).clamp(min=1e-300)
    slope = strength * shape / (scale**shape * math.log(2)) * magnitude ** (shape - 1)
    terms = abs(math.log(strength)) + abs(shape * math.log(scale)) + ((shape - 1) * magnitude.log()).abs() + 4
    return 16 * unit * terms * slope


def loss_term(weight: Tensor, strength: float, shape: float, scale: float, epsilon: float) -> Tensor:
    """The gradient of λ·ΣR by autograd, through the rate's own formula."""
    leaf = weight.detach().double().requires_grad_()
    (strength * smooth_bits(leaf, shape, scale, 1.0, epsilon).sum()).backward()
    assert leaf.grad is not None
    return leaf.grad


PARAMETERS = {
    "strength": st.floats(1e-8, 10.0),
    "shape": st.floats(0.3, 3.0),
    "scale": st.floats(1e-3, 10.0),
    "epsilon": st.floats(1e-6, 1.0),
}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), **PARAMETERS)
def test_the_node_gives_the_gradient_of_the_loss_term(
    seed: int, strength: float, shape: float, scale: float, epsilon: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 7, generator=generator, dtype=torch.float64) * scale
    incoming = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    leaf = weight.clone().requires_grad_()
    rate_node(leaf, values_of(strength, shape, scale, epsilon)).backward(incoming)
    assert leaf.grad is not None
    expected = incoming + loss_term(weight, strength, shape, scale, epsilon)
    bound = slope_bound(weight, strength, shape, scale, epsilon, U) + 2 * U * expected.abs()
    assert_within(leaf.grad, expected, bound)


@pytest.mark.parametrize(("shape", "power"), [(1.0, 0), (2.0, 1)])
def test_shapes_1_and_2_are_l1_and_l2_at_epsilon_0(shape: float, power: int) -> None:
    weight = torch.tensor([-2.0, -0.5, 0.0, 1e-9, 3.0], dtype=torch.float64, requires_grad=True)
    strength, scale = 0.3, 0.7
    rate_node(weight, values_of(strength, shape, scale, 0.0)).sum().backward()
    assert weight.grad is not None
    plain = strength * shape / (scale**shape * math.log(2)) * weight.detach().sign() * weight.detach().abs() ** power
    assert_within(weight.grad, 1.0 + plain, 200 * U * plain.abs() + 2 * U)


@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
def test_an_exact_zero_gets_no_slope_whatever_the_shape(epsilon: float) -> None:
    for shape in (0.3, 1.0, 2.5):
        weight = torch.tensor([0.0, -0.0, 0.1], requires_grad=True)
        rate_node(weight, values_of(1.0, shape, 0.5, epsilon)).sum().backward()
        assert weight.grad is not None
        assert weight.grad[:2].tolist() == [1.0, 1.0]
        assert 1.0 < float(weight.grad[2]) < math.inf


def test_the_forward_is_the_weight_itself() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    out = rate_node(weight, node_values())
    assert out.data_ptr() == weight.data_ptr()
    assert torch.equal(out, weight)
    assert out is not weight


def test_idle_and_frozen_and_empty_weights() -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    incoming = torch.randn(4, 3)
    rate_node(weight, node_values()).backward(incoming)
    assert torch.equal(weight.grad, incoming)  # type: ignore[arg-type]
    assert not rate_node(torch.randn(3, 3), values_of(1.0, 0.7, 0.1, 0.1)).requires_grad
    empty = torch.randn(0, 3, requires_grad=True)
    rate_node(empty, values_of(1.0, 0.7, 0.1, 0.1)).sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_weights_are_added_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    weight = (torch.randn(64, 8) * 0.05).to(dtype).requires_grad_()
    incoming = torch.randn(64, 8).to(dtype)
    parameters = {"strength": 0.01, "shape": 0.6, "scale": 0.05, "epsilon": 0.01}
    rate_node(weight, values_of(**parameters)).backward(incoming)
    assert weight.grad is not None
    assert weight.grad.dtype == dtype
    slope = loss_term(weight, **parameters)
    expected = incoming.double() + slope
    bound = slope_bound(weight.detach(), **parameters, unit=2.0**-24) + 2.0**-24 * expected.abs()
    assert_within(weight.grad, expected, store_bound(expected, bound, dtype))
    # What two roundings of bfloat16 would lose is outside of the bound: the slope is a hundredth of the gradient.
    assert float(slope.abs().mean()) > 0.05


def test_the_loss_scale_multiplies_the_slope_alone() -> None:
    weight = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    slopes = []
    for scale in (1.0, 1024.0):
        weight.grad = None
        rate_node(weight, values_of(0.1, 0.7, 0.5, 0.01, scale)).backward(torch.zeros_like(weight))
        slopes.append(weight.grad)
    assert torch.equal(slopes[0] * 1024, slopes[1])  # type: ignore[operator]


def test_a_forward_takes_its_values_with_it() -> None:
    weight, values = torch.randn(3, 3, requires_grad=True), node_values()
    rate_node(weight, values).sum()
    values.copy_(values_of(0.1, 1.0, 1.0, 0.0))
    out = rate_node(weight, values).sum()
    values.copy_(node_values())
    out.backward()
    assert weight.grad is not None
    assert not torch.equal(weight.grad, torch.ones(3, 3))


def test_a_gradient_penalty_gets_the_slope_once_and_second_order_by_weights_is_refused() -> None:
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    parameters = {"strength": 0.5, "shape": 0.7, "scale": 1.0, "epsilon": 0.05}

    def penalized(used: Tensor) -> Tensor:
        task = (x @ used).tanh().sum()
        return task + torch.autograd.grad(task, x, create_graph=True)[0].square().sum()

    (expected,) = torch.autograd.grad(penalized(weight), weight)
    expected += loss_term(weight, **parameters)
    (got,) = torch.autograd.grad(penalized(rate_node(weight, values_of(**parameters))), weight)
    bound = slope_bound(weight.detach(), **parameters, unit=U) + 4 * U * expected.abs()
    assert_within(got, expected, bound)
    (first,) = torch.autograd.grad(rate_node(weight, values_of(**parameters)).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        first.sum().backward()


def test_a_sparse_gradient_passes_as_it_is() -> None:
    table = nn.Parameter(torch.randn(10, 3))
    out = nn.functional.embedding(torch.tensor([1, 1, 4]), rate_node(table, values_of(1.0, 0.7, 0.1, 0.1)), sparse=True)
    out.sum().backward()
    assert table.grad is not None
    assert table.grad.is_sparse
    assert table.grad.to_dense().sum() == 9


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.frozen = nn.Linear(6, 6)
        self.head.weight = self.embed.weight
        self.frozen.weight.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.inner(self.inner(self.embed(ids))) + self.frozen(self.embed(ids))
        return self.head(x)


def test_a_weight_with_several_uses_and_names_gets_one_node() -> None:
    model, ids = Tied().double().train(), torch.randint(0, 11, (5,))
    program = Program.trace(model, (ids,))
    report = BackSlash(mode="coupled", strength=0.2)(program)
    program.check()
    assert {change.name for change in report.changes} == {"embed.weight", "inner.weight"}
    assert any("frozen" in skip.reason for skip in report.skips)
    assert len(list(program.calls(rate_node))) == 2
    parameters = {"strength": 0.2, "shape": 0.8, "scale": 0.3, "epsilon": 0.02}
    for weight in (model.embed.weight, model.inner.weight):
        node_state(weight).values.copy_(values_of(**parameters))
    program(ids).square().sum().backward()
    got = [weight.grad for weight in (model.embed.weight, model.inner.weight)]
    model.zero_grad()
    model(ids).square().sum().backward()
    for weight, gradient in zip((model.embed.weight, model.inner.weight), got):
        assert weight.grad is not None
        assert gradient is not None
        expected = weight.grad + loss_term(weight, **parameters)
        bound = slope_bound(weight.detach(), **parameters, unit=U) + 2 * U * expected.abs()
        assert_within(gradient, expected, bound)


def test_a_proximal_mode_inserts_no_node_and_says_so() -> None:
    program = Program.trace(Tied(), (torch.randint(0, 11, (5,)),))
    report = BackSlash(target_bits=2.0)(program)
    assert not report.changes
    assert any("attach" in note for note in report.notes)
    assert not list(program.calls(rate_node))


def test_patterns_choose_and_a_weight_that_the_graph_does_not_use_is_named() -> None:
    model = Tied()
    model.unused = nn.Linear(3, 3)
    program = Program.trace(model, (torch.randint(0, 11, (5,)),))
    report = BackSlash(mode="coupled", strength=0.2, skip=("inner",))(program)
    assert [change.name for change in report.changes] == ["embed.weight"]
    program = Program.trace(model, (torch.randint(0, 11, (5,)),))
    skipped = {s.name: s.reason for s in BackSlash(mode="coupled", strength=0.2)(program).skips}
    assert "inner.weight" not in skipped
    with pytest.raises(ggpass.WeightError, match="nosuch"):
        BackSlash(mode="coupled", strength=0.2, only=("nosuch",))(program)


def test_a_fed_node_is_told_from_an_idle_one_and_states_die_with_their_weights() -> None:
    model, idle = nn.Linear(4, 4), nn.Parameter(torch.randn(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gc.collect()
    before = len(_STATES)
    regularizer = BackSlash(mode="coupled", strength=0.2).attach(model, optimizer)
    for _ in range(2):
        values = [v.clone() for _ in range(2) for v in ready_nodes([model.weight, idle])]
        assert [bool(v[0] > -math.inf) for v in values] == [True, False, False, False], "the first forward takes it"
        assert not take_carried(model.weight), "no backward has come"
        (rate_node(model.weight, values[0]).sum() + rate_node(idle, values[1]).sum()).backward()
        assert take_carried(model.weight)
        assert not take_carried(model.weight)
        assert not take_carried(idle)
    regularizer.detach()
    assert node_state(model.weight).values[0] == -math.inf
    assert node_state(model.weight).feed is None
    del regularizer, optimizer, model, idle
    gc.collect()
    assert len(_STATES) <= before
