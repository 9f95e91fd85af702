"""Which tensors a Regularizer is of: factors of a weight, weights replaced since, states of others, shared layers."""

import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import ggpass
from ggpass.errors import InputError, WeightError
from ggpass.passes import BackSlash
from ggpass.training import Regularizer


def old_weight_norm(module: nn.Module, dim: int | None = 0) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(module, dim=dim)  # type: ignore[no-any-return]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


# Factors.


@pytest.mark.parametrize("way", ["parametrization", "hook", "hook over all", "spectral"])
@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv1d(6, 5, 3), nn.ConvTranspose1d(6, 5, 3), nn.Linear(6, 1)])
def test_factors_of_a_weight_are_left_alone_with_the_reason(way: str, layer: nn.Module) -> None:
    torch.manual_seed(0)
    layer = type(layer)(*((6, 5, 3) if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d) else (6, layer.out_features)))
    if way == "parametrization":
        layer = parametrizations.weight_norm(layer)
    elif way == "spectral":
        layer = parametrizations.spectral_norm(layer)
    else:
        layer = old_weight_norm(layer, dim=None if way == "hook over all" else 0)
    model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(4, 6) if isinstance(layer, nn.Linear) else torch.randn(4, 6, 7)
    model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    regularizer = BackSlash(strength=10.0, refit_every=1, shape=1.0).attach(model, optimizer)
    assert regularizer.names == ("2.weight",)
    factors = [skip for skip in regularizer.report.skips if "makes weight from" in skip.reason]
    assert len(factors) == (1 if way == "spectral" else 2)
    assert all("only=" in skip.reason for skip in factors)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    step(model, optimizer, x)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters()))


def test_a_removed_parametrization_leaves_a_weight_that_is_regularized() -> None:
    layer = parametrizations.weight_norm(nn.Linear(6, 5))
    parametrize.remove_parametrizations(layer, "weight")
    assert Regularizer(layer, BackSlash(strength=1.0)).names == ("weight",)


def test_factors_alone_are_nothing_to_regularize_unless_they_are_named() -> None:
    layer = parametrizations.weight_norm(nn.Linear(6, 5))
    with pytest.raises(WeightError, match="a parametrization makes weight from"):
        Regularizer(layer, BackSlash(strength=1.0))
    v = "parametrizations.weight.original1"
    assert Regularizer(layer, BackSlash(strength=1.0, only=v)).names == (v,)
    with pytest.raises(WeightError, match="a parametrization makes weight from"):
        Regularizer(layer, BackSlash(strength=1.0, only="parametrizations"))


def test_names_that_only_look_like_norms_are_weights() -> None:
    model = nn.Module()
    model.gate_g, model.gate_v = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4, 6))
    model.other_g, model.other_v = nn.Parameter(torch.randn(6, 1)), nn.Parameter(torch.randn(4, 6))
    names = Regularizer(model, BackSlash(strength=1.0)).names
    assert names == ("gate_g", "gate_v", "other_g", "other_v")


def test_factors_have_no_nodes_in_graphs() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), nn.Linear(5, 3))
    settings = BackSlash(strength=1.0, mode="coupled")
    prepared = ggpass.prepare(model, args=(torch.randn(4, 6),), passes=[settings])
    traced = next(part for part in prepared.report.parts if part.title == "training graph")
    assert [change.name for change in traced.parts[0].changes] == ["1.weight"]


# Replaced.


def test_tying_after_attach_is_told_at_the_next_step() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = BackSlash(target_bits=2.0, refit_every=2).attach(model, optimizer)
    step(model, optimizer, torch.randn(4, 6))
    model[1].weight = model[0].weight
    step(model, optimizer, torch.randn(4, 6))
    before = model[0].weight.detach().clone()
    with pytest.raises(InputError, match=r"1\.weight is no longer the model's.*tying.*attach a new BackSlash"):
        step(model, optimizer, torch.randn(4, 6))
    assert torch.equal(model[0].weight, before), "the error comes ahead of the step"
    regularizer.detach()
    again = BackSlash(target_bits=2.0).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert again.names == ("0.weight",)


# States.


def state_of(model: nn.Module, **settings: Any) -> dict[str, Any]:
    return Regularizer(model, BackSlash(**(settings or {"strength": 1.0}))).state_dict()


