"""shape_file: the matrices of one safetensors file remapped by DeepShape, into another file."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ggpass.errors import FormatError, GgpassError
from ggpass.graph.report import Skip
from ggpass.graph.weights import Selection, Weight
from ggpass.packed.codec.threads import after_fork
from ggpass.packed.convert import find_aliases
from ggpass.packed.dtypes import TORCH_DTYPES, WEIGHT_DTYPES, as_bytes, as_tensor
from ggpass.packed.layout import Entry, TensorFile, write_layout
from ggpass.packed.manifest import is_packed
from ggpass.packed.staging import Staging, refuse_existing
from ggpass.packed.writer import Progress, Writer, silent
from ggpass.passes.deepshape import DeepShape, ShapeReport
from ggpass.passes.deepshape.weights import Source, reshape


@after_fork()
def shape_file(
    source: Path, target: Path, settings: DeepShape, progress: Progress = silent, replace: bool = False
) -> ShapeReport:
    """`target` = `source` with w' in place of w in every matrix; names, shapes, dtypes and metadata stay.

    1. The source is untouched, and `target` does not exist until it is whole. The same call goes on where an
       interrupted one stopped.
    2. One tensor is in memory at a time, and those that are stored under two names.
    3. Equal tensors are reshaped once. Rows are taken as the output channels: a file does not say what is transposed.

    Args:
        source: a `.safetensors` file.
        target: the new file.
        settings: what to do with which weights.
        progress: called with a tensor's name, the bytes done and the bytes in all; every tensor is read twice.
        replace: whether an old target goes when the new one is whole; without it, one that exists is an error.

    Returns:
        What became of every tensor.

    Raises:
        FormatError: no such file, no safetensors, damaged, packed, or not a file.
        WeightError: NaN or infinity in a weight, or a pattern that matches none.
        GgpassError: the target exists or cannot be written.
    """
    _check_paths(source, target, replace)
    with TensorFile(source) as file:
        if is_packed(file.layout):
            raise FormatError(f"{source} is packed; `ggpass unpack` it first, and pack the reshaped file")
        entries = file.layout.entries
        matrices = [e.name for e in entries.values() if e.dtype in WEIGHT_DTYPES and len(e.shape) >= 2]
        Selection(settings.only, settings.skip).check(matrices)
        report, aliases = ShapeReport("DeepShape"), find_aliases(file)
        weights = _choose(file, settings, aliases, report)
        chosen = [weight.name for weight in weights]
        header = write_layout(entries, file.layout.metadata)
        plan = ["shape 2", str(settings)]
        with (
            Staging(target, json.dumps(plan)) as staging,
            Writer(staging.new, staging.work(), len(header), json.dumps([*plan, file.fingerprint()])) as writer,
        ):
            total, done = 2 * sum(entries[name].nbytes for name in chosen), [0]

            def step(source: Source) -> None:
                done[0] += entries[source.name].nbytes
                progress(source.name, done[0], total)

            def write(source: Source, new: Tensor) -> None:
                for name in (source.name, *(alias for alias, other in aliases.items() if other == source.name)):
                    if name not in writer.records:
                        writer.write(name, [as_bytes(new).data], begin=entries[name].begin)

            sources = [Source(name, entries[name].size, _reader(file, entries[name])) for name in chosen]
            reshaped = reshape(sources, settings, write, step)
            for name in entries:
                if name not in writer.records:
                    writer.write(name, (block.data for block in file.blocks(name)), begin=entries[name].begin)
            writer.finish(header)
            staging.publish(replace)
    report.add(reshaped, settings.step, weights)
    return report


def _check_paths(source: Path, target: Path, replace: bool) -> None:
    for path in (source, target):
        if path.suffix != ".safetensors":
            raise FormatError(f"{path} is not named .safetensors; name one file to read and another to write")
    if not source.is_file():
        raise FormatError(f"{source} is no file; give the .safetensors file of a model (each shard by itself)")
    if source.resolve() == target.resolve():
        raise GgpassError(f"{target} exists already, and is the source; choose another name")
    refuse_existing(target, replace)
    if not target.parent.is_dir():
        raise GgpassError(f"{target.parent} is no directory; make it first")


def _choose(file: TensorFile, settings: DeepShape, aliases: dict[str, str], report: ShapeReport) -> list[Weight]:
    """Return the tensors to reshape, in the order of the file; the others go into the report."""
    weights = []
    for entry in file.layout.entries.values():
        dtype = TORCH_DTYPES.get(entry.dtype)
        if entry.name in aliases:
            continue
        if dtype is None:
            matrix = len(entry.shape) >= 2
            report.skips.append(Skip(entry.name, f"is {entry.dtype}, not a float weight", entry.nbytes, matrix=matrix))
        else:
            names = (entry.name, *(a for a, n in aliases.items() if n == entry.name))
            weights.append(Weight(names, torch.empty(entry.shape, dtype=dtype, device="meta"), lazy=True))
    return Selection(settings.only, settings.skip).choose(weights, report)


def _reader(file: TensorFile, entry: Entry) -> Callable[[], Tensor]:
    return lambda: as_tensor(file.read(entry.name), entry.dtype, entry.shape)
