"""A batch norm in a training graph refuses one value for each channel, as the model itself does."""

import pytest
import torch
from torch import nn

import ggpass
from ggpass.errors import InputError, TraceError
from ggpass.passes import BackSlash

PASSES = [BackSlash(mode="coupled", strength=1e-3)]


def flat() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def test_a_batch_of_one_is_refused_and_changes_nothing() -> None:
    model = flat()
    prepared = ggpass.prepare(model, args=(torch.randn(4, 6),), passes=PASSES)
    prepared.train()
    prepared(torch.randn(3, 6))
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"'1' normalizes .* \(1, 8\).*drop_last=True"):
        prepared(torch.randn(1, 6))
    # As in the model itself: nothing but its count of batches was written ahead of the refusal.
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name]) or name.endswith("num_batches_tracked"), name
    assert torch.isfinite(model[1].running_var).all()
    x = torch.randn(2, 6)
    twin = flat()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(prepared(x), twin.train()(x)), "two are enough"


def test_one_that_uses_its_running_statistics_takes_a_batch_of_one() -> None:
    model = flat()
    model[1].eval()
    x = torch.randn(1, 6)
    prepared = ggpass.prepare(model, args=(torch.randn(4, 6),), passes=PASSES)
    prepared.model[0].train()
    torch.testing.assert_close(prepared(x), model(x))
    torch.testing.assert_close(prepared.eval()(x), model(x))


def test_several_values_for_each_channel_are_enough() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    prepared = ggpass.prepare(model, args=(torch.randn(2, 2, 5, 5),), passes=PASSES)
    assert prepared(torch.randn(1, 2, 5, 5)).shape == (1, 3, 3, 3)
    assert torch.isfinite(model[1].running_var).all()


def test_an_example_of_one_says_what_to_give() -> None:
    with pytest.raises(TraceError, match="batch of two or more"):
        ggpass.prepare(flat(), args=(torch.randn(1, 6),), passes=PASSES)
