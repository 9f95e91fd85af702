"""What every test shares: seeds, and the toy format and target, registered before any test is collected."""

import pytest
import support.toy_format
import support.toy_target  # noqa: F401
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
