"""One rank of test_distributed, or all of it in one process: trains a tiny model and writes what came out of it.

python distributed_worker.py WAY RANK FOLDER      WAY is ddp or fsdp; two ranks, over gloo on the CPU
"""

import contextlib
import datetime
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ggpass.errors import InputError
from ggpass.passes.backslash import BackSlash
from ggpass.training import Regularizer, Schedule

WORLD = 2
STEPS = 12
BATCH = 8
LEARNING_RATE = 2e-2
#: Adam's; large, so that its step is a smooth function of the gradient and rounding is not blown up.
EPSILON = 1e-3

SETTINGS = BackSlash(strength=0.05, refit_every=3, total_steps=STEPS)
#: Name -> settings and micro-batches of a step.
CASES = {
    "strength": (replace(SETTINGS, schedule=Schedule(warm_up=2, tail=3)), 1),
    "target": (replace(SETTINGS, strength=None, target_bits=2.0), 1),
    "coupled": (replace(SETTINGS, mode="coupled"), 1),
    "accumulated": (SETTINGS, 2),
    "on grid": (replace(SETTINGS, schedule=Schedule(on_grid=5)), 1),
    "free": (replace(SETTINGS, strength=0.0), 1),
}

#: Case -> after how many steps it is stopped; "on grid" is there from the seventh.
RESUMED = {"target": 5, "on grid": 9}


class Net(nn.Module):
    """Uneven and empty shards, and a weight that does not train. In float64: what differs is then no rounding."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(13, 8)  # 7 and 6 rows
        self.hidden = nn.Linear(8, 7)  # 4 and 3 rows
        self.frozen = nn.Linear(7, 7)
        self.head = nn.Linear(7, 1, bias=False)  # 1 and 0 rows
        self.frozen.requires_grad_(False)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.hidden(self.embedding(ids).mean(1)))
        return self.head(self.frozen(x)).squeeze(1)


class Training:
    """A model, its optimizer and its data, whole or as one rank's part."""

    def __init__(self, way: str, rank: int, seed: int = 0) -> None:
        self.way, self.rank = way, rank
        self.ranks = 1 if way == "one" else WORLD
        self.module = self.model = Net(seed)
        if way == "ddp":
            self.model = nn.parallel.DistributedDataParallel(self.module)
        if way == "fsdp":
            shard(self.module)
        self.optimizer = adamw(self.module)

    def attach(self, settings: BackSlash) -> Regularizer:
        return settings.attach(self.module, self.optimizer)

    def steps(self, first: int, last: int, micro_batches: int = 1) -> None:
        for step in range(first, last):
            ids, targets = batch(step)
            size = BATCH // self.ranks // micro_batches
            for micro in range(micro_batches):
                begin = (self.rank * micro_batches + micro) * size
                part = slice(begin, begin + size)
                with self.synchronizing(micro == micro_batches - 1):
                    loss = nn.functional.mse_loss(self.model(ids[part]), targets[part]) / micro_batches
                    loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def synchronizing(self, on: bool) -> Any:
        if self.way == "fsdp":
            self.module.set_requires_gradient_sync(on)
        return self.model.no_sync() if self.way == "ddp" and not on else contextlib.nullcontext()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, 13, (BATCH, 3), generator=generator)
    return ids, torch.randn(BATCH, generator=generator, dtype=torch.float64)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, eps=EPSILON)


def shard(module: Net) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(module.hidden)
    fully_shard(module)


def whole(tensor: Tensor) -> Tensor:
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[attr-defined]
    return full.detach().clone()


def outcome(training: Training, regularizer: Regularizer) -> dict[str, Any]:
    state = regularizer.state_dict()
    return {
        "weights": {name: whole(parameter) for name, parameter in training.module.named_parameters()},
        "rows": {
            name: (p.to_local() if hasattr(p, "to_local") else p).shape[0]
            for name, p in training.module.named_parameters()
        },
        "bits": regularizer.bits(),
        "exact": {name: whole(tensor) for name, tensor in state.pop("exact_weights", {}).items()},
        "state": state,
    }


def run_cases(way: str, rank: int = 0) -> dict[str, Any]:
    found = {}
    for name, (settings, micro_batches) in CASES.items():
        training = Training(way, rank)
        regularizer = training.attach(settings)
        training.steps(0, STEPS, micro_batches)
        found[name] = outcome(training, regularizer)
    return found


def run_resumed(rank: int, folder: Path, case: str, stop: int) -> dict[str, Any]:
    """A case that is stopped after some steps and continued by another model from its files."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    settings, _ = CASES[case]
    folder = folder / f"checkpoint {case}"
    training = Training("fsdp", rank)
    regularizer = training.attach(settings)
    training.steps(0, stop)
    model, optimizer = get_state_dict(training.module, training.optimizer)
    state = {"model": model, "optimizer": optimizer, "rate": regularizer.state_dict()}
    dcp.save(state, checkpoint_id=folder)

    training = Training("fsdp", rank, seed=1)
    # Ahead of attach: asking a fresh optimizer for its state makes it step once.
    model, optimizer = get_state_dict(training.module, training.optimizer)
    regularizer = training.attach(settings)
    state = {"model": model, "optimizer": optimizer, "rate": regularizer.state_dict()}
    if settings.schedule.on_grid:  # what is not in the dict is not loaded
        of = dict(zip(regularizer.names, regularizer.weights))
        state["rate"]["exact_weights"] = {name: torch.empty_like(weight) for name, weight in of.items()}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        training.module, training.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    regularizer.load_state_dict(state["rate"])
    training.steps(stop, STEPS)
    return outcome(training, regularizer)


def run_too_early() -> dict[str, str]:
    """What is raised where the Parameters of a Regularizer, an optimizer or both were replaced since they were made."""
    messages = {}
    for name in ("regularizer", "optimizer", "both"):
        module = Net()
        regularizer, optimizer = Regularizer(module, SETTINGS), adamw(module)
        shard(module)
        if name == "regularizer":
            optimizer = adamw(module)
        if name == "optimizer":
            regularizer = Regularizer(module, SETTINGS)
        try:
            regularizer.attach(optimizer)
            messages[name] = "nothing was raised"
        except InputError as error:
            messages[name] = str(error)
    return messages


def main(way: str, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=600),
    )
    found = run_cases(way, rank)
    if way == "fsdp":
        found["resumed"] = {case: run_resumed(rank, folder, case, stop) for case, stop in RESUMED.items()}
        found["too early"] = run_too_early()
    torch.save(found, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    # Without waiting for what other threads of the process may still do.
    sys.stdout.flush()
    os._exit(0)
