"""file: a model as one safe file, every weight at its entropy; and that file back as tensors or as a model."""

from pathlib import Path

import torch

from ggpass.file.load import Filled
from ggpass.file.load import load as _load
from ggpass.file.save import save
from ggpass.packed.convert import Packed, PackReport
from ggpass.packed.directory import pack, unpack
from ggpass.packed.methods import Codes, Grid, Lossless, Method, parse_method
from ggpass.packed.reader import PackedFile
from ggpass.targets import place


def load(
    path: str | Path,
    into: Filled | None = None,
    *,
    target: str | None = None,
    device: str | torch.device | None = None,
    threads: int = 0,
    kernels: bool = True,
) -> Filled:
    """Fill a model from a packed file, as `ggpass.load`; `threads` says how many decode, all of the machine's if 0."""
    return _load(Path(path), into, *place(target, device, into), threads=threads, kernels=kernels)


__all__ = [
    "Codes",
    "Grid",
    "Lossless",
    "Method",
    "PackReport",
    "Packed",
    "PackedFile",
    "load",
    "pack",
    "parse_method",
    "save",
    "unpack",
]