def named(**layers: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def test_a_state_of_other_weights_is_refused_by_name_and_shape() -> None:
    """All of these have two tensors of 24 weights in all."""
    model = named(a=nn.Linear(4, 3), b=nn.Linear(2, 6))
    target = Regularizer(model, BackSlash(strength=1.0))
    before = target.state_dict()
    others = {
        r"weight 0 is a\.weight of shape \(4, 3\) in the state, and a\.weight of shape \(3, 4\)": named(
            a=nn.Linear(3, 4), b=nn.Linear(2, 6)
        ),
        r"weight 0 is b\.weight .* and a\.weight": named(b=nn.Linear(2, 6), a=nn.Linear(4, 3)),
        r"weight 1 is c\.weight .* and b\.weight": named(a=nn.Linear(4, 3), c=nn.Linear(2, 6)),
        r"weight 1 is missing in the state, and b\.weight": named(a=nn.Linear(4, 3)),
        r"weight 2 is c\.weight of shape \(1, 1\) in the state, and missing": named(
            a=nn.Linear(4, 3), b=nn.Linear(2, 6), c=nn.Linear(1, 1)
        ),
    }
    for message, other in others.items():
        with pytest.raises(InputError, match=message):
            target.load_state_dict(state_of(other))
    after = target.state_dict()
    assert repr(after) == repr(before), "a refused state changes nothing"


def test_a_state_of_another_goal_or_of_nothing_is_refused() -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(InputError, match=r"of a training with a given strength, these settings .* with a target"):
        Regularizer(model, BackSlash(target_bits=1.0)).load_state_dict(state_of(model))
    with pytest.raises(InputError, match="has no 'steps'"):
        Regularizer(model, BackSlash(strength=1.0)).load_state_dict({})


def test_wrappers_do_not_change_a_states_names() -> None:
    inner = nn.Sequential(nn.Linear(4, 3))
    wrapped = nn.DataParallel(inner)
    assert Regularizer(wrapped, BackSlash(strength=1.0)).names == ("module.0.weight",)
    Regularizer(inner, BackSlash(strength=1.0)).load_state_dict(state_of(wrapped))
    Regularizer(torch.compile(wrapped), BackSlash(strength=1.0)).load_state_dict(state_of(inner))  # type: ignore[arg-type]


# Shared layers.


def test_two_coupled_regularizers_of_a_shared_layer_both_act_and_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """The steps of each optimizer add the slope of its own."""
    shared = nn.Linear(6, 6)
    left, right = nn.Sequential(shared, nn.Linear(6, 2)), nn.Sequential(shared, nn.Linear(6, 3))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.0) for model in (left, right)]
    settings = [BackSlash(strength=s, mode="coupled", shape=0.8, scale=0.3) for s in (1e-3, 2e-3)]
    settings[0].attach(left, optimizers[0])
    assert not caplog.records
    settings[1].attach(right, optimizers[1])
    assert "0.weight: another Regularizer" in caplog.text
    slopes = []
    for optimizer in optimizers:
        shared.weight.grad = torch.zeros_like(shared.weight)
        optimizer.step()
        slopes.append(shared.weight.grad)
    assert bool(slopes[0].any())
    # The factor's logarithm is rounded: to float32 in the kernel.
    torch.testing.assert_close(slopes[1], 2 * slopes[0], rtol=1e-5, atol=0)


def test_proximal_ones_of_two_optimizers_are_told(caplog: pytest.LogCaptureFixture) -> None:
    shared = nn.Linear(6, 6)
    left, right = nn.Sequential(shared, nn.Linear(6, 2)), nn.Sequential(shared, nn.Linear(6, 3))
    first = BackSlash(strength=1e-3).attach(left, torch.optim.SGD(left.parameters(), lr=0.1))
    assert not caplog.records
    BackSlash(strength=1e-3).attach(right, torch.optim.SGD(right.parameters(), lr=0.1))
    assert "0.weight: another Regularizer" in caplog.text
    assert "1.weight" not in caplog.text
    assert first.steps == 0


def test_an_abandoned_one_is_not_in_the_way(caplog: pytest.LogCaptureFixture) -> None:
    """As a notebook's cell run twice leaves it: held by the hooks of its own optimizer, a cycle."""
    model = nn.Linear(6, 6)
    settings = BackSlash(strength=1e-3, mode="coupled")
    gc.disable()
    try:
        for _ in range(2):
            settings.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    finally:
        gc.enable()
    assert not caplog.records
