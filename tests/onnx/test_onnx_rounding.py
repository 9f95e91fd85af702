"""The export check's bounds: wide enough for whatever sums much, and narrow enough that a wrong file fails."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ggpass
from ggpass import TargetError
from ggpass.onnx.rounding import _contracted

pytest.importorskip("onnxscript", reason="needs onnxscript; pip install 'ggpass[onnx]'")


class Around(nn.Module):
    """y = f(linear(x), x)."""

    def __init__(self, inner: nn.Module, f: Callable[..., Tensor]) -> None:
        super().__init__()
        self.inner, self.f = inner, f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.inner(x), x)


def linear(size: int = 32, out: int = 16) -> nn.Linear:
    return nn.Linear(size, out)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape)


#: name → the module inside, what is computed with its result h and the input x, and x.
SUMS: dict[str, tuple[nn.Module, Callable[..., Tensor], Tensor]] = {
    "einsum": (linear(), lambda h, x: torch.einsum("bij,bkj->bik", h, h), randn(3, 9, 32)),
    "einsum over rows": (linear(), lambda h, x: torch.einsum("ni,nj->ij", h, x), randn(4000, 32)),
    "einsum without an arrow": (linear(), lambda h, x: torch.einsum("in,nj", h.t(), x), randn(900, 32)),
    "einsum with an ellipsis": (linear(), lambda h, x: torch.einsum("...ij,...kj->...ik", h, h), randn(2, 3, 9, 32)),
    "embedding and two einsums": (
        nn.Embedding(50, 64),
        lambda h, x: torch.einsum("bsd,btd->bst", h, torch.einsum("bsd,btd->bst", h, h) @ h),
        torch.randint(0, 50, (2, 7)),
    ),
    "sum over rows": (linear(), lambda h, x: h.sum(0), randn(200_000, 32)),
    "mean over two dimensions": (linear(), lambda h, x: h.mean((0, 1)), randn(300, 400, 32)),
    "sum of all": (linear(), lambda h, x: h.sum(), randn(20_000, 32)),
    "cumulative sum": (linear(), lambda h, x: h.cumsum(1), randn(2, 4000, 32)),
    "softmax over rows": (linear(), lambda h, x: h.softmax(0), randn(4000, 32)),
    "logsumexp": (linear(), lambda h, x: torch.logsumexp(h, 0), randn(4000, 32)),
    "variance": (linear(), lambda h, x: h.var(0), randn(4000, 32)),
    "product from the left": (linear(), lambda h, x: h.t() @ x, randn(8000, 32)),
    "concatenation": (linear(), lambda h, x: torch.cat([h, x], -1).sum(1), randn(3, 3000, 32)),
    "transposed convolution": (
        nn.Conv2d(3, 32, 3),
        lambda h, x: nn.functional.conv_transpose2d(h, torch.ones(32, 8, 4, 4), stride=2),
        randn(2, 3, 20, 20),
    ),
    "group norm": (nn.Conv2d(3, 32, 3), lambda h, x: nn.functional.group_norm(h, 4), randn(2, 3, 40, 40)),
    "pooling of all": (nn.Conv2d(3, 32, 3), lambda h, x: h.mean((2, 3)), randn(2, 3, 90, 90)),
}


@pytest.mark.parametrize("case", SUMS)
def test_a_right_file_passes(case: str, tmp_path: Path) -> None:
    inner, f, x = SUMS[case]
    artifact = ggpass.export_onnx(Around(inner, f).eval(), (x,), tmp_path / "m.onnx")
    assert artifact.report.parts[-1].notes[-1].startswith("checked in ONNX Runtime")


@pytest.mark.parametrize("case", ["einsum", "einsum over rows", "embedding and two einsums", "variance"])
def test_a_wrong_file_fails(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales off by 1 %: with bounds for long sums, too."""
    import onnx_ir as ir

    from ggpass.onnx import save

    def spoil(model: Any, fallback: Any) -> None:
        first = next(n for n in model.graph if n.domain == "ai.ggpass")
        scale = first.inputs[2]
        scale.const_value = ir.tensor(scale.const_value.numpy() * 1.01, name=scale.name)
        attach(model, fallback)

    attach = save.attach_functions
    monkeypatch.setattr(save, "attach_functions", spoil)
    inner, f, x = SUMS[case]
    with pytest.raises(TargetError, match="does not compute what the model does"):
        ggpass.export_onnx(Around(inner, f).eval(), (x,), tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("equation", "shapes", "length"),
    [
        ("ij,jk->ik", [(2, 3), (3, 5)], 3),
        ("ij,jk", [(2, 3), (3, 5)], 3),
        ("ij,kl->", [(2, 3), (5, 7)], 210),
        ("...ij,...j->...i", [(9, 2, 3), (9, 3)], 3),
        ("b...i, ij -> b...j", [(2, 9, 8, 3), (3, 5)], 3),
        ("ii->i", [(4, 4)], 1),
        ("i,j->ij", [(4,), (5,)], 1),
    ],
)
def test_what_an_einsum_sums_over(equation: str, shapes: list[tuple[int, ...]], length: int) -> None:
    tensors = [torch.ones(shape) for shape in shapes]
    assert _contracted(equation, tensors) == length
    # Of ones, each number of the result is how many products went into it.
    assert torch.einsum(equation, *tensors).max() == length
