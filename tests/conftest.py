"""What every test shares: seeds, and the toy format, registered before any test is collected."""

import pytest
import support.toy_format  # noqa: F401
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
