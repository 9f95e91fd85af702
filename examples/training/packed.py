"""A trained model as a file at its entropy: weights on their grid, tied ones once, and back without a loss."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_model
from torch import nn

import ggpass
from ggpass.file import pack

from .task import matrices


def on_grid(model: nn.Module, step: float) -> nn.Module:
    """A copy whose matrices are Δ·round(θ/Δ)."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for weight in matrices(rounded):
            weight.copy_((weight / step).round_().mul_(step))
    return rounded


def save_packed(model: nn.Module, step: float, path: Path) -> tuple[int, int]:
    """Write a model that is on a grid as one packed file, and read it back.

    Args:
        model: its matrices are multiples of `step`.
        step: Δ.
        path: the new file; an old one is replaced.

    Returns:
        Bytes of the model in float32 and of the packed file.

    Raises:
        ValueError: the file gives back other weights than the model's.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        plain, packed = Path(folder) / "float32.safetensors", Path(folder) / "packed.safetensors"
        save_model(model, str(plain))
        pack(plain, packed, f"grid:{step!r}")
        again = ggpass.load(packed, into=copy.deepcopy(model))
        state = again.state_dict()
        different = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])]
        if different:
            raise ValueError(f"{packed} does not give back {', '.join(different)}; is the model on a grid of {step:g}?")
        sizes = plain.stat().st_size, packed.stat().st_size
        packed.replace(path)
    return sizes
