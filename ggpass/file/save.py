"""save: a model's tensors to one packed file, lowered weights as their entropy-coded codes."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ggpass.errors import FormatError
from ggpass.file.kernels import kernels_to_save
from ggpass.formats import Format, Quantized
from ggpass.lowering.modules import Lowered, LoweredWeight
from ggpass.packed.checkpoint import DTYPE_BITS
from ggpass.packed.codec import crc32c
from ggpass.packed.codec.container import Piece, check_of
from ggpass.packed.dtypes import as_bytes, name_of
from ggpass.packed.layout import Entry, write_layout
from ggpass.packed.manifest import Manifest, Stored, codebook_hash, seal
from ggpass.packed.methods import Array, encode_codes
from ggpass.packed.writer import Writer
from ggpass.targets.artifact import Artifact

_ANY_SIZE = 10**15


@dataclass(frozen=True)
class CodedWeight:
    """A weight that is saved as codes.

    Attributes:
        quantized: codes and scale.
        format: of the codes.
        dtype, shape: of the weight they stand for, by safetensors' name.
        transposed: whether the codes are those of the transposed matrix.
    """

    quantized: Quantized
    format: Format
    dtype: str
    shape: tuple[int, ...]
    transposed: bool = False


Item = Tensor | CodedWeight


def items_of(model: nn.Module) -> tuple[dict[str, Item], dict[str, str]]:
    """What to save under which name, and the names that share another one's tensor."""
    items: dict[str, Item] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}

    def add(name: str, key: Any, item: Item) -> None:
        if key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            items[name] = item

    lowered: set[str] = set()  # whose codes, scale and format the manifest holds in its own way
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Lowered) and isinstance(module, nn.Module):
            held: LoweredWeight = module.lowered
            prefix = f"{path}." if path else ""
            lowered.add(f"{prefix}lowered.")
            coded = Quantized(held.codes, held.scale)
            dtype = name_of(torch.empty(0, dtype=held.dtype))
            item = CodedWeight(coded, held.format, dtype, tuple(held.shape), held.transposed)
            add(f"{prefix}weight", id(held), item)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if f"{name.rpartition('.')[0]}." in lowered:
            continue
        if not isinstance(tensor, Tensor):
            raise FormatError(f"{name} is {type(tensor).__name__}, not a tensor, and such a file holds tensors only")
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else id(tensor)
        add(name, key, tensor)
    return items, aliases


def save(
    model: nn.Module | Artifact, path: str | Path, *, metadata: Mapping[str, str] | None = None, threads: int = 0
) -> None:
    """Write a model to one packed file: lowered weights as entropy-coded codes, every other tensor as it is.

    Tied and shared tensors are stored once. The file is written under another name and renamed when it is whole. A
    float model is saved too, uncompressed; `ggpass pack` shrinks such a file.

    Args:
        model: what `ggpass.compile` returned, or any module. Of an Artifact the tensors are saved, not the graph. GPU
            kernels that it was compiled with are saved too.
        path: the new file, named `.safetensors`; an old one is replaced in one step.
        metadata: strings to keep in the file.
        threads: how many; all of the machine's if 0.

    Raises:
        FormatError: a part of the model's state is no tensor; a path that is not named `.safetensors`.
        GgpassError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise FormatError(f"a packed file is named .safetensors, unlike {path}; any safetensors tool opens it")
    items: Mapping[str, Item]
    aliases: dict[str, str]
    if isinstance(model, Artifact):
        from ggpass.file.artifact import items_of_artifact

        items, aliases = items_of_artifact(model), {}
    else:
        items, aliases = items_of(model)
    kernels, metadata = kernels_to_save(model), {"format": "pt", **(metadata or {})}
    write_items(items, aliases, path, metadata, threads or os.cpu_count() or 1, kernels)


def write_items(
    items: Mapping[str, Item],
    aliases: Mapping[str, str],
    path: Path,
    metadata: Mapping[str, str],
    threads: int,
    kernels: Mapping[str, bytes] | None = None,
) -> None:
    """Write tensors, coded weights and kernels as one packed file."""
    kernels = kernels or {}
    # Plain tensors first, the widest elements ahead, so that all lie aligned for tools that map the file.
    order = sorted(items, key=lambda name: (isinstance(items[name], CodedWeight), -DTYPE_BITS[_dtype(items[name])]))
    worst = {name: Entry(name, _dtype(item), _shape(item), _ANY_SIZE, _ANY_SIZE) for name, item in items.items()}
    unknown = {name: replace(_stored(item), check=2**32 - 1) for name, item in items.items()}
    for name, item in items.items():
        if isinstance(item, CodedWeight):
            worst[name] = Entry(name, "U8", (_ANY_SIZE,), _ANY_SIZE, _ANY_SIZE)
    worst |= {name: Entry(name, "U8", (_ANY_SIZE,), _ANY_SIZE, _ANY_SIZE) for name in kernels}
    sealed = Manifest(unknown, dict(aliases), dict(metadata), dict.fromkeys(kernels, 2**32 - 1))
    room = len(write_layout(worst, sealed.as_metadata()))
    with Writer(path, room) as writer:
        entries, stored = {}, {}
        for name in order:
            checks: list[int] = []
            item = items[name]
            record = writer.write(name, _pieces(item, checks, threads))
            stored[name] = replace(_stored(item), check=_check(checks) if isinstance(item, CodedWeight) else record.crc)
            size = record.end - record.begin
            shape, dtype = ((size,), "U8") if isinstance(item, CodedWeight) else (_shape(item), _dtype(item))
            entries[name] = Entry(name, dtype, shape, record.begin, record.end)
        checks_of_kernels = {}
        for name, data in kernels.items():
            record = writer.write(name, [data])
            checks_of_kernels[name] = record.crc
            entries[name] = Entry(name, "U8", (len(data),), record.begin, record.end)
        in_order = {name: stored[name] for name in items}
        manifest = Manifest(in_order, dict(aliases), dict(metadata), checks_of_kernels)
        writer.finish(seal(write_layout(entries, manifest.as_metadata(), room)))


def _dtype(item: Item) -> str:
    return item.dtype if isinstance(item, CodedWeight) else name_of(item)


def _shape(item: Item) -> tuple[int, ...]:
    return tuple(item.shape)


def _stored(item: Item) -> Stored:
    if not isinstance(item, CodedWeight):
        return Stored("plain", name_of(item), tuple(item.shape))
    code = codebook_hash(item.format)
    return Stored("codes", item.dtype, item.shape, 0, item.format.name, code, transposed=item.transposed)


def _pieces(item: Item, checks: list[int], threads: int) -> Iterator[Piece]:
    if not isinstance(item, CodedWeight):
        yield as_bytes(item).data
        return
    arrays: Iterator[Array] = encode_codes(item.quantized, threads)
    for array in arrays:
        checks.append(check_of(array[0]))
        yield from array


def _check(checks: list[int]) -> int:
    return crc32c(np.array(checks, dtype="<u4").view(np.uint8))
