"""Writing a model: fallback functions attached, large tensors streamed to a file beside it, all or nothing.

1. The data file's name is never one that exists, and the model's rename comes last. So a graph and its data cannot be
   of two different saves, whenever the process ends and whoever reads.
2. The file is opened before it gets its name.
3. Unfinished files of processes that were killed are erased by the next save into the directory.
"""

import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from ggpass.errors import GgpassError, InputError
from ggpass.onnx.bodies import Fallback, functions
from ggpass.onnx.boundary import explained
from ggpass.onnx.names import DOMAIN, VERSION
from ggpass.onnx.reader import load
from ggpass.onnx.tensors import MappedTensor, refer, tensor_bytes, tensors_of
from ggpass.onnx.wire import SMALL

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # a system without advisory locks: unfinished files stay
    flock = None  # type: ignore[assignment]

#: Above it tensors go to a file of their own: ONNX Runtime maps that into memory, and copies what is in the model.
EXTERNAL_BYTES = 64 << 20
#: Mapped tensors start at a page; smaller ones are packed.
PAGE = 4096
#: In a model's metadata: the data files that its save was about to erase, in case the process was killed before.
REPLACES = "ggpass.replaces"
#: Names of files that are not finished; the process that writes one holds a lock on it.
UNFINISHED = ".ggpass-unfinished-"


def attach_functions(model: ir.Model, fallback: Fallback | None) -> None:
    """Give the model the bodies of the `ai.ggpass` operators in it, or none, and every one its version.

    The version stands in an attribute because ONNX Runtime shows a library no domain's version: so an older library
    can say what it lacks, in any language.

    Raises:
        InputError: an opset that the bodies cannot be written in.
    """
    for identifier in [key for key, function in model.functions.items() if function.domain == DOMAIN]:
        del model.functions[identifier]
    nodes = [node for graph in model.graphs() for node in graph if node.domain == DOMAIN]
    if not nodes:
        return
    for node in nodes:
        node.attributes.add(ir.AttrInt64("op_version", VERSION))
    used = {node.op_type for node in nodes}
    model.opset_imports[DOMAIN] = VERSION
    if fallback is None:
        return
    # Functions exist since IR version 8.
    model.ir_version = max(model.ir_version, 8)
    for proto in functions(used, model.opset_imports[""], fallback):
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function


def save(
    model: ir.Model,
    path: Path,
    external_data: bool | None,
    check: Callable[[Path], str],
    keep: Collection[Path] = (),
) -> tuple[int, str]:
    """Write `path`, and a data file beside it if tensors are kept apart; return the bytes of both, and `check`'s note.

    Tensors are written one at a time, so a model may be larger than memory. The model object is used up.

    Args:
        model: as it shall be on disk.
        path: ends in .onnx.
        external_data: whether tensors go to a file of their own; None: above EXTERNAL_BYTES.
        check: opens the finished file, under another name, and raises if it is wrong; it may return a note.
        keep: files that are not to be erased, though a model that was at `path` used them.

    Raises:
        InputError: the model needs a file of its own, or the disk is full.
    """
    size = tensor_bytes(model)
    if external_data is None:
        external_data = size > EXTERNAL_BYTES
    if not external_data and size >= 2**31 - (1 << 20):
        raise InputError(
            f"{size} bytes of tensors exceed the 2 GB of a single ONNX file; leave out external_data=False"
        )
    model.metadata_props["ggpass.version"] = _ggpass_version()
    with explained(f"{path} could not be written", "please report the model"):
        _erase_unfinished(path.parent)
        old = _data_of(path, keep)
        model.metadata_props[REPLACES] = " ".join(old.values())
        data: Path | None = None
        try:
            with _unfinished(path.parent) as (data_file, part), _unfinished(path.parent) as (file, whole):
                if external_data:
                    places = _write_data(model, data_file)
                    _refer(places, part)
                _write_model(model, file)
                note = check(whole)
                if external_data:
                    data = _publish(part, path)
                    _refer(places, data)
                    _write_model(model, file)
                os.replace(whole, path)
        except BaseException:
            if data is not None:
                data.unlink(missing_ok=True)
            raise
        for replaced in old:
            _erase(replaced)
    return path.stat().st_size + (data.stat().st_size if data else 0), note


@contextmanager
def _unfinished(folder: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Yield a new locked file of a name of its own; what still has that name at the end is erased."""
    path = folder / f"{UNFINISHED}{secrets.token_hex(8)}.onnx"
    with path.open("xb") as file:
        try:
            if flock is not None:
                flock(file, LOCK_EX | LOCK_NB)
            yield file, path
        finally:
            path.unlink(missing_ok=True)


def _erase_unfinished(folder: Path) -> None:
    """Erase unfinished files that no process holds; without locks nobody knows which."""
    if flock is not None:
        for path in folder.glob(f"{UNFINISHED}*.onnx"):
            _erase(path)


def _erase(path: Path) -> None:
    """Erase a file, unless the process that writes it is still at it."""
    with suppress(OSError), path.open("rb") as file:
        if flock is not None:
            flock(file, LOCK_EX | LOCK_NB)
        path.unlink()


def _write_data(model: ir.Model, file: BinaryIO) -> list[tuple[ir.Value, int]]:
    """Write the large initializers one after the other; return each and where it lies."""
    places = []
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= SMALL or tensor.dtype is ir.DataType.STRING:
                continue
            here = file.tell()
            if tensor.nbytes > 4 * PAGE:
                file.write(bytes(-here % PAGE))
            places.append((value, file.tell()))
            _write(tensor, file)
    file.flush()
    return places


def _write_model(model: ir.Model, file: BinaryIO) -> None:
    for graph in model.graphs():
        for value in graph.initializers.values():
            assert value.const_value is not None
            value.const_value.name = value.name
    file.seek(0)
    file.truncate()
    file.write(ir.to_proto(model).SerializeToString())
    file.flush()


def _write(tensor: ir.TensorProtocol, file: BinaryIO) -> None:
    start = file.tell()
    file.write(tensor.tobytes())
    if file.tell() - start != tensor.nbytes:
        raise ValueError(f"tensor {tensor.name!r} has {file.tell() - start} bytes, not {tensor.nbytes}")


def _refer(places: list[tuple[ir.Value, int]], data: Path) -> None:
    for value, offset in places:
        refer(value, data.name, offset)


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
        part.unlink(missing_ok=True)
        return data
    raise InputError(f"{path.parent} has a file of every name for the tensors of {path.name}; erase the old ones")


def _data_of(path: Path, keep: Collection[Path]) -> dict[Path, str]:
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
        InputError: not named .onnx, or in a directory that does not exist.
    """
    path = Path(path)
    if path.suffix.lower() != ".onnx" or not path.parent.is_dir():
        raise InputError(f"an ONNX model is written to a .onnx file in a directory that exists, not {str(path)!r}")
    return path


def _ggpass_version() -> str:
    try:
        return version("ggpass")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
