"""One rank of test_integration_ranks, or all of it in one process: trainings by the Trainer with its callback.

python trainer_worker.py trainer RANK FOLDER      two ranks, over gloo on the CPU; FOLDER/port names a free one
"""

import os
import sys
from pathlib import Path
from typing import Any

WORLD = 2

#: Rows in a step, over all ranks.
ROWS = 8


def by_trainer(folder: Path, ranks: int) -> dict[str, Any]:
    """A training over all steps, and one that resumes from its checkpoint.

    Without dropout, whose noise each rank draws for itself; by SGD, whose step does not blow up rounding.
    """
    import test_integration_transformers as it

    it.CONFIG.hidden_dropout_prob = it.CONFIG.attention_probs_dropout_prob = 0.0
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": ROWS // ranks,
        "optim": "sgd",
        # The Trainer would multiply a mean loss by the number of ranks.
        "average_tokens_across_devices": False,
    }
    if ranks > 1:
        arguments["ddp_backend"] = "gloo"
    callback, again = it.BackSlashCallback(**it.TARGET), it.BackSlashCallback(**it.TARGET)
    whole = it.trainer(folder / "out", callback, **arguments)
    whole.train()
    resumed = it.trainer(folder / "out", again, seed=9, **arguments)
    resumed.train(resume_from_checkpoint=str(folder / "out/checkpoint-5"))
    regularizer = callback.regularizer
    assert regularizer is not None
    return {
        "wrapper": type(whole.model_wrapped).__name__,
        "weights": it.weights(whole),
        "resumed": it.weights(resumed),
        "steps": regularizer.steps,
        "bits": regularizer.bits(),
        "logged": [entry["bits_per_weight"] for entry in whole.state.log_history if "loss" in entry],
    }


def main(rank: int, folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    result = by_trainer(folder, WORLD)
    torch.save(result, folder / f"rank-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    told = {"RANK": sys.argv[2], "LOCAL_RANK": sys.argv[2], "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
    told["MASTER_PORT"] = Path(sys.argv[3], "port").read_text()
    os.environ.update({name: str(value) for name, value in told.items()}, MASTER_ADDR="127.0.0.1")
    tests = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(tests), str(tests / "integrations")]
    main(int(sys.argv[2]), Path(sys.argv[3]))
