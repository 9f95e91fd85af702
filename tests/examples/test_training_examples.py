"""The training examples: which model counts as the smallest good one, the file it goes to, and what a person sees."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn
from training import curve
from training.compare import Plan, compare
from training.curve import Choice, Model
from training.grid_points import Point
from training.packed import on_grid, save_packed
from training.task import Quality, Split, Task
from typer.testing import CliRunner

import ggpass
from ggpass.training import entropy_bits

CLASSES, WIDTH = 3, 24


def toy_task(measure: str = "accuracy", tolerance: float = 0.05) -> Task:
    """Classes that a linear map of 24 numbers tells apart; held-out and test rows differ."""
    truth = torch.randn(WIDTH, CLASSES, generator=Generator().manual_seed(1))

    def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, WIDTH, generator=Generator().manual_seed(seed))
        return x, (x @ truth).argmax(1)

    splits: dict[Split, tuple[Tensor, Tensor]] = {"held_out": draw(200, 2), "test": draw(200, 3)}
    x, y = draw(512, 4)

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, CLASSES))

    @torch.no_grad()
    def quality(model: nn.Module, split: Split) -> Quality:
        logits, labels = model(splits[split][0]), splits[split][1]
        nll = F.cross_entropy(logits, labels).item()
        return Quality((logits.argmax(1) == labels).double().mean().item() if measure == "accuracy" else -nll, nll)

    return Task(
        "toy",
        build,
        lambda generator: [(x[i], y[i]) for i in torch.randperm(512, generator=generator).split(32)],
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        quality,
        epochs=6,
        batches=16,
        lr=1e-2,
        weight_decay=0.01,
        measure=measure,
        tolerance=tolerance,
    )


# Which model is the smallest good one.

scores = st.integers(50, 100).map(lambda percent: percent / 100)
grids = st.lists(st.tuples(st.integers(1, 80), scores, scores), min_size=1, max_size=5)


def model_of(name: str, whole: tuple[float, float], grid: list[tuple[int, float, float]], own: bool = False) -> Model:
    points = [Point(0.0, 32.0, Quality(whole[0], 0.0), Quality(whole[1], 0.0))]
    points += [Point(2.0**-i, b / 10, Quality(h, 0.0), Quality(t, 0.0)) for i, (b, h, t) in enumerate(grid, start=2)]
    return Model(name, tuple(points), 1.0, own)


@settings(max_examples=60, deadline=None)
@given(st.tuples(scores, scores), st.lists(grids, min_size=1, max_size=4), st.sampled_from([0.0, 0.02, 0.1]))
def test_the_smallest_good_model_is_that_of_a_search_through_all(
    whole: tuple[float, float], measured: list[list[tuple[int, float, float]]], tolerance: float
) -> None:
    task = toy_task(tolerance=tolerance)
    models = [model_of(str(i), whole if i == 0 else (0.0, 0.0), grid) for i, grid in enumerate(measured)]
    found = curve.smallest(curve.best_points(task, models))
    every = [(b / 10, h) for grid in measured for b, h, _ in grid]
    good = [bits for bits, held_out in every if held_out >= whole[0] - tolerance]
    assert found.good == bool(good)
    if good:
        assert found.point.bits == min(good)
    else:
        assert found.point.held_out.score == max(held_out for _, held_out in every)


@given(st.tuples(scores, scores), grids, st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_the_choice_never_looks_at_the_test_set(whole, grid, random) -> None:
    other = [(bits, held_out, random.random()) for bits, held_out, _ in grid]
    task = toy_task()
    first, second = (curve.best_points(task, [model_of("m", whole, g)])[0].point for g in (grid, other))
    assert (first.step, first.bits) == (second.step, second.bits)


# The file.


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2.0**-3, 2.0**-4.5, 2.0**-6.25, 0.01]))
def test_a_saved_model_comes_back_bit_for_bit(tmp_path_factory, seed: int, step: float) -> None:
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    torch.manual_seed(seed)
    model = on_grid(nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(20, 7)), step)
    float_bytes, packed_bytes = save_packed(model, step, path)
    empty = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(20, 7))
    again = ggpass.load(path, into=empty)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert packed_bytes == path.stat().st_size
    assert float_bytes > 4 * sum(value.numel() for value in model.state_dict().values())
    assert list(path.parent.iterdir()) == [path]


def test_tied_weights_are_in_the_file_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(300, 64), nn.Linear(64, 300, bias=False))
    model[1].weight = model[0].weight
    rounded = on_grid(model, 0.25)
    _, size = save_packed(rounded, 0.25, tmp_path / "tied.safetensors")
    bits = entropy_bits(rounded[0].weight, 0.25)
    # One histogram of some 40 symbols, checksums and a header beside the payload.
    assert 0.99 * bits * 300 * 64 / 8 < size < 1.02 * bits * 300 * 64 / 8 + 1500
    assert model[0].weight is model[1].weight


def test_a_model_off_its_grid_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not give back 0\.weight.*0\.25"):
        save_packed(nn.Sequential(nn.Linear(30, 30)), 0.25, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


# What a person sees.

PLAN = Plan("A toy: 6 epochs, seed 0", (2.0, 1.0), 2.0**-3, 2, 1e-2, 0.01)


@pytest.mark.parametrize(("measure", "tolerance"), [("accuracy", 0.05), ("−NLL", 0.2)])
def test_an_example_writes_its_table_its_plot_and_its_file(measure, tolerance, tmp_path, capsys) -> None:
    from rich.console import Console

    task = toy_task(measure, tolerance)
    compare(task, PLAN, "toy", tmp_path, 0, Console(width=200))
    shown = capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.md", "toy.png", "toy.safetensors"]
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "toy.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    names = [row[0] for row in cells[2:]]
    assert names == ["AdamW", "AdamW, rounded", "BackSlash, 2 asked", "BackSlash, 1 asked"]
    assert len({len(row) for row in cells}) == 1
    for row in cells[4:]:
        assert row[1] == "2^-3"
        assert abs(float(row[2]) - float(row[0].split()[1])) < 0.15  # 96 steps of 803 weights
    assert all(name in shown for name in names)
    saved = next(row for row in cells[2:] if f"toy.safetensors is {row[0]};" in lines[-1])
    again = ggpass.load(tmp_path / "toy.safetensors", into=task.build(1))
    score = task.quality(again, "test")
    assert saved[3] == curve.in_words(task, score)
    weights = [p for p in again.parameters() if p.dim() >= 2]
    step = 2.0 ** float(saved[1].removeprefix("2^"))
    assert saved[2] == f"{entropy_bits(weights, step):.2f}"
    assert saved[5] == curve.kilobytes((tmp_path / "toy.safetensors").stat().st_size)


def test_points_of_backslash_lie_on_its_own_grid(tmp_path) -> None:
    recipe = PLAN.recipe(toy_task(), 1.0)
    assert recipe.rate is not None
    assert (recipe.rate.step, recipe.rate.target_bits, recipe.rate.total_steps) == (2.0**-3, 1.0, 96)
    assert (recipe.lr, recipe.weight_decay) == (1e-2, 0.01)
    assert [math.log2(step) for step in PLAN.steps] == pytest.approx([-1, -1.5, -2, -2.5, -3, -3.5, -4, -4.5, -5])
    plain = PLAN.recipe(toy_task(), None)
    assert (plain.rate, plain.lr, plain.weight_decay) == (None, recipe.lr, recipe.weight_decay)


@settings(max_examples=30, deadline=None)
@given(scores, st.lists(scores, min_size=1), st.lists(scores, max_size=3))
def test_the_plot_shows_all_of_backslash_and_adamw_where_it_holds(whole, rounded, own) -> None:
    low, high = curve.limits(whole, rounded, own)
    assert all(low < score < high for score in (whole, *own))
    assert all(low < score < high for score in rounded if score > 0.95 * whole)
    assert low > 0.9 * min([whole, *own]) - 0.15


def commands() -> list[Callable[..., None]]:
    import byte_lm
    import fashion_mnist
    import minilm_classifier

    return [fashion_mnist.main, byte_lm.main, minilm_classifier.main]


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.__module__)
def test_without_its_data_an_example_says_what_to_do_and_fails(command, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("minilm_classifier.model_folder", lambda: tmp_path)
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, ["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "error:" in result.output
    assert "apt-get download" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_words_for_scores_sizes_and_grids() -> None:
    task, language = toy_task(), toy_task("−NLL", 0.01)
    assert curve.in_words(task, Quality(0.8765, 0.4)) == "87.65 %"
    assert curve.in_words(language, Quality(-1.4142, 1.4142)) == "1.414 nats"
    assert (curve.kilobytes(9_400), curve.kilobytes(12_340_000)) == ("9 kB", "12.3 MB")
    assert curve.grid_name(2**-4.5) == "2^-4.5"
    choice = Choice(model_of("x", (1, 1), [(10, 1, 1)]), Point(0.5, math.pi, Quality(1, 0), Quality(1, 0)), True)
    assert curve.rows(task, [choice], [500], 1000)[2][:3] == ("x, rounded", "2^-1", "3.14")
