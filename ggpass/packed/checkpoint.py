"""Checkpoint: the tensors of a safetensors file, its shards or a Hugging Face directory, read one at a time."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from ggpass.errors import FormatError
from ggpass.packed.dtypes import Sized
from ggpass.packed.untrusted import open_regular, read_json, reading

INDEX_SUFFIX = ".safetensors.index.json"

#: Files that hold a pickle, which can run any code when it is opened.
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_SAVE_AGAIN = (
    "save the model again as safetensors, on a machine where you trust the file: "
    "model.save_pretrained(DIR) or safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
)


@dataclass(frozen=True)
class TensorInfo(Sized):
    """What the header says of a tensor, without reading its data.

    Attributes:
        dtype: safetensors' name of it, as `F32` or `BF16`.
        file: the safetensors file that holds it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path


class Checkpoint:
    """The tensors of a model on disk, listed at once and read one at a time.

    Attributes:
        path: what was opened.
        tensors: all tensors, in the order of the files and of the names in them.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads the headers of a file, of the shards of an index, or of a Hugging Face directory.

        Args:
            path: `*.safetensors`, `*.safetensors.index.json`, or a directory that holds either.

        Raises:
            FormatError: nothing there, no safetensors (pickles are refused), a damaged file or index.
        """
        self.path = Path(path)
        files, index = find_files(self.path)
        found: dict[str, TensorInfo] = {}
        for file in files:
            for info in _headers(file):
                if info.name in found:
                    raise FormatError(
                        f"{info.name} is both in {found[info.name].file.name} and in {file.name}; "
                        "name the file that is meant, not the directory"
                    )
                found[info.name] = info
        check_index(index, {name: info.file.name for name, info in found.items()})
        self.tensors = tuple(found.values())
        self._by_name = found

    def read(self, name: str) -> Tensor:
        """Return the tensor of that name, on the CPU in its own dtype.

        Raises:
            FormatError: no such tensor, or a file that changed or was damaged since it was opened.
        """
        if name not in self._by_name:
            raise FormatError(f"{self.path} holds no tensor {name!r}; `ggpass inspect` lists them")
        file = self._by_name[name].file
        with reading(file, name), safe_open(str(file), framework="pt") as opened:
            return opened.get_tensor(name)


def _headers(file: Path) -> Iterator[TensorInfo]:
    """Yield the header of each tensor of one safetensors file."""
    with reading(file):
        os.close(open_regular(file))  # safetensors' own reader would wait for a pipe
    with reading(file), safe_open(str(file), framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (not a mapping)
            part = opened.get_slice(name)
            yield TensorInfo(name, tuple(part.get_shape()), part.get_dtype(), file)


def find_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the safetensors files behind a path, and the {tensor: file name} of its index, or {}.

    Raises:
        FormatError: nothing there, or nothing but pickles and other formats.
    """
    if not path.exists():
        raise FormatError(f"{path} does not exist; give a .safetensors file or the directory that holds it")
    if path.is_dir():
        return _find_in_directory(path)
    if path.name.endswith(INDEX_SUFFIX):
        return read_index(path)
    if path.suffix == ".safetensors":
        return [path], {}
    if path.suffix in PICKLE_SUFFIXES:
        raise FormatError(f"{path} is a pickle, which can run any code when opened; {_SAVE_AGAIN}")
    if path.suffix == ".gguf":
        raise FormatError(
            f"{path} is a GGUF file; load it with transformers (from_pretrained(DIR, gguf_file=...)) and "
            "save_pretrained it as safetensors"
        )
    raise FormatError(f"{path} is not named .safetensors or {INDEX_SUFFIX}; {_SAVE_AGAIN}")


def _find_in_directory(path: Path) -> tuple[list[Path], dict[str, str]]:
    """Return what transformers would load from a directory: the index, the whole file, else all that is there."""
    indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    for index in (path / f"model{INDEX_SUFFIX}", *(indices if len(indices) == 1 else ())):
        if index.exists():
            return read_index(index)
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"], {}
    files = sorted(path.glob("*.safetensors"))
    if files:
        return files, {}
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise FormatError(
            f"{path} holds only pickles ({', '.join(pickles[:3])}), which can run any code when opened; {_SAVE_AGAIN}"
        )
    raise FormatError(f"{path} holds no .safetensors file; give the directory of a saved model")


def read_index(path: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the shards that an index names, each beside it, and its {tensor: file name}.

    Raises:
        FormatError: no such index, or one that names shards that are not there.
    """
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise FormatError(f"{path} has no weight_map of tensor names to files; download it again")
    files = []
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise FormatError(f"{path} names a shard outside its own directory: {name!r}; do not trust it")
        if Path(name).suffix != ".safetensors":
            raise FormatError(f"{path} names a shard that is not safetensors: {name!r}; {_SAVE_AGAIN}")
        if not (path.parent / name).is_file():
            raise FormatError(f"{path.parent / name} is missing, though {path.name} names it; download it too")
        files.append(path.parent / name)
    return files, weight_map


def check_index(index: Mapping[str, str], held: Mapping[str, str]) -> None:
    """Raise FormatError if a shard lacks a tensor that an index says it holds: it is of another version.

    Args:
        index: {tensor: file name}, as `read_index` returns it.
        held: {tensor: name of the file that holds it}.
    """
    for name, file in index.items():
        if held.get(name) != file:
            raise FormatError(
                f"the index says that {name} is in {file}, which does not hold it; download the checkpoint again"
            )
