"""The slope is the gradient of λ·ΣR, by autograd in float64; the rate node marks a weight's edge and adds nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.closeness import assert_within
from torch import Tensor, nn

import ggpass
from ggpass.ggd import smooth_bits
from ggpass.graph.program import Program
from ggpass.passes import BackSlash
from ggpass.passes.backslash import rate_node
from ggpass.passes.backslash.proximal import Slope, add_slope_

U = 2.0**-53


def joined(weight: Tensor, incoming: Tensor, strength: float, shape: float, scale: float, epsilon: float) -> Tensor:
    """The gradient that comes in, with the slope: τ = λν/(α^ν ln 2)."""
    log_factor = math.log(strength * shape / math.log(2)) - shape * math.log(scale)
    gradient = incoming.clone()
    add_slope_([gradient], [weight.detach()], [Slope(log_factor, shape, epsilon)])
    return gradient


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
def test_the_slope_is_the_gradient_of_the_loss_term(
    seed: int, strength: float, shape: float, scale: float, epsilon: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 7, generator=generator, dtype=torch.float64) * scale
    incoming = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    expected = incoming + loss_term(weight, strength, shape, scale, epsilon)
    bound = slope_bound(weight, strength, shape, scale, epsilon, U) + 2 * U * expected.abs()
    assert_within(joined(weight, incoming, strength, shape, scale, epsilon), expected, bound)


@pytest.mark.parametrize(("shape", "power"), [(1.0, 0), (2.0, 1)])
def test_shapes_1_and_2_are_l1_and_l2_at_epsilon_0(shape: float, power: int) -> None:
    weight = torch.tensor([-2.0, -0.5, 0.0, 1e-9, 3.0], dtype=torch.float64)
    strength, scale = 0.3, 0.7
    plain = strength * shape / (scale**shape * math.log(2)) * weight.sign() * weight.abs() ** power
    got = joined(weight, torch.ones_like(weight), strength, shape, scale, 0.0)
    assert_within(got, 1.0 + plain, 200 * U * plain.abs() + 2 * U)


@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
def test_an_exact_zero_gets_no_slope_whatever_the_shape(epsilon: float) -> None:
    for shape in (0.3, 1.0, 2.5):
        got = joined(torch.tensor([0.0, -0.0, 0.1]), torch.ones(3), 1.0, shape, 0.5, epsilon)
        assert got[:2].tolist() == [1.0, 1.0]
        assert 1.0 < float(got[2]) < math.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_gradients_are_added_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    """Up or down at random: off by less than a spacing each, and right in the mean."""
    weight, incoming = (torch.randn(64, 8) * 0.05).to(dtype), torch.randn(64, 8).to(dtype)
    parameters = {"strength": 0.01, "shape": 0.6, "scale": 0.05, "epsilon": 0.01}
    got = joined(weight, incoming, **parameters)
    assert got.dtype == dtype
    slope = loss_term(weight, **parameters)
    expected = incoming.double() + slope
    spacing = torch.finfo(dtype).eps * expected.abs()  # at least that of the two neighbours
    bound = slope_bound(weight, **parameters, unit=2.0**-24) + spacing
    assert_within(got, expected, bound)
    # Noise of at most a spacing, of deviation a half: five deviations of the sum of 512.
    mean_slope = (weight.sign() * (got.double() - incoming.double())).mean()
    assert abs(float(mean_slope - slope.abs().mean())) < 5 * float(spacing.square().sum().sqrt()) / 2 / weight.numel()
    assert float(slope.abs().mean()) > 0.05


# The node.


def test_the_node_is_the_weight_itself_in_both_directions() -> None:
    weight, incoming = nn.Parameter(torch.randn(3, 4)), torch.randn(3, 4)
    out = rate_node(weight)
    assert out.data_ptr() == weight.data_ptr()
    assert out is not weight
    out.backward(incoming)
    assert torch.equal(weight.grad, incoming)  # type: ignore[arg-type]
    assert not rate_node(torch.randn(3, 3)).requires_grad
    empty = torch.randn(0, 3, requires_grad=True)
    rate_node(empty).sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 3)


def test_a_sparse_gradient_passes_as_it_is() -> None:
    table = nn.Parameter(torch.randn(10, 3))
    nn.functional.embedding(torch.tensor([1, 1, 4]), rate_node(table), sparse=True).sum().backward()
    assert table.grad is not None
    assert table.grad.is_sparse
    assert table.grad.to_dense().sum() == 9


def test_a_gradient_penalty_gets_the_slope_once_and_second_orders_pass() -> None:
    """Gradients of gradients by inputs and by weights are those without a node; a step adds the slope."""
    settings = BackSlash(mode="coupled", strength=0.5, shape=0.7, scale=1.0, epsilon=0.05)
    model = nn.Linear(4, 4, bias=False).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for by in (x, model.weight):

        def penalized(used: Tensor, by: Tensor = by) -> Tensor:
            task = (x @ used.T).tanh().sum()
            return task + torch.autograd.grad(task, by, create_graph=True)[0].square().sum()

        (expected,) = torch.autograd.grad(penalized(model.weight), model.weight)
        parameters = {"strength": 0.5, "shape": 0.7, "scale": 1.0, "epsilon": 0.05}
        expected += loss_term(model.weight, **parameters)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with settings.attach(model, optimizer):
            optimizer.zero_grad()
            penalized(rate_node(model.weight)).backward()
            optimizer.step()
        assert model.weight.grad is not None
        bound = slope_bound(model.weight.detach(), **parameters, unit=U) + 8 * U * expected.abs()
        assert_within(model.weight.grad, expected, bound)


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


def test_a_weight_with_several_uses_and_names_gets_one_node_and_one_slope() -> None:
    model, ids = Tied().double().train(), torch.randint(0, 11, (5,))
    program = Program.trace(model, (ids,))
    parameters = {"strength": 0.2, "shape": 0.8, "scale": 0.3, "epsilon": 0.02}
    coupled = BackSlash(mode="coupled", **parameters)
    report = coupled(program)
    program.check()
    assert {change.name for change in report.changes} == {"embed.weight", "inner.weight"}
    assert any("frozen" in skip.reason for skip in report.skips)
    assert len(list(program.calls(rate_node))) == 2
    program(ids).square().sum().backward()
    weights = (model.embed.weight, model.inner.weight)
    plain = [weight.grad.clone() for weight in weights if weight.grad is not None]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    coupled.attach(model, optimizer)
    optimizer.step()
    model_gradients = torch.autograd.grad(model(ids).square().sum(), weights)
    for weight, task, eager in zip(weights, plain, model_gradients):
        assert_within(task, eager, 8 * U * eager.abs())
        expected = task + loss_term(weight, **parameters)
        assert weight.grad is not None
        bound = slope_bound(weight.detach(), **parameters, unit=U) + 2 * U * expected.abs()
        assert_within(weight.grad, expected, bound)


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
