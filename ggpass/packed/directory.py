"""pack, unpack: a file, or a Hugging Face directory with its shards, configuration and tokenizer."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ggpass.errors import FormatError, GgpassError
from ggpass.packed.checkpoint import INDEX_SUFFIX, PICKLE_SUFFIXES
from ggpass.packed.convert import PackReport, Progress, check_patterns, pack_file, report_of, silent, unpack_file
from ggpass.packed.layout import TensorFile
from ggpass.packed.methods import Method, parse_method
from ggpass.packed.strict_json import parse_json
from ggpass.packed.writer import part_of, sync_directory

SUFFIX = ".safetensors"
_PLAN = ".ggpass-plan"

T = TypeVar("T")


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
) -> PackReport:
    """Pack a checkpoint: each weight matrix at the entropy of its codes, everything else as it is.

    Args:
        source: a `.safetensors` file, an index of shards, or a directory that holds either.
        target: the new file, or the new directory; neither may exist.
        method: the name of a format, `grid[:step]` or `lossless` (see `parse_method`), or a Method.
        loss: grid without a step: the relative squared error that each tensor may have.
        only, skip: patterns on names, as `ggpass.compile` takes them.
        threads: how many; all of the machine's if left out.
        progress: called with the tensor's name, the bytes done and the bytes in all of the file at hand.

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
    check_patterns(names, only, skip)
    _check_target(source, target)

    def one(file: Path, into: Path) -> PackReport:
        if into.exists():
            return report_of(file, into, chosen, only=only, skip=skip)
        return pack_file(file, into, chosen, only=only, skip=skip, threads=threads, progress=progress)

    if source.is_file():
        return one(source, target)
    plan = json.dumps(["pack", chosen.name, only, skip])
    reports, notes = _in_staging(source, target, plan, one)
    tensors = tuple(tensor for report in reports for tensor in report.tensors)
    return PackReport(tensors, sum(report.file_bytes for report in reports), notes)


def unpack(
    source: str | Path, target: str | Path, *, threads: int | None = None, progress: Progress = silent
) -> tuple[str, ...]:
    """Write what `pack` packed as plain safetensors again: decoded values in the original dtypes.

    Args:
        source, target, threads, progress: as for `pack`.

    Returns:
        Notes on files that were left out.

    Raises:
        FormatError: damaged, or not packed; the message names the file and the tensor.
        GgpassError: the target exists or cannot be written.
    """
    source, target = _source(Path(source)), Path(target)
    _check_target(source, target)

    def one(file: Path, into: Path) -> None:
        if not into.exists():
            unpack_file(file, into, threads=threads or os.cpu_count() or 1, progress=progress)

    if source.is_file():
        one(source, target)
        return ()
    _, notes = _in_staging(source, target, json.dumps(["unpack"]), one)
    return notes


def _source(path: Path) -> Path:
    if not path.exists():
        raise FormatError(f"{path} does not exist; give a {SUFFIX} file or the directory of a saved model")
    if path.name.endswith(INDEX_SUFFIX):
        return path.parent
    if path.is_file() and path.suffix != SUFFIX:
        raise FormatError(f"{path} is not named {SUFFIX}; save the model as safetensors first")
    if path.is_dir() and not _tensor_files(path):
        raise FormatError(f"{path} holds no {SUFFIX} file; save the model as safetensors first")
    return path


def _files(directory: Path) -> list[Path]:
    """Every file below a directory, sorted; links to directories are not followed."""
    return sorted(Path(root) / name for root, _, names in os.walk(directory) for name in names)


def _tensor_files(source: Path) -> list[Path]:
    return [source] if source.is_file() else [file for file in _files(source) if file.suffix == SUFFIX]


def _check_target(source: Path, target: Path) -> None:
    if target.exists():
        raise GgpassError(f"{target} exists already; choose another name, or remove it first")
    if not target.parent.is_dir():
        raise GgpassError(f"{target.parent} is no directory; make it first")
    if source.is_file() and target.suffix != SUFFIX:
        raise GgpassError(f"a packed file is named {SUFFIX}, unlike {target}; any safetensors tool opens it")
    if source.is_dir() and source.resolve() in target.resolve().parents:
        raise GgpassError(f"{target} lies inside {source}; choose a place outside of it")


def _in_staging(
    source: Path, target: Path, plan: str, convert: Callable[[Path, Path], T]
) -> tuple[list[T], tuple[str, ...]]:
    """Convert a directory under a temporary name and rename it when all of it is there; an equal plan is resumed."""
    staging = part_of(target)
    files = _files(source)
    listed = [[str(file.relative_to(source)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    plan = json.dumps([plan, listed])
    try:
        if not (staging / _PLAN).is_file() or (staging / _PLAN).read_text(encoding="utf-8") != plan:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            (staging / _PLAN).write_text(plan, encoding="utf-8")
        results, notes = [], []
        for file in files:
            into = staging / file.relative_to(source)
            into.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == SUFFIX:
                results.append(convert(file, into))
            elif file.suffix in PICKLE_SUFFIXES:
                notes.append(f"{file.relative_to(source)} left out: a pickle can run any code when it is opened")
            else:
                shutil.copyfile(file, into)
        for index in staging.rglob(f"*{INDEX_SUFFIX}"):
            _set_total_size(index)
        (staging / _PLAN).unlink()
        for root, _, _ in os.walk(staging):
            sync_directory(Path(root))
        staging.rename(target)
        sync_directory(target.parent)
    except OSError as error:
        raise GgpassError(
            f"{target} could not be written: {error.strerror or error}; {source} is as it was, and {staging.name} "
            "holds what is finished: make room and run the same command again to go on"
        ) from error
    return results, tuple(notes)


def _set_total_size(index: Path) -> None:
    """Make an index's `total_size` that of the shards beside it; which tensor lies in which shard has not changed."""
    content = parse_json(index.read_bytes(), str(index))
    if isinstance(content, dict) and isinstance(content.get("metadata"), dict) and "total_size" in content["metadata"]:
        shards = {name for name in content.get("weight_map", {}).values() if (index.parent / name).is_file()}
        total = 0
        for name in shards:
            with TensorFile(index.parent / name) as shard:
                total += sum(entry.end - entry.begin for entry in shard.layout.entries.values())
        content["metadata"]["total_size"] = total
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
