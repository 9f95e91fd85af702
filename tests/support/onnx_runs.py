"""The three ways an exported file runs: stock ONNX Runtime, onnx.reference, and ONNX Runtime with our library."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ggpass.onnxruntime import library_or_reason, session

onnx = pytest.importorskip("onnx", reason="needs onnx; pip install 'ggpass[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime; pip install 'ggpass[onnx]'")

Feed = dict[str, Tensor]


def _numpy(feed: Feed) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in feed.items()}


def _tensors(results: list[Any]) -> list[Tensor]:
    return [torch.from_numpy(np.asarray(result)) for result in results]


def stock(path: Path, feed: Feed) -> list[Tensor]:
    """ONNX Runtime as it is installed: the operators run by the fallback in the file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return _tensors(opened.run(None, _numpy(feed)))


def reference(path: Path, feed: Feed) -> list[Tensor]:
    """onnx's own evaluator in numpy: slow, and independent of every runtime."""
    from onnx.reference import ReferenceEvaluator

    return _tensors(ReferenceEvaluator(str(path)).run(None, _numpy(feed)))


def library(path: Path, feed: Feed) -> list[Tensor]:
    """ONNX Runtime with the custom-op library, or a skip that says why there is none."""
    reason = library_or_reason()
    if isinstance(reason, str):
        pytest.skip(reason)
    return _tensors(session(path).run(None, _numpy(feed)))


WAYS: dict[str, Callable[[Path, Feed], list[Tensor]]] = {"stock": stock, "reference": reference, "library": library}


def check(path: Path) -> None:
    """onnx.checker with full shape inference, our schemas registered."""
    from ggpass.onnx import schema

    schema.register()
    onnx.checker.check_model(str(path), full_check=True)
