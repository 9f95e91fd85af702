"""PackedFile: the tensors of a packed file, decoded one at a time or all at once on several threads."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ggpass.errors import FormatError
from ggpass.formats import FORMATS, Quantized
from ggpass.packed.checkpoint import INDEX_SUFFIX, check_index, find_files
from ggpass.packed.codec.container import check_of_arrays
from ggpass.packed.codec.decoder import Decoder
from ggpass.packed.codec.native import address, crc32c, library
from ggpass.packed.codec.planes import merge_tasks
from ggpass.packed.codec.threads import after_fork, run_all
from ggpass.packed.dtypes import WEIGHT_DTYPES, as_tensor, planes_of
from ggpass.packed.grid import from_grid
from ggpass.packed.layout import TensorFile
from ggpass.packed.manifest import CHECK_KEY, Manifest, Stored, parse_manifest
from ggpass.packed.untrusted import reading

Task = Callable[[], None]


@functools.cache
def substitutes(name: str) -> np.ndarray:
    """(256,) int16: the canonical code for each code of a format, −1 for codes that mean no number."""
    fmt = FORMATS[name]
    canonical = fmt.canonical.numpy().astype(np.int16)
    return np.where(np.isfinite(fmt.codebook.numpy()), canonical, np.int16(-1))


class Payload:
    """One tensor's stored bytes, parsed and tied to its manifest entry; decoding comes later, chunk by chunk.

    Attributes:
        stored: the manifest's entry.
        data: its bytes in the file.
        arrays: the coded arrays: the codes and the scales; the symbols; or the byte planes.
    """

    def __init__(self, stored: Stored, data: np.ndarray) -> None:
        """Parse.

        Raises:
            FormatError: damaged, another tensor's payload, or not what the manifest says.
        """
        self.stored, self.data = stored, data
        self.arrays: list[Decoder] = []
        if stored.kind == "plain":
            found = crc32c(data)
        else:
            arrays = {"codes": 2, "grid": 1, "lossless": planes_of(stored.dtype)[0]}[stored.kind]
            for i in range(arrays):
                codes = stored.kind == "codes" and i == 0
                self.arrays.append(Decoder(data, substitutes=substitutes(stored.format) if codes else None))
                data = data[self.arrays[-1].container.length :]
            if data.size:
                raise FormatError(f"{data.size} bytes follow the payload; fetch the file again")
            found = check_of_arrays([array.container.check for array in self.arrays])
        if found != stored.check:
            raise FormatError("it is damaged, or another tensor's (the checksum does not match); fetch the file again")
        self._check_counts()

    def _check_counts(self) -> None:
        stored, size = self.stored, self.stored.size
        # What follows allocates by the shape; these counts have paid for it in bytes (container.MAX_EXPANSION).
        if stored.kind in ("codes", "grid"):
            if stored.dtype not in WEIGHT_DTYPES or not stored.shape or (stored.kind == "codes" and not size):
                raise FormatError(f"{stored.kind} cannot stand for {stored.dtype} of shape {list(stored.shape)}")
            if self.arrays[0].count != size:
                raise FormatError(f"it holds {self.arrays[0].count} symbols for {size} elements; fetch the file again")
        if stored.kind == "codes" and (
            self.arrays[1].count not in (1, stored.rows) or self.arrays[1].dtype != np.uint32
        ):
            raise FormatError(f"it holds {self.arrays[1].count} scales for {stored.rows} rows")
        if stored.kind == "grid" and self.arrays[0].dtype.kind != "i":
            raise FormatError(f"its symbols are {self.arrays[0].dtype}, not signed; fetch the file again")
        if stored.kind == "lossless":
            wanted = stored.nbytes // planes_of(stored.dtype)[0]
            if any(plane.count != wanted or plane.dtype != np.uint8 for plane in self.arrays):
                raise FormatError(f"its byte planes do not hold {wanted} bytes each; fetch the file again")

    @functools.cached_property
    def scale(self) -> np.ndarray:
        """codes: the scales, float32, one or one a row; finite and positive."""
        scale = self.arrays[1].decode().view("<f4")
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise FormatError("one of its scales is no positive number; fetch the file again")
        return scale

    def value_tasks(self, out: np.ndarray) -> list[list[Task]]:
        """What writes the decoded tensor's bytes to `out`, in stages; the tasks of one stage run in any order."""
        if self.stored.kind == "plain":
            return [[functools.partial(np.copyto, out, self.data)]]
        if self.stored.kind == "lossless":
            width, rotate = planes_of(self.stored.dtype)
            planes = np.empty((width, out.size // width), np.uint8)
            decode = [task for plane, into in zip(self.arrays, planes) for task in plane.tasks(into)]
            return [decode, merge_tasks(planes, rotate, out)]
        if self.stored.transposed:
            return [[functools.partial(self._dequantize_transposed, out)]]
        array = self.arrays[0]
        write = self._dequantize if self.stored.kind == "codes" else self._from_grid
        return [[functools.partial(write, i, out) for i in range(len(array))]]

    def _chunk(self, i: int, out: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Return the symbols of chunk i, and where their values belong in the tensor whose bytes `out` holds."""
        where = self.arrays[0].container.symbols_of(i)
        symbols = np.empty(where.stop - where.start, self.arrays[0].dtype)
        self.arrays[0].decode_chunk(i, symbols)
        return symbols, as_tensor(out, self.stored.dtype, (-1,))[where]

    def _dequantize(self, i: int, out: np.ndarray) -> None:
        codes, values = self._chunk(i, out)
        target = values if values.dtype is torch.float32 else torch.empty(codes.size)
        codebook = FORMATS[self.stored.format].codebook
        columns = max(1, math.prod(self.stored.shape) // self.stored.rows)
        library().ggp_dequantize(
            *(address(codes), codes.size, self.arrays[0].container.symbols_of(i).start, columns, codebook.data_ptr()),
            *(address(self.scale), self.scale.size, target.data_ptr()),
        )
        if target is not values:
            values.copy_(target)

    def _dequantize_transposed(self, out: np.ndarray) -> None:
        rows, columns = self.stored.shape[::-1]
        codes = torch.from_numpy(self.arrays[0].decode())
        values = FORMATS[self.stored.format].codebook[codes.int()].view(rows, columns)
        values *= torch.from_numpy(self.scale)[:, None]
        as_tensor(out, self.stored.dtype, (columns, rows)).copy_(values.t())

    def _from_grid(self, i: int, out: np.ndarray) -> None:
        symbols, values = self._chunk(i, out)
        values.copy_(from_grid(symbols, self.stored.step))


class PackedFile(contextlib.AbstractContextManager["PackedFile"]):
    """What `ggpass pack` or `ggpass.save` wrote: one file, or the shards of a directory as one.

    Attributes:
        path: of the file, its index or the directory.
        files: the open safetensors files.
        manifest: what each tensor is.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the file or the shards, and check headers and manifests.

        Args:
            path: a packed file, an index of packed shards, or a directory that holds either.

        Raises:
            FormatError: not packed, damaged, or not all there.
        """
        self.path, files, index = Path(path), [Path(path)], dict[str, str]()
        if self.path.is_dir() or self.path.name.endswith(INDEX_SUFFIX):
            files, index = find_files(self.path)
        self._file_of: dict[str, TensorFile] = {}
        self.manifest, held = Manifest({}), dict[str, str]()
        with contextlib.ExitStack() as opened:
            self.files = tuple(opened.enter_context(TensorFile(file)) for file in files)
            for file in self.files:
                with reading(file.path):
                    part = parse_manifest(file.layout)
                    twice = [name for name in (*part.tensors, *part.aliases) if name in held]
                    if twice:
                        raise FormatError(f"{twice[0]} is in {held[twice[0]]} too; name the file that is meant")
                held |= dict.fromkeys((*part.tensors, *part.aliases), file.path.name)
                self._file_of |= dict.fromkeys(file.layout.entries, file)
                for mine, more in zip(self.manifest.__dict__.values(), part.__dict__.values()):
                    mine |= more
            check_index(index, held)
            self._close = opened.pop_all().close

    @property
    def size(self) -> int:
        """Return bytes of the files, headers included."""
        return sum(file.size for file in self.files)

    @property
    def fingerprint(self) -> str:
        """Eight hex digits a file that change with anything in it."""
        return " ".join(file.layout.metadata[CHECK_KEY] for file in self.files)

    def kernel(self, name: str) -> bytes:
        """Return the bytes of a GPU kernel that the file carries.

        Raises:
            FormatError: damaged; the message names it.
        """
        data = self._file_of[name].read(name)
        if crc32c(data) != self.manifest.kernels[name]:
            raise FormatError(f"{self.path}: {name} is damaged (its checksum does not match); fetch the file again")
        return data.tobytes()

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor that comes out, aliases included."""
        return (*self.manifest.tensors, *self.manifest.aliases)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Return every tensor that a state_dict holds, aliases included."""
        return tuple(name for name in self.names if self.stored(name).persistent)

    def stored(self, name: str) -> Stored:
        """Return the manifest's entry of a tensor or of what an alias stands for.

        Raises:
            FormatError: no such tensor.
        """
        name = self.manifest.aliases.get(name, name)
        if name not in self.manifest.tensors:
            raise FormatError(f"{self.path} holds no tensor {name!r}; `ggpass inspect` lists them")
        return self.manifest.tensors[name]

    def payload(self, name: str) -> Payload:
        """Return the stored form of a tensor, its headers checked.

        Raises:
            FormatError: no such tensor, or a damaged one; the message names it.
        """
        stored, (path, name) = self.stored(name), self._place(name)
        with reading(path, name):
            return Payload(stored, self._file_of[name].view(name))

    def packed_bytes(self, name: str) -> int:
        """Return bytes that a tensor takes in the file; 0 for an alias."""
        file = self._file_of.get(name)
        return file.layout.entries[name].end - file.layout.entries[name].begin if file else 0

    def read_bytes(self, name: str, *, threads: int = 1) -> np.ndarray:
        """Return the decoded tensor's bytes, uint8.

        Raises:
            FormatError: a damaged tensor; the message names it.
        """
        return self._decode([name], threads)[name]

    @after_fork()
    def _decode(self, names: Iterable[str], threads: int) -> dict[str, np.ndarray]:
        """Return the bytes of some tensors, uint8, decoded in parallel over all chunks of all of them."""
        found: dict[str, np.ndarray] = {}
        tasks: list[Task] = []
        for name in names:
            payload = self.payload(name)
            found[name] = np.empty(payload.stored.nbytes, np.uint8)
            place = self._place(name)
            with reading(*place):
                stages = payload.value_tasks(found[name])
            if len(stages) == 1:
                tasks += map(reading(*place), stages[0])
                continue
            for stage in stages:  # planes stand beside their tensor while it is merged: one tensor at a time
                run_all(map(reading(*place), stage), threads)
        run_all(tasks, threads)
        return found

    def read(self, name: str, *, threads: int = 1) -> Tensor:
        """Return the decoded tensor, on the CPU, in its original dtype and shape.

        Raises:
            FormatError: a damaged tensor; the message names it.
        """
        stored = self.stored(name)
        return as_tensor(self.read_bytes(name, threads=threads), stored.dtype, stored.shape)

    def codes(self, name: str, out: Tensor | None = None, *, threads: int = 1) -> Quantized:
        """A tensor that is stored as codes, without decoding it to floats; see `all_codes`."""
        return self.all_codes({name: out}, threads=threads)[name]

    def all_codes(self, names: Mapping[str, Tensor | None], *, threads: int = 1) -> dict[str, Quantized]:
        """Tensors that are stored as codes, without decoding them to floats, in parallel over all their chunks.

        Args:
            names: which, and for each (N, K) uint8 to write the codes to (memory that a kernel likes) or None.
            threads: how many decode at a time.

        Raises:
            FormatError: one is stored otherwise, or damaged; the message names it.
        """
        tasks: list[Task] = []
        found: dict[str, Quantized] = {}
        for name, out in names.items():
            payload = self.payload(name)
            place = self._place(name)
            with reading(*place):
                found[name] = self._codes_of(payload, out)
                tasks += map(reading(*place), payload.arrays[0].tasks(found[name].codes.view(-1).numpy()))
        run_all(tasks, threads)
        return found

    def _codes_of(self, payload: Payload, out: Tensor | None) -> Quantized:
        """Room for the codes, and the scales."""
        if payload.stored.kind != "codes":
            raise FormatError(f"it is stored as {payload.stored.kind}, not as codes; read it as a tensor")
        rows = payload.stored.rows
        shape = (rows, payload.stored.size // rows)
        codes = torch.empty(shape, dtype=torch.uint8) if out is None else out
        if tuple(codes.shape) != shape or codes.dtype is not torch.uint8 or not codes.is_contiguous():
            raise FormatError(f"its codes need contiguous uint8 {shape}, not {codes.dtype} {tuple(codes.shape)}")
        return Quantized(codes, torch.from_numpy(payload.scale))

    def read_all(self, *, threads: int = 1) -> dict[str, Tensor]:
        """Return every tensor, decoded in parallel over all chunks of all tensors; aliases share their tensor's memory.

        Raises:
            FormatError: a damaged tensor; the message names it.
        """
        decoded = self._decode(self.manifest.tensors, threads)
        tensors = {name: as_tensor(decoded[name], s.dtype, s.shape) for name, s in self.manifest.tensors.items()}
        return {name: tensors[self.manifest.aliases.get(name, name)] for name in self.names}

    def _place(self, name: str) -> tuple[Path, str]:
        """Return the file and the tensor of a name, for errors."""
        name = self.manifest.aliases.get(name, name)
        return self._file_of[name].path, name

    def close(self) -> None:
        """Give the files back; reading ends."""
        self._close()

    def __exit__(self, *exception: object) -> None:
        self.close()
