"""`like:FILE`: ν from the fits of a trained checkpoint, by name or by the kind of operator."""

import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import gennorm
from torch import nn

import ggpass
from ggpass import FormatError, WeightError
from ggpass.ggd import fit_moments
from ggpass.passes import GGInit
from ggpass.passes.gg_init.candidate import Group
from ggpass.passes.gg_init.shapes import CheckpointShapes, group_of_name


def sample(nu: float, *shape: int, seed: int = 0) -> torch.Tensor:
    """Weights of a known shape, drawn by scipy."""
    return torch.from_numpy(gennorm(nu).rvs(size=shape, random_state=seed)).float()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tensors = {
        "0.weight": sample(0.8, 100, 100),
        "body.1.weight": sample(1.2, 100, 100),
        "body.2.weight": sample(1.4, 100, 100),
        "body.3.weight": sample(1.6, 100, 100),
        "conv.weight": sample(3.0, 20, 20, 5, 5),
        "embeddings.word.weight": sample(0.5, 200, 100),
        "mask.weight": torch.zeros(10, 10),
        "signs.weight": torch.sign(sample(1.0, 50, 50)),
        "norm.weight": sample(1.0, 100),
        "position_ids": torch.arange(100).view(10, 10),
    }
    save_file(tensors, tmp_path / "trained.safetensors")
    return tmp_path / "trained.safetensors"


class Body(nn.Module):
    """Some names that the checkpoint has, and some that it has not."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 100)
        self.body = nn.ModuleList([nn.Linear(100, 100) for _ in range(2)])
        self.other = nn.Linear(100, 200)
        self.picture = nn.Conv2d(10, 20, 5)


def test_same_names_take_their_own_shape_and_the_rest_the_median_of_their_kind(checkpoint: Path) -> None:
    model = Body()
    report = ggpass.init_(model, shape=f"like:{checkpoint}")
    said = {change.name: change.what for change in report.changes}
    # A moment fit of N = 10,000 values deviates by some 2 %; twice for the checkpoint and for what was drawn from it.
    for weight, nu, words in (
        (model.body[1].weight, 1.2, "(as in trained.safetensors)"),
        (model.other.weight, 1.3, "the median linear in trained.safetensors, which has no such name"),
        (model.body[0].weight, 1.3, "the median linear"),
        (model.picture.weight, 3.0, "the median conv"),
        (model.table.weight, 0.5, "the median embedding"),
    ):
        assert fit_moments(weight).shape == pytest.approx(nu, rel=0.2)
        name = next(n for n, p in model.named_parameters() if p is weight)
        assert words in said[name]


def test_the_medians_are_over_what_has_a_shape(checkpoint: Path) -> None:
    """No norms, no integers, no zeros, no tensor of signs, whose fit lies at the end of the range."""
    shapes = CheckpointShapes.read(checkpoint)
    assert set(shapes.by_name) == {
        "0.weight", "body.1.weight", "body.2.weight", "body.3.weight", "conv.weight", "embeddings.word.weight"
    }  # fmt: skip
    linears = [shapes.by_name[name] for name in ("0.weight", "body.1.weight", "body.2.weight", "body.3.weight")]
    assert shapes.medians[Group.LINEAR] == statistics.median(linears)
    assert shapes.counts == {Group.LINEAR: 4, Group.CONV: 1, Group.EMBEDDING: 1}


def test_a_kind_that_the_checkpoint_lacks_takes_the_median_of_all(tmp_path: Path) -> None:
    save_file({"a.weight": sample(1.0, 100, 100), "b.weight": sample(1.5, 100, 100)}, tmp_path / "m.safetensors")
    shapes = CheckpointShapes.read(tmp_path)
    nu, words = shapes.shape_of(["c.weight"], Group.CONV)
    assert nu == statistics.median(shapes.by_name.values())
    assert words.startswith("the median weight in")


@pytest.mark.parametrize(
    ("name", "dimensions", "group"),
    [
        ("embeddings.word_embeddings.weight", 2, Group.EMBEDDING),
        ("transformer.wte.weight", 2, Group.EMBEDDING),
        ("shared.weight", 2, Group.EMBEDDING),
        ("patch_embed.proj.weight", 4, Group.CONV),
        ("layer.0.dense.weight", 2, Group.LINEAR),
        ("stem.weight", 3, Group.CONV),
    ],
)
def test_kinds_by_name(name: str, dimensions: int, group: Group) -> None:
    assert group_of_name(name, dimensions) is group


def test_no_checkpoint_or_an_empty_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        GGInit(shape=f"like:{tmp_path}/none.safetensors")
    save_file({"norm.weight": torch.ones(4), "zero.weight": torch.zeros(4, 4)}, tmp_path / "m.safetensors")
    with pytest.raises(WeightError, match="no float matrix"):
        GGInit(shape=f"like:{tmp_path}/m.safetensors")
