"""shape_file: the matrices of one safetensors file remapped by DeepShape, into another file."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from ggpass.errors import FormatError, GgpassError
from ggpass.graph.report import Change, Skip
from ggpass.packed.convert import Progress, check_patterns, find_aliases, silent
from ggpass.packed.dtypes import WEIGHT_DTYPES, as_bytes, as_tensor
from ggpass.packed.layout import Entry, TensorFile, write_layout
from ggpass.packed.manifest import is_packed
from ggpass.packed.writer import Writer
from ggpass.passes.deepshape import DeepShape, ShapeReport, reason_by_name
from ggpass.passes.deepshape.figures import in_words, summary
from ggpass.passes.deepshape.weights import Source, reshape


def shape_file(source: Path, target: Path, settings: DeepShape, progress: Progress = silent) -> ShapeReport:
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

    Returns:
        What became of every tensor.

    Raises:
        FormatError: no such file, no safetensors, damaged, packed, or not a file.
        WeightError: NaN or infinity in a weight, or a pattern that matches none.
        GgpassError: the target exists or cannot be written.
    """
    _check_paths(source, target)
    with TensorFile(source) as file:
        if is_packed(file.layout):
            raise FormatError(f"{source} is packed; `ggpass unpack` it first, and pack the reshaped file")
        entries = file.layout.entries
        matrices = [e.name for e in entries.values() if e.dtype in WEIGHT_DTYPES and len(e.shape) >= 2]
        check_patterns(matrices, settings.only, settings.skip)
        report, aliases = ShapeReport("DeepShape"), find_aliases(file)
        chosen = _choose(file, settings, aliases, report)
        header = write_layout(entries, file.layout.metadata)
        stat = source.stat()
        plan = json.dumps(["shape 1", str(settings), stat.st_size, stat.st_mtime_ns])
        with Writer(target, len(header), plan) as writer:
            copier = _Copier(file, writer, {a: n for a, n in aliases.items() if n in chosen})
            total, done = 2 * sum(entries[name].nbytes for name in chosen), [0]

            def step(source: Source) -> None:
                done[0] += entries[source.name].nbytes
                progress(source.name, done[0], total)

            sources = [Source(name, entries[name].size, _reader(file, entries[name])) for name in chosen]
            reshaped = reshape(sources, settings, lambda source, new: copier.write(source.name, new), step)
            copier.write_rest()
            writer.finish(header)
    report.skips += [Skip(name, reason, entries[name].nbytes) for name, reason in reshaped.skipped]
    for shaped in reshaped.shaped:
        names = [shaped.name, *(a for a, n in aliases.items() if n == shaped.name)]
        report.changes.append(Change(" = ".join(names), in_words(shaped)))
    report.notes.append(summary(reshaped, settings.step))
    report.reshaped = reshaped
    return report


def _check_paths(source: Path, target: Path) -> None:
    for path in (source, target):
        if path.suffix != ".safetensors":
            raise FormatError(f"{path} is not named .safetensors; name one file to read and another to write")
    if not source.is_file():
        raise FormatError(f"{source} is no file; give the .safetensors file of a model (each shard by itself)")
    if target.exists():
        raise GgpassError(f"{target} exists already; choose another name, or remove it first")
    if not target.parent.is_dir():
        raise GgpassError(f"{target.parent} is no directory; make it first")


def _choose(file: TensorFile, settings: DeepShape, aliases: dict[str, str], report: ShapeReport) -> list[str]:
    """The names of the tensors to reshape, in the order of the file; the others go into the report."""
    names = {name: [name, *(a for a, n in aliases.items() if n == name)] for name in file.layout.entries}
    chosen = []
    for entry in file.layout.entries.values():
        if entry.name in aliases:
            continue
        matrix = len(entry.shape) >= 2
        if entry.dtype not in WEIGHT_DTYPES:
            reason = f"is {entry.dtype}, not a float weight"
        elif not matrix:
            reason = f"{len(entry.shape)}-D (bias, norm): stays as it is"
        else:
            reason = reason_by_name(names[entry.name], settings.only, settings.skip)
        if reason:
            report.skips.append(Skip(entry.name, reason, entry.nbytes, matrix=matrix))
        else:
            chosen.append(entry.name)
    return chosen


def _reader(file: TensorFile, entry: Entry) -> Callable[[], Tensor]:
    return lambda: as_tensor(file.read(entry.name), entry.dtype, entry.shape)


class _Copier:
    """Writes tensors in the order of the source: new ones as they come, all others as they were."""

    def __init__(self, file: TensorFile, writer: Writer, aliases: dict[str, str]) -> None:
        self.file, self.writer, self.aliases = file, writer, aliases
        self.left = list(file.layout.entries)
        self.kept: dict[str, np.ndarray] = {}

    def write(self, name: str, new: Tensor) -> None:
        """The new values of `name`, after everything that lies ahead of it."""
        while self.left[0] != name:
            self._write_next()
        data = as_bytes(new)
        if name in self.aliases.values():
            self.kept[name] = data
        self._write_next(data)

    def write_rest(self) -> None:
        """Everything that is not written yet, as it was."""
        while self.left:
            self._write_next()

    def _write_next(self, data: np.ndarray | None = None) -> None:
        name = self.left.pop(0)
        if name in self.writer.records:
            return
        if data is None:
            kept = self.kept.get(self.aliases.get(name, ""))
            data = self.file.read(name) if kept is None else kept
        self.writer.write(name, [data.data])
