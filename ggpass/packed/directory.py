"""pack, unpack: a file, or a Hugging Face directory with its shards, configuration and tokenizer."""

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ggpass.errors import FormatError, GgpassError
from ggpass.graph.weights import Selection
from ggpass.packed.checkpoint import INDEX_SUFFIX, PICKLE_SUFFIXES, Checkpoint, read_index
from ggpass.packed.codec.threads import after_fork
from ggpass.packed.convert import PackReport, pack_file, unpack_file
from ggpass.packed.layout import TensorFile
from ggpass.packed.methods import Method, parse_method
from ggpass.packed.reader import PackedFile
from ggpass.packed.staging import PART_SUFFIX, Staging, refuse_existing
from ggpass.packed.untrusted import read_json
from ggpass.packed.writer import Progress, silent

SUFFIX = ".safetensors"

T = TypeVar("T")


@after_fork()
def pack(
    source: str | Path,
    target: str | Path,
    method: str | Method = "rf8",
    *,
    loss: float | None = None,
    only: tuple[str, ...] = (),
    skip: tuple[str, ...] = (),
    threads: int | None = None,
    progress: Progress = silent,
    replace: bool = False,
) -> PackReport:
    """Pack a checkpoint: each weight matrix at the entropy of its codes, everything else as it is.

    Args:
        source: a `.safetensors` file, an index of shards, or a directory that holds either.
        target: the new file, or the new directory.
        method: the name of a format, `grid[:step]` or `lossless` (see `parse_method`), or a Method.
        loss: grid without a step: the relative squared error that each tensor may have.
        only, skip: patterns on names, as `ggpass.compile` takes them.
        threads: how many; all of the machine's if left out.
        progress: called with the tensor's name, the bytes done and the bytes in all of the file at hand.
        replace: whether an old target goes when the new one is whole; without it, one that exists is an error.

    Raises:
        FormatError: damaged or unknown source, an unknown method.
        WeightError: a tensor cannot be held this way (NaN, infinity); a pattern that matches nothing.
        GgpassError: the target exists or cannot be written; the source is untouched, and the same call goes on later.
    """
    source, target = _source(Path(source)), Path(target)
    chosen = parse_method(method, loss) if isinstance(method, str) else method
    threads = threads or os.cpu_count() or 1
    names: list[str] = []
    for file in _tensor_files(source):
        with TensorFile(file) as opened:
            names += opened.layout.entries
    Selection(only, skip).check(names)

    one = functools.partial(pack_file, method=chosen, only=only, skip=skip, threads=threads, progress=progress)
    plan = json.dumps(["pack", chosen.name, only, skip])
    reports, notes = _convert(source, target, plan, one, lambda index: Checkpoint(index), replace)
    tensors = tuple(tensor for report in reports for tensor in report.tensors)
    return PackReport(tensors, sum(report.file_bytes for report in reports), notes)


@after_fork()
def unpack(
    source: str | Path,
    target: str | Path,
    *,
    threads: int | None = None,
    progress: Progress = silent,
    replace: bool = False,
) -> tuple[str, ...]:
    """Write what `pack` packed as plain safetensors again: decoded values in the original dtypes.

    Args:
        source, target, threads, progress, replace: as for `pack`.

    Returns:
        Notes on files that were left out.

    Raises:
        FormatError: damaged, not packed, or claiming more than its size can hold; the message names file and tensor.
        GgpassError: the target exists or cannot be written.
    """
    source = _source(Path(source))
    one = functools.partial(unpack_file, threads=threads or os.cpu_count() or 1, progress=progress)
    _, notes = _convert(source, Path(target), "unpack", one, lambda index: PackedFile(index).close(), replace)
    return notes


def _source(path: Path) -> Path:
    if not path.exists():
        raise FormatError(f"{path} does not exist; give a {SUFFIX} file or the directory of a saved model")
    if path.name.endswith(INDEX_SUFFIX):
        return path.parent
    if not path.is_dir() and not path.is_file():
        raise FormatError(f"{path} is no regular file; give a {SUFFIX} file or the directory of a saved model")
    if path.is_file() and path.suffix != SUFFIX:
        raise FormatError(f"{path} is not named {SUFFIX}; save the model as safetensors first")
    if path.is_dir() and not _tensor_files(path):
        raise FormatError(f"{path} holds no {SUFFIX} file; save the model as safetensors first")
    return path


def _files(directory: Path) -> list[Path]:
    """Return every file below a directory, sorted, without what interrupted runs left there.

    Links to files are followed, as in a Hugging Face cache; links to directories are not.

    Raises:
        FormatError: a link that leads nowhere, a pipe or a device; the message names it.
    """
    found = []
    for root, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not name.endswith(PART_SUFFIX)]
        found += [Path(root) / name for name in names]
    for file in found:
        if not file.is_file():
            raise FormatError(f"{file} is no file that can be read (a link to nothing, or a pipe); remove it")
    return sorted(found)


def _tensor_files(source: Path) -> list[Path]:
    return [source] if source.is_file() else [file for file in _files(source) if file.suffix == SUFFIX]


def _check_target(source: Path, target: Path, replace: bool) -> None:
    refuse_existing(target, replace)
    if not target.parent.is_dir():
        raise GgpassError(f"{target.parent} is no directory; make it first")
    if source.is_file() and target.suffix != SUFFIX:
        raise GgpassError(f"a packed file is named {SUFFIX}, unlike {target}; any safetensors tool opens it")
    mine, theirs = source.resolve(), target.resolve()
    if mine == theirs or mine in theirs.parents or theirs in mine.parents:
        raise GgpassError(f"{target} lies inside {source}, or the other way round; choose a place outside of it")


def _convert(
    source: Path,
    target: Path,
    plan: str,
    convert: Callable[[Path, Path, Path], T],
    open_index: Callable[[Path], object],
    replace: bool,
) -> tuple[list[T], tuple[str, ...]]:
    """Convert a file, or all files of a directory, in a Staging that gets the target's name if all went well.

    Args:
        source, target, replace: as `pack` takes them.
        plan: the settings; an interrupted run with equal ones is resumed.
        convert: of a file, the file to write, and a directory for what is unfinished.
        open_index: raises FormatError if a shard lacks a tensor that an index promises.
    """
    _check_target(source, target, replace)
    results, notes = [], []
    with Staging(target, plan) as staging:
        if source.is_file():
            results.append(convert(source, staging.new, staging.work()))
            staging.publish(replace)
            return results, ()
        indices = [file for file in _files(source) if file.name.endswith(INDEX_SUFFIX)]
        for index in indices:
            open_index(index)
        for file in _files(source):
            name = file.relative_to(source)
            into = staging.new / name
            into.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == SUFFIX:
                results.append(convert(file, into, staging.work(str(name))))
            elif file.suffix in PICKLE_SUFFIXES:
                notes.append(f"{name} left out: a pickle can run any code when it is opened")
            else:
                shutil.copyfile(file, into)
        for index in indices:
            _set_total_size(staging.new / index.relative_to(source))
        staging.publish(replace)
    return results, tuple(notes)


def _set_total_size(index: Path) -> None:
    """Make an index's `total_size` that of the shards beside it; which tensor lies in which shard has not changed."""
    content = read_json(index)
    if isinstance(content.get("metadata"), dict) and "total_size" in content["metadata"]:
        total = 0
        for file in read_index(index)[0]:
            with TensorFile(file) as shard:
                total += sum(entry.nbytes for entry in shard.layout.entries.values())
        content["metadata"]["total_size"] = total
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
