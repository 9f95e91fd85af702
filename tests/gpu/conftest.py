"""The GPU of these tests, and products on it."""

from collections.abc import Callable

import pytest
import torch
from support.cuda_cases import Linear


@pytest.fixture
def gpu() -> torch.device:
    """The GPU; skips with the reason where there is none."""
    from ggpass.kernels.cuda.driver import reason_against

    reason = reason_against()
    if not reason and not torch.cuda.is_available():
        reason = f"torch {torch.__version__} sees no GPU"
    if reason:
        pytest.skip(reason)
    return torch.device("cuda")


@pytest.fixture
def multiply(gpu: torch.device) -> Callable[[Linear], torch.Tensor]:
    """y of a case on the CPU, by the registered operator on copies of its tensors."""

    def product(case: Linear) -> torch.Tensor:
        tensors = (case.x, case.codes, case.scale, case.format.codebook)
        bias = None if case.bias is None else case.bias.to(gpu)
        return torch.ops.ggpass.linear(*(tensor.to(gpu) for tensor in tensors), bias).cpu()

    return product
