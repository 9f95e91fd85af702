"""Program and Pipeline: tracing, copy-on-write, legality between passes."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import ggpass
from ggpass import PassError, Pipeline, Program, Report, TraceError


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> dict[str, torch.Tensor]:
        return {"y": self.b(torch.relu(self.a(x)) * gain)}


def traced() -> tuple[nn.Module, Program, torch.Tensor]:
    model, x = TwoLinears().eval(), torch.randn(3, 8)
    return model, Program.trace(model, (x,)), x


def test_trace_keeps_function_names_and_tensors() -> None:
    model, program, x = traced()
    assert torch.equal(program(x)["y"], model(x)["y"])
    assert program.weight("a.weight") is model.a.weight


def test_trace_is_in_eval_mode_and_gives_the_flags_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    model[0].eval()
    flags = [m.training for m in model.modules()]
    program = Program.trace(model, (torch.randn(2, 4),))
    assert [m.training for m in model.modules()] == flags
    x = torch.randn(2, 4)
    assert torch.equal(program(x), program(x))


def test_untraceable_model_says_what_broke_and_what_still_works() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(TraceError, match=r"(?s)could not trace Branches.*leave out args"):
        Program.trace(Branches(), (torch.randn(2),))


def test_copy_shares_tensors_and_not_the_graph() -> None:
    _, program, x = traced()
    before, expected = str(program.graph), program(x)["y"]
    twin = program.copy()
    assert twin.weight("a.weight") is program.weight("a.weight")
    twin.set_weight("a.weight", torch.zeros(6, 8))
    for node in list(twin.calls(torch.ops.aten.relu.default)):
        node.replace_all_uses_with(node.args[0])
        twin.graph.erase_node(node)
    twin.check()
    assert str(program.graph) == before
    assert torch.equal(program(x)["y"], expected)
    assert not torch.equal(twin(x)["y"], expected)


def test_prune_unbinds_what_nothing_reads() -> None:
    _, program, _ = traced()
    for node in program.calls(torch.ops.aten.linear.default):
        node.args = node.args[:2]
    assert set(program.prune()) == {"a.bias", "b.bias"}
    program.check()
    with pytest.raises(PassError, match=r"'a\.bias'"):
        program.weight("a.bias")


@dataclass(frozen=True)
class Breaks:
    how: str

    def __call__(self, program: Program) -> Report | None:
        if self.how == "tensor":
            program.delete_weight("a.weight")
        if self.how == "shape":
            program.set_weight("a.weight", torch.zeros(5, 7))
        return None if self.how == "report" else Report("Breaks")


@pytest.mark.parametrize("how", ["tensor", "shape", "report"])
def test_pipeline_names_the_pass_that_broke_the_program(how: str) -> None:
    _, program, _ = traced()
    with pytest.raises(PassError, match="pass Breaks"):
        Pipeline((Breaks(how),))(program)  # type: ignore[arg-type]


def test_a_pipeline_is_a_pass() -> None:
    def rename(program: Program) -> Report:
        return Report("rename")

    _, program, _ = traced()
    report = Pipeline((rename, Pipeline((rename, rename), title="inner")))(program)
    assert [r.title for r in report.flat()] == ["Pipeline", "rename", "inner", "rename", "rename"]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_plain_attribute_that_is_a_buffer_too(inplace: bool) -> None:
    """As rotary embeddings keep `original_inv_freq`: torch.export lifts it to a constant, a plain attribute."""

    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("inv_freq", torch.arange(8.0), persistent=False)
            self.original = self.inv_freq
            self.constant = torch.ones(8)
            self.out = nn.Linear(8, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(x * self.inv_freq + self.original * self.constant)

    model, x = Rotary().eval(), torch.randn(3, 8)
    wanted = ggpass.compile(model, target="rf8-reference")(x)
    artifact = ggpass.compile(model, (x,), target="rf8-reference", inplace=inplace)
    assert torch.equal(artifact(x), wanted)
