"""The exact weights of a model that trains on its grid, in a file of their own in the Trainer's checkpoint folder."""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ggpass.errors import InputError
from ggpass.passes.backslash.sharded import is_distributed

FILE = "ggpass_exact_weights.safetensors"

log = logging.getLogger(__name__)


def save(folder: Path, tensors: Mapping[str, Tensor], token: str, writes: bool) -> None:
    """Write the whole tensors, beside the final name and renamed; every rank that holds a part must call this.

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


def load(folders: Iterable[Path], token: str, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the tensors that were saved with a token, sharded as the weights are.

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
