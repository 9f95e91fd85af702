"""The target `cpu`: kernels where they can be had, the reference where not, said once; and how targets are named."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.closeness import assert_rejects_corruption, dot_bound
from torch import nn

import ggpass
from ggpass.formats import FORMATS, quantize
from ggpass.kernels import cache
from ggpass.targets import TARGETS, cpu, resolve


@pytest.fixture
def _no_tvm_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As on a machine where only torch and ggpass are installed, and nothing was ever built."""
    monkeypatch.setattr(cache, "default_directory", lambda: tmp_path)
    monkeypatch.setattr(cache, "version_of", lambda distribution: None)
    cpu._load.cache_clear()
    yield
    cpu._load.cache_clear()


@pytest.mark.usefixtures("_no_tvm_no_cache")
def test_without_kernels_the_reference_runs_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    linear, x = nn.Linear(70, 33), torch.randn(5, 70)
    with caplog.at_level(logging.WARNING, logger="ggpass"):
        first, second = (ggpass.compile(linear, target="rf8-cpu") for _ in range(2))
        got = first(x)
        second(x)
    warnings = [r.getMessage() for r in caplog.records if r.name == "ggpass"]
    assert len(warnings) == 1
    assert "torch reference" in warnings[0]
    assert "pip install 'ggpass[tvm]'" in warnings[0]
    assert any("pip install 'ggpass[tvm]'" in note for note in ggpass.report(second).notes)
    quantized = quantize(linear.weight.detach(), FORMATS["rf8"])
    values = FORMATS["rf8"].decode(quantized.codes)
    assert linear.bias is not None
    expected = x.double() @ (values.double() * quantized.scale.double()[:, None]).T + linear.bias.detach().double()
    assert_rejects_corruption(got.detach(), expected, dot_bound(x, values, quantized.scale, linear.bias.detach()))


def test_with_kernels_the_report_names_the_processor() -> None:
    note = ggpass.report(ggpass.compile(nn.Linear(70, 33), target="rf8-cpu")).notes[0]
    assert note.startswith("kernels for ") or "pip install" in note


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("device", TARGETS)
def test_every_pair_of_halves_resolves_or_says_why(fmt: str, device: str) -> None:
    reason = TARGETS[device].unavailable()
    if reason:
        with pytest.raises(ggpass.TargetError, match="cannot be used here"):
            resolve(f"{fmt}-{device}")
    else:
        resolved = resolve(f"{fmt}-{device}")
        assert resolved == (FORMATS[fmt], TARGETS[device])


def test_an_unusable_device_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(cpu.CpuTarget):
        def unavailable(self) -> str | None:
            return "its power cord is missing; plug it in"

    monkeypatch.setitem(TARGETS, "toaster", Broken("toaster"))
    with pytest.raises(ggpass.TargetError, match=r"cannot be used here: its power cord.*formats: rf8.*devices: cpu"):
        resolve("rf8-toaster")
