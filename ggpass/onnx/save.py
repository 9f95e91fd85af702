"""Writing a model: fallback functions attached, large tensors streamed to a file beside it, all or nothing.

1. The data file's name is never one that exists, and the model's rename comes last. So a graph and its data cannot be
   of two different saves, whenever the process ends and whoever reads.
2. The file is opened before it gets its name: by ONNX Runtime as it is, and with our library.
"""

import os
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir
import onnxruntime

from ggpass.errors import GgpassError, InputError, TargetError
from ggpass.onnx.bodies import Fallback, attach_functions
from ggpass.onnx.reader import explained, load
from ggpass.onnx.tensors import MappedTensor, refer, tensor_bytes, tensors_of
from ggpass.onnx.wire import SMALL
from ggpass.onnxruntime import library_or_reason
from ggpass.packed.staging import Staging

#: Above it tensors go to a file of their own: ONNX Runtime maps that into memory, and copies what is in the model.
EXTERNAL_BYTES = 64 << 20
#: Mapped tensors start at a page; smaller ones are packed.
PAGE = 4096
#: In a model's metadata: the data files that its save was about to erase, in case the process was killed before.
REPLACES = "ggpass.replaces"


def save(
    model: ir.Model, path: Path, fallback: Fallback | None, external_data: bool | None, sources: Sequence[Path] = ()
) -> tuple[int, str]:
    """Write `path`, and a data file beside it if tensors are kept apart; return the bytes of both, and a note or ''.

    Tensors are written one at a time, so a model may be larger than memory. The model object is used up.

    Args:
        model: as it shall be on disk, but for the bodies of our operators.
        path: ends in .onnx.
        fallback: the bodies; None: it runs with the custom-op library only.
        external_data: whether tensors go to a file of their own; None: above EXTERNAL_BYTES.
        sources: the files of the model that it was made from, the model itself first. They are not erased, though a
            model that was at `path` used them.

    Raises:
        InputError: the model needs a file of its own, or the disk is full.
        TargetError: ONNX Runtime does not open the file.
    """
    attach_functions(model, fallback)
    size = tensor_bytes(model)
    if external_data is None:
        external_data = size > EXTERNAL_BYTES
    if not external_data and size >= 2**31 - (1 << 20):
        raise InputError(
            f"{size} bytes of tensors exceed the 2 GB of a single ONNX file; leave out external_data=False"
        )
    model.metadata_props["ggpass.version"] = _ggpass_version()
    with explained(f"{path} could not be written", "please report the model"), Staging(path) as staging:
        old = _data_of(path, sources)
        model.metadata_props[REPLACES] = " ".join(old.values())
        part, data = staging.path / "data", None
        try:
            with part.open("xb") as file:
                flock(file, LOCK_EX)  # until the model has its name: no other save takes its data for an old one
                places = _write_data(model, file) if external_data else []
                _write_model(model, staging.new, places, part)
                note = open_once(staging.new, path.name, fallback, sources)
                if external_data:
                    data = _publish(part, path)
                    _write_model(model, staging.new, places, data)
                staging.publish(replace=True)
        except BaseException:
            if data is not None and staging.new.exists():
                data.unlink(missing_ok=True)
            raise
        for replaced in old:
            _erase(replaced)
    return path.stat().st_size + (data.stat().st_size if data else 0), note


def open_once(path: Path, name: str, fallback: Fallback | None, sources: Sequence[Path] = ()) -> str:
    """Open a file in every way it is meant to run; return a note if that is not possible, or ''.

    With a fallback, ONNX Runtime alone must open it. Nothing is optimized or repacked: the memory is that of the file.

    Args:
        path: the file, complete.
        name: to call it by in errors.
        fallback, sources: as in `save`. If ONNX Runtime cannot open the float model either, the operators of someone
            else are missing, and nothing can be said.

    Raises:
        TargetError: ONNX Runtime refuses the file.
    """
    library = library_or_reason()
    ways = ([None] if fallback else []) + ([library] if isinstance(library, Path) else [])
    if not ways:
        return f"not opened: without a fallback only the custom-op library can run it ({library})"
    for way in ways:
        error = _refusal(path, way)
        if error is None:
            continue
        if sources and _refusal(sources[0], None) is not None:
            return f"not opened: ONNX Runtime does not open {sources[0].name} either"
        raise TargetError(
            f"ONNX Runtime{' with the custom-op library' if way else ''} does not open what was written as {name}: "
            f"{str(error)[:400]}; skip the weights that it names (skip=), and please report the model"
        ) from error
    return ""


