"""save: a model's tensors to one packed file, lowered weights as their entropy-coded codes."""

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ggpass.errors import FormatError
from ggpass.file.kernels import kernels_to_save
from ggpass.file.state import Value, buffers_beside, state_of, state_of_artifact
from ggpass.packed.codec.threads import after_fork
from ggpass.packed.dtypes import as_bytes, name_of
from ggpass.packed.layout import Entry
from ggpass.packed.manifest import Stored, codebook_hash
from ggpass.packed.methods import Lossless, encode_codes
from ggpass.packed.staging import Staging
from ggpass.packed.writer import Item, assemble
from ggpass.targets.artifact import Artifact


@after_fork()
def save(
    model: nn.Module | Artifact, path: str | Path, *, metadata: Mapping[str, str] | None = None, threads: int = 0
) -> None:
    """Write a model to one packed file: lowered weights as entropy-coded codes, every other tensor as it is.

    Tied and shared tensors are stored once. The file is written under another name, opened, and renamed when it is
    whole. A float model is saved too, uncompressed; `ggpass pack` shrinks such a file.

    Args:
        model: what `ggpass.compile` returned, or any module. Of an Artifact the tensors are saved, not the graph. GPU
            kernels that it was compiled with are saved too.
        path: the new file, named `.safetensors`; an old one is replaced in one step.
        metadata: strings to keep in the file.
        threads: how many; all of the machine's if 0.

    Raises:
        FormatError: a part of the model's state is no tensor with values; a path that is not named `.safetensors`.
        GgpassError: the file cannot be written.
    """
    path, threads = Path(path), threads or os.cpu_count() or 1
    if path.suffix != ".safetensors":
        raise FormatError(f"a packed file is named .safetensors, unlike {path}; any safetensors tool opens it")
    values, aliases = state_of_artifact(model) if isinstance(model, Artifact) else state_of(model)
    items = [_item(name, value, threads) for name, value in values.items()]
    if isinstance(model, nn.Module):
        beside = {name: tensor for name, tensor in buffers_beside(model) if tensor.device.type != "meta"}
        items += [_beside(name, tensor, threads) for name, tensor in beside.items() if name not in values]
    with Staging(path) as staging:
        assemble(
            staging.new,
            staging.work(),
            items,
            aliases=aliases,
            metadata={"format": "pt", **(metadata or {})},
            kernels=kernels_to_save(model),
        )
        staging.publish(replace=True)


def _item(name: str, value: Value, threads: int) -> Item:
    if isinstance(value, Tensor):
        _check_plain(name, value)
        return Item(Entry(name, name_of(value), tuple(value.shape)), _reader(value))
    entry, code = Entry(name, value.dtype, value.shape), codebook_hash(value.format)
    _check_plain(name, value.quantized.codes)
    rows = value.quantized.codes.shape[0]
    stored = Stored("codes", value.dtype, value.shape, 0, value.format.name, code, transposed=value.transposed)
    stored = stored if stored.rows == rows else replace(stored, stack=rows)
    return Item(entry, _reader(value.quantized.codes), lambda: (stored, encode_codes(value.quantized, threads)))


def _beside(name: str, tensor: Tensor, threads: int) -> Item:
    """Return a buffer that a model computes when it is built, and lacks on the meta device."""
    item = _item(name, tensor, threads)
    encode = functools.partial(Lossless().encode, item, threads)  # masks are large and simple
    return replace(item, encode=None if Lossless().reason_to_leave(item.entry) else encode, persistent=False)


def _reader(tensor: Tensor) -> Callable[..., np.ndarray]:
    return lambda begin=0, end=None: as_bytes(tensor)[begin:end]


def _check_plain(name: str, tensor: Tensor) -> None:
    """Raise FormatError if a tensor has no values in rows and columns that could be stored."""
    if is_lazy(tensor) or tensor.device.type == "meta":
        raise FormatError(f"{name} has no values yet ({tensor.device}); load or initialize the model before saving it")
    if tensor.layout is not torch.strided:
        raise FormatError(f"{name} is a {str(tensor.layout).removeprefix('torch.')} tensor; save its to_dense()")
