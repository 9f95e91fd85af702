"""insert_on_weight_edges: one identity node for each weight, ahead of all its uses, whatever its names."""

import pytest
import torch
from torch import Tensor, fx, nn

from ggpass import Program, WeightError
from ggpass.graph.edges import insert_on_weight_edges
from ggpass.graph.weights import Weight


class Tied(nn.Module):
    """y = W(Wᵀ-ish) with one weight under two names, and one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.twice = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.twice(torch.relu(self.twice(self.first(x)))))


class Marked(torch.autograd.Function):
    """Identity forward; backward adds one."""

    @staticmethod
    def forward(ctx: object, w: Tensor) -> Tensor:
        return w.view_as(w)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad + 1


def marked(w: Tensor) -> Tensor:
    return Marked.apply(w)


def make(program: Program, source: fx.Node, weight: Weight) -> fx.Node:
    return program.graph.call_function(marked, (source,))


def trace(model: nn.Module) -> Program:
    return Program(torch.export.export(model, (torch.randn(3, 6),)).module(check_guards=False))


def test_a_node_adds_its_gradient_once_whatever_the_names_and_uses() -> None:
    model = Tied()
    program, plain = trace(model), trace(model)
    nodes = insert_on_weight_edges(program, ["second.weight", "twice.weight"], make)
    program.check()
    assert len(nodes) == 2
    x = torch.randn(3, 6)
    got = torch.autograd.grad(program(x).square().sum(), list(model.parameters()))
    want = torch.autograd.grad(plain(x).square().sum(), list(model.parameters()))
    assert torch.equal(program(x), plain(x))
    for name, g, w in zip(dict(model.named_parameters()), got, want):
        assert torch.equal(g, w + 1 if name in ("first.weight", "twice.weight") else w), name


def test_nodes_of_two_calls_follow_one_another() -> None:
    model = Tied()
    program, plain = trace(model), trace(model)
    for _ in range(2):
        insert_on_weight_edges(program, ["first.weight"], make)
    program.check()
    x = torch.randn(3, 6)
    got = torch.autograd.grad(program(x).sum(), [model.first.weight])[0]
    assert torch.equal(got, torch.autograd.grad(plain(x).sum(), [model.first.weight])[0] + 1 + 1)
    assert [w.names for w in program.tensors()] == [w.names for w in plain.tensors()]


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(WeightError, match=r"no weight named 'frist\.weight'"):
        insert_on_weight_edges(trace(Tied()), ["first.weight", "frist.weight"], make)