def _refusal(path: Path, library: Path | None) -> Exception | None:
    """Return what ONNX Runtime raises when it opens a file, or None."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # errors come as exceptions
    try:
        if library is not None:
            options.register_custom_ops_library(str(library))
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own classes, all derived from Exception
        return error
    return None


def _write_data(model: ir.Model, file: BinaryIO) -> list[tuple[ir.Value, int]]:
    """Write the large initializers one after the other; return each and where it lies."""
    places = []
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= SMALL or tensor.dtype is ir.DataType.STRING:
                continue
            if tensor.nbytes > 4 * PAGE:
                file.write(bytes(-file.tell() % PAGE))
            start = file.tell()
            file.write(tensor.tobytes())
            if file.tell() - start != tensor.nbytes:
                raise ValueError(f"tensor {tensor.name!r} has {file.tell() - start} bytes, not {tensor.nbytes}")
            places.append((value, start))
    file.flush()
    return places


def _write_model(model: ir.Model, path: Path, places: list[tuple[ir.Value, int]], data: Path) -> None:
    """Write the model, with the initializers at these places of a data file."""
    for value, offset in places:
        refer(value, data.name, offset)
    for graph in model.graphs():
        for value in graph.initializers.values():
            assert value.const_value is not None
            value.const_value.name = value.name
    path.write_bytes(ir.to_proto(model).SerializeToString())


def _publish(part: Path, path: Path) -> Path:
    """Give a finished data file a name that no file has."""
    names = [f"{path.name}.data", *(f"{path.name}.{secrets.token_hex(4)}.data" for _ in range(8))]
    for name in names:
        data = path.with_name(name)
        try:
            os.link(part, data)
        except FileExistsError:
            continue
        except OSError:  # a file system without links
            if data.exists():
                continue
            os.rename(part, data)
        return data
    raise InputError(f"{path.parent} has a file of every name for the tensors of {path.name}; erase the old ones")


def _erase(path: Path) -> None:
    """Erase a file, unless the process that writes it is still at it."""
    with suppress(OSError), path.open("rb") as file:
        flock(file, LOCK_EX | LOCK_NB)
        path.unlink()


def _data_of(path: Path, keep: Sequence[Path]) -> dict[Path, str]:
    """Return the data files of earlier saves to a path, each with what tells it from a later file of that name.

    They are those that the model there uses, those that it replaced, and those whose names only this module makes.
    """
    unique = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.data")
    found = {file for file in path.parent.iterdir() if unique.fullmatch(file.name)}
    usual = path.with_name(f"{path.name}.data")
    with suppress(GgpassError):
        model = load(path)
        used = {tensor.file.name for tensor, _ in tensors_of(model) if isinstance(tensor, MappedTensor)}
        if usual.name in used or _identity(usual) in model.metadata_props.get(REPLACES, "").split():
            found.add(usual)
    kept = {file.resolve() for file in keep}
    return {file: _identity(file) for file in sorted(found) if file.resolve() not in kept and not file.is_symlink()}


def _identity(file: Path) -> str:
    """Return the size and the time of a file as one word, or a word that no file has."""
    with suppress(OSError):
        stat = file.stat()
        return f"{stat.st_size}:{stat.st_mtime_ns}"
    return "missing"


def check_path(path: str | Path) -> Path:
    """Return a path that a model can be written to.

    Raises:
        InputError: not named .onnx, a directory, or in one that does not exist.
    """
    path = Path(path)
    if path.suffix.lower() != ".onnx" or not path.parent.is_dir() or path.is_dir():
        raise InputError(f"an ONNX model is written to a .onnx file in a directory that exists, not {str(path)!r}")
    return path


def _ggpass_version() -> str:
    try:
        return version("ggpass")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
