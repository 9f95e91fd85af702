"""A pass that changes weights in a training graph writes the caller's own Parameters, once, and they go on training."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import ggpass
from ggpass import InputError, PassError
from ggpass.graph.program import Program
from ggpass.graph.report import Change, Report
from ggpass.passes import BackSlash, DeepShape, FoldBatchNorm, GGInit, LowerWeights
from ggpass.training.prepared import PreparedModel

COUPLED = BackSlash(mode="coupled", strength=1e-6)


@dataclass(frozen=True)
class Halve:
    """w ← w/2: a pass as a user writes one."""

    only: tuple[str, ...] = ()

    def __call__(self, program: Program) -> Report:
        report = Report("Halve")
        for weight in program.weights(only=self.only, report=report):
            program.replace(weight, weight.tensor / 2)
            report.changes.append(Change(weight.name, "halved"))
        return report


@dataclass(frozen=True)
class PutInPlace:
    """The same by new tensors: legal for deployment alone."""

    def __call__(self, program: Program) -> Report:
        for weight in program.weights():
            for name in weight.names:
                program.set_weight(name, weight.tensor.detach() / 2)
        return Report("PutInPlace")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(40, 24), nn.Linear(24, 24), nn.Linear(24, 40, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(24)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.inner(self.embed(ids)))))


def ids(size: int = 8) -> Tensor:
    return torch.randint(0, 40, (size,))


def init_by_hand(model: Net) -> None:
    ggpass.init_(model, ids())


def shape_by_hand(model: Net) -> None:
    ggpass.shape_(model)


def halve_by_hand(model: Net) -> None:
    with torch.no_grad():
        for weight in (model.embed.weight, model.inner.weight):
            weight /= 2


WRITERS = [
    (GGInit(), init_by_hand),
    (GGInit(inplace=True), init_by_hand),
    (DeepShape(), shape_by_hand),
    (Halve(), halve_by_hand),
]
NAMES = ["GGInit", "GGInit-inplace", "DeepShape", "Halve"]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize(("step", "by_hand"), WRITERS, ids=NAMES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_callers_parameters_are_written_once_and_train(step: ggpass.Pass, by_hand: object, training: bool) -> None:
    model = Net().train(training)
    twin, objects = copy.deepcopy(model), dict(model.named_parameters(remove_duplicate=False))
    prepared = ggpass.prepare(model, ids(), passes=[step, COUPLED])
    by_hand(twin)  # type: ignore[operator]
    for name, weight in weights_of(twin).items():
        assert torch.equal(weights_of(model)[name], weight), name
    assert all(p is objects[n] for n, p in model.named_parameters(remove_duplicate=False))
    assert model.head.weight is model.embed.weight
    # Eval mode and training mode compute with what was written.
    prepared.eval()
    torch.testing.assert_close(prepared(batch := ids()), twin.eval()(batch))
    prepared.train()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    prepared.attach(optimizer)
    before = weights_of(model)
    prepared(ids()).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in (model.embed.weight, model.inner.weight))
    optimizer.step()
    after = weights_of(model)
    assert all(not torch.equal(after[name], before[name]) for name in ("embed.weight", "inner.weight"))


@pytest.mark.parametrize(("step", "by_hand"), WRITERS, ids=NAMES)
def test_later_traces_leave_what_was_trained(step: ggpass.Pass, by_hand: object) -> None:
    model = Net().train()
    prepared = ggpass.prepare(model, ids(), passes=[step, COUPLED])

    def unchanged(by: PreparedModel, batch: Tensor) -> None:
        before, parts = weights_of(by.model), len(by.report.parts)
        by(batch)
        assert len(by.report.parts) > parts, "traced again"
        assert any("traced again" in note for note in by.report.parts[-1].notes)
        for name, weight in weights_of(by.model).items():
            assert torch.equal(weight, before[name]), name

    with torch.no_grad():
        model.inner.weight.add_(0.25)  # as a step does
    unchanged(prepared, ids(8).reshape(4, 2).int()[:, 0])  # another dtype
    prepared.norm.eval()  # another pattern of training flags
    unchanged(prepared, ids())
    prepared.to(torch.float64)
    unchanged(prepared, ids())
    unchanged(copy.deepcopy(prepared), ids())


@pytest.mark.parametrize(
    ("step", "name"),
    [
        (PutInPlace(), "PutInPlace"),
        (LowerWeights(), "LowerWeights"),
        (FoldBatchNorm(), "FoldBatchNorm"),
    ],
    ids=["PutInPlace", "LowerWeights", "FoldBatchNorm"],
)
def test_a_pass_that_puts_other_tensors_in_place_is_refused_by_name(step: ggpass.Pass, name: str) -> None:
    model = Net().train()
    model.norm.eval()  # frozen statistics: the one that FoldBatchNorm could fold
    before = weights_of(model)
    with pytest.raises(PassError, match=rf"pass {name} .*(inner|embed)\.weight.*would get no gradient.*replace"):
        ggpass.prepare(model, ids(), passes=[step, COUPLED])
    for key, weight in weights_of(model).items():
        assert torch.equal(weight, before[key]), key
    assert model.training


def test_only_a_training_graph_is_written_to() -> None:
    """Deployment leaves the caller's model as it is, with the same passes."""
    model = Net().eval()
    before = weights_of(model)
    for step in (GGInit(), DeepShape(), Halve()):
        artifact = ggpass.compile(model, ids(), target="rf8-reference", passes=[step])
        assert not torch.equal(artifact(batch := ids()), model(batch))
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, before[name]), name


def test_patterns_of_tied_names_are_those_of_the_model() -> None:
    for name in ("embed", "head"):
        model = Net().train()
        before = weights_of(model)
        ggpass.prepare(model, ids(), passes=[Halve(only=(name,))])
        assert torch.equal(model.embed.weight, before["embed.weight"] / 2)
        assert torch.equal(model.inner.weight, before["inner.weight"])
    with pytest.raises(ggpass.WeightError, match="typo"):
        ggpass.prepare(Net(), ids(), passes=[Halve(only=("typo",))])


def test_lowered_models_are_still_refused() -> None:
    with pytest.raises(InputError, match="codes do not train"):
        ggpass.prepare(ggpass.compile(Net(), target="rf8-reference"), ids(), passes=[Halve()])
