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
from ggpass.packed.boundary import reading
from ggpass.packed.checkpoint import INDEX_SUFFIX, check_index, find_files
from ggpass.packed.codec.decoder import Decoder
from ggpass.packed.codec.native import address, crc32c, library
from ggpass.packed.codec.planes import merge_tasks
from ggpass.packed.codec.threads import run_all
from ggpass.packed.dtypes import DTYPE_BITS, WEIGHT_DTYPES, as_tensor, planes_of
from ggpass.packed.forked import after_fork
from ggpass.packed.grid import from_grid
from ggpass.packed.layout import TensorFile
from ggpass.packed.manifest import CHECK_KEY, Manifest, Stored, parse_manifest

Task = Callable[[], None]


def arrays_check(decoders: Iterable[Decoder]) -> int:
    """check = CRC-32C of the header checksums of a payload's arrays, which cover their chunks."""
    checks = np.array([decoder.container.check for decoder in decoders], dtype="<u4")
    return crc32c(checks.view(np.uint8))


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
            for i in range(self._expected()):
                codes = stored.kind == "codes" and i == 0
                self.arrays.append(Decoder(data, substitutes=substitutes(stored.format) if codes else None))
                data = data[self.arrays[-1].container.length :]
            if data.size:
                raise FormatError(f"{data.size} bytes follow the payload; fetch the file again")
            found = arrays_check(self.arrays)
        if found != stored.check:
            raise FormatError("it is damaged, or another tensor's (the checksum does not match); fetch the file again")
        self._check_counts()

    def _expected(self) -> int:
        return {"codes": 2, "grid": 1, "lossless": planes_of(self.stored.dtype)[0]}[self.stored.kind]

    def _check_counts(self) -> None:
        stored = self.stored
        size = math.prod(stored.shape)
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
            width = planes_of(stored.dtype)[0]
            wanted = (size * DTYPE_BITS[stored.dtype] + 7) // 8 // width
            if any(plane.count != wanted or plane.dtype != np.uint8 for plane in self.arrays):
                raise FormatError(f"its byte planes do not hold {wanted} bytes each; fetch the file again")

    @functools.cached_property
    def scale(self) -> np.ndarray:
        """codes: the scales, float32, one or one a row; finite and positive."""
        scale = self.arrays[1].decode().view("<f4")
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise FormatError("one of its scales is no positive number; fetch the file again")
        return scale

    def codes_tasks(self, out: np.ndarray) -> list[Task]:
        """What writes the codes to `out`, (size,) uint8, one call a chunk; aliases come out canonical."""
        return self.arrays[0].tasks(out)

    def value_tasks(self, out: np.ndarray) -> list[list[Task]]:
        """What writes the decoded tensor's bytes to `out`, in stages; the tasks of one stage run in any order."""
        if self.stored.kind == "plain":
            return [[functools.partial(np.copyto, out, self.data)]]
        if self.stored.kind == "lossless":
            return self._plane_tasks(out)
        if self.stored.transposed:
            return [[functools.partial(self._dequantize_transposed, out)]]
        array = self.arrays[0]
        write = self._dequantize if self.stored.kind == "codes" else self._from_grid
        return [[functools.partial(write, i, out) for i in range(len(array))]]

    def _plane_tasks(self, out: np.ndarray) -> list[list[Task]]:
        width, rotate = planes_of(self.stored.dtype)
        planes = np.empty((width, out.size // width), np.uint8)
        decode = [task for plane, into in zip(self.arrays, planes) for task in plane.tasks(into)]
        return [decode, merge_tasks(planes, rotate, out)]

    def _values(self, where: slice, out: np.ndarray) -> Tensor:
        """The elements `where` of the tensor whose bytes `out` holds."""
        return as_tensor(out, self.stored.dtype, (-1,))[where]

    def _dequantize(self, i: int, out: np.ndarray) -> None:
        where = self.arrays[0].symbols_of(i)
        codes = np.empty(where.stop - where.start, np.uint8)
        self.arrays[0].decode_chunk(i, codes)
        values = self._values(where, out)
        exact = values.dtype is torch.float32
        target = values if exact else torch.empty(codes.size)
        codebook = FORMATS[self.stored.format].codebook
        library().ggp_dequantize(
            address(codes),
            codes.size,
            where.start,
            max(1, math.prod(self.stored.shape) // self.stored.rows),
            codebook.data_ptr(),
            address(self.scale),
            self.scale.size,
            target.data_ptr(),
        )
        if not exact:
            values.copy_(target)

    def _dequantize_transposed(self, out: np.ndarray) -> None:
        rows, columns = self.stored.shape[::-1]
        codes = np.empty(rows * columns, np.uint8)
        run_all(self.codes_tasks(codes), 1)
        values = FORMATS[self.stored.format].codebook[torch.from_numpy(codes).int()].view(rows, columns)
        values *= torch.from_numpy(self.scale)[:, None]
        self._values(slice(None), out).view(columns, rows).copy_(values.t())

    def _from_grid(self, i: int, out: np.ndarray) -> None:
        where = self.arrays[0].symbols_of(i)
        symbols = np.empty(where.stop - where.start, self.arrays[0].dtype)
        self.arrays[0].decode_chunk(i, symbols)
        self._values(where, out).copy_(from_grid(symbols, self.stored.step))


class PackedFile:
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
        """Bytes of the files, headers included."""
        return sum(file.size for file in self.files)

    @property
    def fingerprint(self) -> str:
        """Eight hex digits a file that change with anything in it."""
        return " ".join(file.layout.metadata[CHECK_KEY] for file in self.files)

    def kernel(self, name: str) -> bytes:
        """The bytes of a GPU kernel that the file carries.

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
        """Every tensor that a state_dict holds, aliases included."""
        return tuple(name for name in self.names if self.stored(name).persistent)

    def stored(self, name: str) -> Stored:
        """The manifest's entry of a tensor or of what an alias stands for.

        Raises:
            FormatError: no such tensor.
        """
        name = self.manifest.aliases.get(name, name)
        if name not in self.manifest.tensors:
            raise FormatError(f"{self.path} holds no tensor {name!r}; `ggpass inspect` lists them")
        return self.manifest.tensors[name]

    def payload(self, name: str) -> Payload:
        """The stored form of a tensor, its headers checked.

        Raises:
            FormatError: no such tensor, or a damaged one; the message names it.
        """
        stored = self.stored(name)
        name = self.manifest.aliases.get(name, name)
        with self._reading(name):
            return Payload(stored, self._file_of[name].view(name))

    def packed_bytes(self, name: str) -> int:
        """Bytes that a tensor takes in the file; 0 for an alias."""
        file = self._file_of.get(name)
        return file.layout.entries[name].end - file.layout.entries[name].begin if file else 0

    @after_fork()
    def read_bytes(self, name: str, *, threads: int = 1) -> np.ndarray:
        """The decoded tensor's bytes, uint8.

        Raises:
            FormatError: a damaged tensor; the message names it.
        """
        payload = self.payload(name)
        stored = payload.stored
        out = np.empty((math.prod(stored.shape) * DTYPE_BITS[stored.dtype] + 7) // 8, np.uint8)
        with self._reading(name):
            for stage in payload.value_tasks(out):
                run_all(stage, threads)
        return out

    def read(self, name: str, *, threads: int = 1) -> Tensor:
        """The decoded tensor, on the CPU, in its original dtype and shape.

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
            with self._reading(name):
                found[name] = self._codes_of(payload, out)
                stage = payload.codes_tasks(found[name].codes.view(-1).numpy())
            tasks += [functools.partial(self._named, name, task) for task in stage]
        run_all(tasks, threads)
        return found

    def _codes_of(self, payload: Payload, out: Tensor | None) -> Quantized:
        """Room for the codes, and the scales."""
        if payload.stored.kind != "codes":
            raise FormatError(f"it is stored as {payload.stored.kind}, not as codes; read it as a tensor")
        rows = payload.stored.rows
        shape = (rows, math.prod(payload.stored.shape) // rows)
        codes = torch.empty(shape, dtype=torch.uint8) if out is None else out
        if tuple(codes.shape) != shape or codes.dtype is not torch.uint8 or not codes.is_contiguous():
            raise FormatError(f"its codes need contiguous uint8 {shape}, not {codes.dtype} {tuple(codes.shape)}")
        return Quantized(codes, torch.from_numpy(payload.scale))

    @after_fork()
    def read_all(self, *, threads: int = 1) -> dict[str, Tensor]:
        """Every tensor, decoded in parallel over all chunks of all tensors; aliases share their tensor's memory.

        Raises:
            FormatError: a damaged tensor; the message names it.
        """
        tensors: dict[str, Tensor] = {}
        tasks: list[Task] = []
        for name, stored in self.manifest.tensors.items():
            payload = self.payload(name)
            if stored.kind == "lossless":
                # Planes stand beside their tensor while it is merged, so these come one tensor at a time.
                tensors[name] = self.read(name, threads=threads)
                continue
            out = np.empty((math.prod(stored.shape) * DTYPE_BITS[stored.dtype] + 7) // 8, np.uint8)
            tensors[name] = as_tensor(out, stored.dtype, stored.shape)
            with self._reading(name):
                (stage,) = payload.value_tasks(out)
            tasks += [functools.partial(self._named, name, task) for task in stage]
        run_all(tasks, threads)
        return {name: tensors[self.manifest.aliases.get(name, name)] for name in self.names}

    def _reading(self, name: str) -> contextlib.AbstractContextManager[None]:
        name = self.manifest.aliases.get(name, name)
        return reading(self._file_of[name].path, name)

    def _named(self, name: str, task: Task) -> None:
        with self._reading(name):
            task()

    def close(self) -> None:
        """Give the file back; reading ends."""
        self._close()

    def __enter__(self) -> "PackedFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
