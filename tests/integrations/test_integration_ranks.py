"""The Trainer's callback on two ranks under DDP: the ranks agree, and train what one process trains."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from support import trainer_worker as worker
from support.closeness import assert_rejects_corruption
from support.ranks import DISTRIBUTED, run_ranks
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.skipif(not DISTRIBUTED, reason="this torch has no gloo")

#: Weights are at most 1.1 (norms) and float32 (u = 6e-8); a gradient is a sum of some 1000 rounded terms in another
#: order, each of size below 1, so that it is off by 1000·u at most. 10 steps at a learning rate of 1e-2, and the rate's
#: shrinking, which widens nothing for ν = 1: 1e-2·10·1000·6e-8 = 6e-6.
TOLERANCE = 6e-6


def flat(weights: list[Tensor]) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in weights])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    return run_ranks("trainer", folder, script=worker.__file__)


def test_ranks_agree_to_the_last_bit_and_resume_so(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert first["wrapper"] == "DistributedDataParallel"
    assert torch.equal(flat(first["weights"]), flat(second["weights"]))
    assert (first["bits"], first["steps"]) == (second["bits"], second["steps"])
    assert second["steps"] == 10
    for run in ranks:
        assert torch.equal(flat(run["resumed"]), flat(run["weights"]))


def test_they_train_what_one_process_trains(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = worker.by_trainer(tmp_path, ranks=1)
    finally:
        torch.set_num_threads(threads)
    assert one["wrapper"] == "BertForSequenceClassification"
    assert_rejects_corruption(flat(ranks[0]["weights"]), flat(one["weights"]).double(), TOLERANCE)
    assert int((flat(one["weights"]) == 0).sum()) > 32, "the rate makes zeros beyond the padding rows"
    # One symbol of 1088 on the other side of a boundary changes the bits by log2(n)/n.
    assert ranks[0]["logged"] == pytest.approx(one["logged"], abs=0.01)
