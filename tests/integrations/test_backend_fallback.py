"""No silent float run: values that change between calls, a backend behind ours that fails, and the report's timing."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ggpass
from ggpass import Report


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    torch._dynamo.reset()
    # Inductor's cache hides a graph that no longer compiles.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


class Scaled(nn.Module):
    """A float attribute and a float argument, which Dynamo makes symbols of once they change."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
        self.theta = 0.75

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return self.b(torch.relu(self.a(x)) * self.theta) * factor


def check(model: nn.Module, calls: list[tuple[Any, ...]], **options: Any) -> list[Report]:
    """Every call computes with the codes: as the lowered module, and not as the float one."""
    reports: list[Report] = []
    dynamic = options.pop("dynamic", None)
    fast = torch.compile(model, backend="ggpass", dynamic=dynamic, options={"report": reports.append, **options})
    reference = ggpass.compile(model, target="rf8-reference")
    with torch.no_grad():
        for call in calls:
            got, wanted, plain = fast(*call), reference(*call), model(*call)
            scale = float(wanted.abs().max())
            # Sums of 64 float32 products in another order: 64 · 2^-24 of the largest output.
            assert float((got - wanted).abs().max()) <= 64 * 2**-23 * scale
            assert float((got - plain).abs().max()) > 1e-3 * scale, "this is the float model"
    assert reports
    return reports


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
def test_a_float_argument_that_changes(dynamic: bool | None, inner: str) -> None:
    calls = [(torch.randn(n, 32), factor) for n, factor in ((3, 1.0), (4, 2.0), (5, 3.5), (9, 4.25))]
    check(Scaled().eval(), calls, dynamic=dynamic, inner=inner, target="rf8-reference")


def test_a_float_attribute_that_changes() -> None:
    model = Scaled().eval()
    for theta in (0.75, 0.5, 0.3):
        model.theta = theta
        check(model, [(torch.randn(3, 32),), (torch.randn(5, 32),)], dynamic=True, target="rf8-reference")


def test_a_decoder_of_transformers_with_open_lengths() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers; pip install 'ggpass[transformers]'")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=128
    )

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.LlamaForCausalLM(config)

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids, use_cache=False).logits

    check(Logits().eval(), [(torch.randint(0, 128, (1, n)),) for n in (5, 9, 17)], dynamic=True, target="rf8-reference")


@pytest.mark.parametrize(
    "error", [RuntimeError("no registers left"), AttributeError("item_memo"), NotImplementedError()]
)
def test_a_backend_behind_ours_that_fails_is_logged_and_nothing_is_reported(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: Any) -> Any:
        raise error

    reports: list[Report] = []
    options = {"report": reports.append, "inner": fails, "target": "rf8-reference"}
    fast = torch.compile(Scaled().eval(), backend="ggpass", options=options)
    with (
        caplog.at_level(logging.WARNING, "ggpass"),
        torch.no_grad(),
        pytest.raises(Exception, match="backend='ggpass'"),
    ):
        fast(torch.randn(3, 32))
    assert reports == []
    assert f"a graph is not lowered ({type(error).__name__}" in caplog.text
