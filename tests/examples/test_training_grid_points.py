"""examples/training/grid_points: a model measured on one grid for all matrices and on grids of their own."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from training.grid_points import GRADIENT_BATCHES, grid_points, own_grids, uniform_grids
from training.task import Quality, Split, Task, matrices

from ggpass.training import entropy_bits


def build(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).eval()


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch[:, :3]).square().mean()


def epoch(generator: Generator) -> Iterator[Tensor]:
    for _ in range(2 * GRADIENT_BATCHES):
        yield torch.randn(4, 6, generator=generator)


def quality(model: nn.Module, split: Split) -> Quality:
    """Made of the weights, so that what was measured can be told from the score."""
    return Quality(sum(float(w.detach().abs().sum()) for w in matrices(model)), 0.0 if split == "test" else 1.0)


TASK = Task("made-up", build, epoch, loss, quality, 1, 2 * GRADIENT_BATCHES, 1e-3, 0.0)


def test_each_matrix_gets_the_step_of_its_gradients_about_the_same_mean() -> None:
    model = build(0)
    weights = matrices(model)
    squares = [torch.zeros((), dtype=torch.float64) for _ in weights]
    for _, batch in zip(range(GRADIENT_BATCHES), epoch(torch.Generator().manual_seed(0))):
        model.zero_grad()
        loss(model, batch).backward()
        squares = [s + w.grad.double().square().mean() for s, w in zip(squares, weights)]
    model.zero_grad()
    grid, coarser = own_grids(TASK, model, 0.75, (0.1, 0.2))
    assert (grid.step, grid.spread) == (0.1, 0.75)
    # Δ_i ∝ √E[g²]^−γ, and Σ n·ln Δ_i = Σ n·ln Δ.
    ratio = grid.steps[0] / grid.steps[1]
    assert ratio == pytest.approx(float(squares[1] / squares[0]) ** (0.75 / 2), rel=1e-4)
    counts = [w.numel() for w in weights]
    assert sum(n * math.log(s / 0.1) for n, s in zip(counts, grid.steps)) == pytest.approx(0, abs=sum(counts) * 2**-23)
    assert coarser.steps == pytest.approx([2 * step for step in grid.steps])
    assert all(weight.grad is None for weight in weights)


@pytest.mark.parametrize("tables", ["one", "each"])
def test_points_are_measured_at_rounded_weights_and_the_model_stays(tables: str) -> None:
    model = build(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grids = uniform_grids(model, (0.05, 0.2, 50.0)) + own_grids(TASK, model, 1.0, (0.1,))
    points = grid_points(TASK, model, grids, tables)
    assert [(p.step, p.spread) for p in points] == [(0, 0), (0.05, 0), (0.2, 0), (0.1, 1.0)]  # at 50 all are zero
    for grid, point in zip((grids[0], grids[1], grids[3]), points[1:]):
        rounded = [(w.detach() / s).round() * s for w, s in zip(matrices(model), grid.steps)]
        assert point.test.score == pytest.approx(sum(float(w.abs().sum()) for w in rounded))
        assert point.bits == entropy_bits(matrices(model), grid.steps, tables=tables)  # type: ignore[arg-type]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
