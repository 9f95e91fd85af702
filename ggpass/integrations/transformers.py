"""min D(θ) + λ·R(θ) in the Hugging Face Trainer: BackSlash as a TrainerCallback."""

import dataclasses
import functools
import json
import logging
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ggpass.errors import InputError
from ggpass.integrations.callback import RateCallback
from ggpass.passes.backslash.sharded import is_distributed

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError(f"the Trainer's callback needs {error.name}: pip install 'ggpass[trainer]'") from error


#: The exact weights of a model that trains on its grid, in a file of their own in the Trainer's checkpoint folder.
FILE = "ggpass_exact_weights.safetensors"

log = logging.getLogger(__name__)


class BackSlashCallback(RateCallback, TrainerCallback, ExportableState):
    """Trainer(..., callbacks=[BackSlashCallback(target_bits=1.5)]): few bits, beside the Trainer's own optimizer.

    1. Each step of the real optimizer counts once: an accumulated batch is one, one that AMP skipped is none.
    2. The number of steps comes from the Trainer, so that schedules may be given in shares.
    3. `bits_per_weight`, `rate_strength` (λ) and `zeros` join the Trainer's logs, and with them the progress bar.
    4. The state is saved in each checkpoint's `trainer_state.json`, as plain numbers, and
       `train(resume_from_checkpoint=…)` continues bit for bit, from wherever the checkpoint was moved.
    5. On the grid (`Schedule(on_grid=…)`), the exact weights lie beside it in a safetensors file. The Trainer does not
       tell where it resumes from: a moved folder is named in `TrainingArguments(resume_from_checkpoint=…)` too.

    Works with DDP and FSDP2. DeepSpeed and FSDP1 keep flat copies of the weights: use FSDP2.

    Attributes:
        regularizer: the Regularizer of the current or the last training; None before the first.
    """

    #: By which the last saved state knows its file of exact weights.
    _token = ""

    # For the Trainer.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach, and continue from the checkpoint that the Trainer has loaded.

        Raises:
            WeightError, InputError: as `BackSlash.attach`; an optimizer that is not torch's, two of this callback.
        """
        name = type(self).__name__
        states: Any = state.stateful_callbacks
        entry = states.get(name) or {}
        if isinstance(entry, list):
            raise InputError(f"there are {len(entry)} callbacks of the class {name}; give the Trainer one")
        # Before the first step the entry is of this object itself: of an earlier training, if it had one.
        saved = entry.get("attributes", {}).get("saved") if state.global_step else None
        optimizers, rate_of = [_stepping(kwargs["optimizer"])], functools.partial(_rate_of, saved, args, state)
        steps = {"step": state.global_step, "last_step": state.max_steps}
        self.start(kwargs["model"], optimizers, **steps, saved=saved, who=name, rate_of=rate_of)
        # The Trainer adds to this entry when it saves, and fails if there is none.
        states.setdefault(name, {})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the bits, λ and the zeros to what is logged while training."""
        if logs is None or "loss" not in logs:
            return
        figures = self.figures()
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what is too large for `trainer_state.json`: the exact weights of a model that is on its grid."""
        exact = self.regularizer.state_dict().get("exact_weights") if self.regularizer is not None else None
        if exact:
            save_exact(_folder(args, state), exact, self._token, args.should_save)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the hooks off the optimizer."""
        self.detach()

    def state(self) -> dict[str, Any]:
        """Return the entry of `trainer_state.json`: numbers, lists and strings."""
        saved = self.saved_state()
        if saved is not None:
            self._token = uuid.uuid4().hex
            exact = self._token if saved["rate"].pop("exact_weights", None) else None
            saved |= {"rate": _to_json(saved["rate"]), "exact": exact}
        return {"args": dataclasses.asdict(self.settings), "attributes": {"saved": saved}}


def _rate_of(
    saved: Any, args: TrainingArguments, state: TrainerState, weights: dict[str, nn.Parameter]
) -> dict[str, Any]:
    """Return the Regularizer's state: the entry of `trainer_state.json`, and the exact weights beside it."""
    rate = _from_json(saved["rate"])
    if saved["exact"]:
        named = [args.resume_from_checkpoint] if isinstance(args.resume_from_checkpoint, str) else []
        rate["exact_weights"] = load_exact([*map(Path, named), _folder(args, state)], saved["exact"], weights)
    return rate


def save_exact(folder: Path, tensors: Mapping[str, Tensor], token: str, writes: bool) -> None:
    """Write whole exact weights, beside the final name and renamed; every rank that holds a part must call this.

    Args:
        folder: of the checkpoint.
        tensors: by name of the weight; of any sharding.
        token: what the rest of the checkpoint knows this file by.
        writes: whether this rank is the one that writes.
    """
    whole = {name: t.full_tensor() if is_distributed(t) else t for name, t in tensors.items()}  # type: ignore[attr-defined]
    if not writes:
        return
    if not folder.is_dir():
        log.warning("%s is not there, so the exact weights are not saved: this step cannot be resumed from", folder)
        return
    # A rename within a folder is whole or not at all.
    partial = folder / f".{FILE}.{os.getpid()}"
    save_file({n: t.detach().cpu().contiguous() for n, t in whole.items()}, partial, metadata={"token": token})
    os.replace(partial, folder / FILE)


def load_exact(folders: Iterable[Path], token: str, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the exact weights that were saved with a token, sharded as the weights are.

    Raises:
        InputError: none of the folders holds them.
    """
    tried = [folder / FILE for folder in folders]
    for path in tried:
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("token") == token:
                    return {n: _as(file.get_tensor(n), weights.get(n)) for n in file.keys()}  # noqa: SIM118
    raise InputError(
        f"the checkpoint's {FILE} is in none of {json.dumps([str(path.parent) for path in tried])}; name its folder: "
        "TrainingArguments(resume_from_checkpoint=FOLDER)"
    )


def _as(tensor: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None or not is_distributed(weight):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = weight.device_mesh, weight.placements  # type: ignore[attr-defined]
    moved: Tensor = distribute_tensor(tensor.to(torch.device(mesh.device_type)), mesh, placements)
    return moved


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer puts the checkpoint of this step."""
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _to_json(state: dict[str, Any]) -> dict[str, Any]:
    """JSON keeps every bit of a float64, which all tensors in a state are."""
    return {name: {"float64": v.tolist()} if isinstance(v, torch.Tensor) else v for name, v in state.items()}


def _from_json(state: dict[str, Any]) -> dict[str, Any]:
    tensors = {name: v["float64"] for name, v in state.items() if isinstance(v, dict) and "float64" in v}
    return state | {name: torch.tensor(v, dtype=torch.float64) for name, v in tensors.items()}


def _stepping(optimizer: Any) -> Optimizer:
    """Return the optimizer that steps, inside what accelerate wraps around it: its hooks see real steps alone."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise InputError(
            f"{type(optimizer).__name__} is not a torch optimizer and steps weights of its own; train with DDP or "
            "FSDP2 instead"
        )
    return optimizer
