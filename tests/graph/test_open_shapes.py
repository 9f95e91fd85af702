"""Sizes that torch.export leaves open stay open in a Program, and no operator makes a legal pass look illegal."""

from collections.abc import Callable

import pytest
import torch
from support.toy_pass import Halve
from torch import Tensor, nn

import ggpass
from ggpass import InputError, PassError, Program

AUTO = torch.export.Dim.AUTO


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(30, 16), kind(16, 16, batch_first=True), nn.Linear(16, 30)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(ids))[0])


class Scores(nn.Module):
    """A product with a bias that is as large as the result, as in ALiBi."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.query = nn.Embedding(30, 16), nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        bias = torch.arange(ids.shape[1]).float().expand(1, ids.shape[1], ids.shape[1])
        return torch.baddbmm(bias, self.query(x), x.transpose(1, 2), beta=0.5)


class Shortcut(nn.Module):
    """A comparison of sizes behind an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(30, 16), nn.Linear(48, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        sides = (nn.functional.pad(x[:, 1:], (0, 0, 0, 1)), x, nn.functional.pad(x[:, :-1], (0, 0, 1, 0)))
        return self.up(torch.cat(sides, 2)).view(-1, 16).unflatten(0, (ids.shape[0], ids.shape[1]))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "RNN": lambda: Recurrent(nn.RNN),
    "baddbmm": Scores,
    "shifted": Shortcut,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes", [(2, 7), (3, 2)])
@torch.no_grad()
def test_open_sizes_stay_open(name: str, sizes: tuple[int, int]) -> None:
    model = MODELS[name]().eval()
    ids = torch.randint(0, 30, sizes)
    shapes = {"ids": {0: AUTO, 1: AUTO}}
    plain = torch.export.export(model, (ids,), dynamic_shapes=shapes)
    artifact = ggpass.compile(model, (ids,), target="rf8-cpu", dynamic_shapes=shapes, passes=[Halve(skip="*")])
    wanted = [str(n.meta["val"].shape) for n in plain.graph.nodes if n.name == "ids"]
    assert [str(n.meta["val"].shape) for n in artifact.program.inputs()] == wanted
    names = {c.name for part in artifact.report.parts if part.title == "LowerWeights" for c in part.changes}
    lowered = ggpass.compile(model, target="rf8-cpu", only=names)
    static = wanted[0].count("s") == 1  # torch unrolls a recurrence: the length of the example is in the graph
    assert any(("(any, any)" in note) is not static for note in artifact.report.notes if "takes int64 (any, " in note)
    for shape in (sizes, (5, sizes[1]), (4, 5)):
        other = torch.randint(0, 30, shape)
        if static and shape[1] != sizes[1]:
            with pytest.raises(InputError, match="dynamic_shapes="):
                artifact(other)
        else:
            torch.testing.assert_close(artifact(other), lowered(other), rtol=0, atol=1e-5)


@torch.library.custom_op("ggpass_test::concrete", mutates_args=())
def concrete(x: Tensor) -> Tensor:
    return x.clone()


_strict = False


@concrete.register_fake
def _(x: Tensor) -> Tensor:
    if _strict and any(isinstance(size, torch.SymInt) for size in x.shape):
        raise RuntimeError("takes no symbolic sizes")
    return torch.empty_like(x)


@pytest.mark.parametrize("breaks", [False, True])
def test_the_sizes_of_the_example_decide_where_symbols_cannot(breaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(concrete(self.up(x)))

    program = Program.trace(Model().eval(), (torch.randn(3, 16),), dynamic_shapes={"x": {0: AUTO}})
    monkeypatch.setattr("test_open_shapes._strict", True)
    before = {node: node.meta.get("val") for node in program.graph.nodes}
    if breaks:
        program.set_weight("down.weight", torch.zeros(16, 31))
        with pytest.raises(PassError):
            program.check()
    else:
        program.check()
        assert all(node.meta.get("val") is value for node, value in before.items() if node.op == "placeholder")
        assert isinstance(next(iter(program.inputs())).meta["val"].shape[0], torch.SymInt)
