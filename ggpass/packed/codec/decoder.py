"""Decoder: a container back to its symbols, whole or chunk by chunk."""

import functools
from collections.abc import Callable

import numpy as np

from ggpass.errors import FormatError
from ggpass.packed.codec import container, exp_golomb
from ggpass.packed.codec.container import CONSTANT, EXP_GOLOMB, RANS, RAW, Container
from ggpass.packed.codec.native import address, check, integer_type, library
from ggpass.packed.codec.threads import run_all


def _in_range(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    info = np.iinfo(dtype)
    low, high = max(int(info.min), -(1 << 63)), min(int(info.max), (1 << 63) - 1)
    if values.size and (int(values.min()) < low or int(values.max()) > high):
        raise FormatError(f"a coded array of {dtype} holds a value outside that type; fetch the file again")
    return values.astype(dtype)


#: Chunks decoded by one native call: threads then come back to Python, where only one runs, once in a millisecond.
GROUP = 4

#: The Status by which ggp_rans_chunks says that a chunk's checksum is wrong.
CHECKSUM = -3


class Decoder:
    """Decodes one container, whole or chunk by chunk.

    Attributes:
        container: the parsed header and index.
        dtype: of the symbols.
        count: the number of symbols.
    """

    def __init__(
        self, data: bytes | memoryview | np.ndarray, *, substitutes: np.ndarray | None = None, portable: bool = False
    ) -> None:
        """Parse and check the header and the table.

        Args:
            data: the container, possibly followed by other bytes.
            substitutes: (256,) int16, for an array of bytes: what each symbol decodes to, −1 where it must not occur.
                The table and the patches are translated, so that it costs nothing for each symbol.
            portable: decode without AVX2, for tests; the symbols are the same.

        Raises:
            FormatError: it is damaged or no container.
        """
        view = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
        self.container: Container = container.read(view)
        self.dtype, self.count = self.container.dtype, self.container.count
        self._portable = portable
        self._substitutes = substitutes
        if substitutes is not None and self.dtype != np.uint8:
            raise FormatError(f"a coded array holds {self.dtype} instead of bytes; fetch the file again")
        self._values: np.ndarray | None = None
        self._table: np.ndarray | None = None
        table = self.container.table
        if self.container.method == CONSTANT:
            if table.size != self.dtype.itemsize:
                raise FormatError("a constant array does not hold exactly one value; fetch the file again")
            self._values = self._substitute(table.view(self.dtype))
        elif self.container.method == RANS:
            self._read_table(table)
        elif self.container.method == EXP_GOLOMB and self.container.ranked:
            self._values = self._read_ranks(table)

    def _read_ranks(self, table: np.ndarray) -> np.ndarray:
        if table.size < 4:
            raise FormatError("the ranks of an exp-Golomb array are missing; fetch the file again")
        numbers, rest = exp_golomb.unpack_numbers(table[4:], int(table[:4].view("<u4")[0]))
        if rest.size:
            raise FormatError("the ranks of an exp-Golomb array are followed by something else; fetch the file again")
        return self._substitute(_in_range(exp_golomb.signed_unmap(numbers), self.dtype))

    def _read_table(self, table: np.ndarray) -> None:
        # A symbol takes more than two bits of the table, so no table can make this allocate much.
        capacity = min(4 * table.size, 1 << 16)
        values, slots = np.empty(capacity, np.int64), np.empty(capacity, np.uint32)
        found = library().ggp_read_model(address(table), table.size, address(values), address(slots), capacity)
        count = check(found, "the table of a coded array")
        slots = slots[:count]
        self._values = self._substitute(_in_range(values[:count], self.dtype))
        symbols = (
            self._values.view(np.uint8).astype(np.uint16)
            if self.dtype.itemsize == 1
            else np.arange(count, dtype=np.uint16)
        )
        size = library().ggp_rans_table_bytes(self.container.parameter)
        if size == 0:
            raise FormatError(
                f"the table of a coded array has 2^{self.container.parameter} slots; fetch the file again"
            )
        self._table = np.empty(size, np.uint8)
        if self.dtype == np.int8:
            # The encoder gives out slots by the bytes' patterns, in which negative numbers come last.
            order = np.argsort(symbols)
            symbols, slots = symbols[order], slots[order]
        status = library().ggp_rans_table(
            address(slots), address(symbols), count, self.container.parameter, address(self._table)
        )
        check(status, "the table of a coded array")

    def _substitute(self, symbols: np.ndarray) -> np.ndarray:
        """What the symbols decode to.

        Raises:
            FormatError: one of them must not occur.
        """
        if self._substitutes is None:
            return symbols
        values = self._substitutes[symbols]
        if values.size and values.min() < 0:
            raise FormatError(
                f"it holds the code {int(symbols[values.argmin()])}, which means nothing; fetch the file again"
            )
        return values.astype(np.uint8)

    def __len__(self) -> int:
        """Return the number of chunks; a constant array is one."""
        return max(1, len(self.container.index)) if self.count else 0

    def decode_chunk(self, i: int, out: np.ndarray) -> None:
        """Chunk i into `out`, contiguous, of this decoder's dtype and the length of the container's `symbols_of(i)`.

        Raises:
            FormatError: the chunk is damaged.
        """
        where = self.container.symbols_of(i)
        if out.dtype != self.dtype or out.size != where.stop - where.start or not out.flags.c_contiguous:
            raise FormatError(
                f"chunk {i} decodes into {where.stop - where.start} contiguous {self.dtype}, not {out.dtype}"
            )
        if self.container.method == CONSTANT:
            out[:] = self._values
            return
        if self.container.method == RANS:
            self._decode_rans(i, i + 1, out)
            return
        code, patches = self.container.code_of(i)
        if patches.size:
            raise FormatError(f"chunk {i} holds patches where there can be none; fetch the file again")
        if self.container.method == RAW:
            if code.size != out.nbytes:
                raise FormatError(f"chunk {i} holds {code.size} bytes instead of {out.nbytes}; fetch the file again")
            out.view(np.uint8)[:] = self._substitute(code)
        else:
            self._decode_exp_golomb(code, out)

    def _decode_rans(self, first: int, last: int, out: np.ndarray) -> None:
        """Chunks `first` to `last` − 1 into `out`, which has their length."""
        if self._table is None or self._values is None:
            raise FormatError("a coded array has no table; fetch the file again")
        own, failed = self.container, np.zeros(1, np.int64)
        as_bytes = self.dtype.itemsize == 1
        status = library().ggp_rans_chunks(
            *(address(own.body), address(own.starts), address(own.index), first, last, own.chunk, own.count),
            *(address(self._table), None if as_bytes else address(self._values), self._values.size),
            integer_type(self.dtype),
            None if self._substitutes is None else address(self._substitutes),
            *(address(out), self._portable, address(failed)),
        )
        if status == CHECKSUM:
            raise FormatError(
                f"chunk {failed[0]} of {len(own.index)} is damaged (its checksum does not match); fetch the file again"
            )
        check(status, f"chunk {failed[0]} of {len(own.index)}")

    def _decode_exp_golomb(self, code: np.ndarray, out: np.ndarray) -> None:
        numbers, used = exp_golomb.decode(code, out.size, self.container.parameter)
        if used != code.size:
            raise FormatError("a chunk is longer than its symbols; fetch the file again")
        if self._values is None:
            out[:] = self._substitute(_in_range(exp_golomb.signed_unmap(numbers), self.dtype))
            return
        if numbers.size and numbers.max() >= self._values.size:
            raise FormatError("a chunk names a rank that the table does not hold; fetch the file again")
        out[:] = self._values[numbers.astype(np.int64)]

    def tasks(self, out: np.ndarray) -> list[Callable[[], None]]:
        """What decodes everything into `out`, a few chunks a call, in any order, on any thread."""
        if self.container.method == RANS:
            total, chunk = len(self), self.container.chunk
            return [
                functools.partial(self._decode_rans, i, min(total, i + GROUP), out[i * chunk : (i + GROUP) * chunk])
                for i in range(0, total, GROUP)
            ]
        return [functools.partial(self.decode_chunk, i, out[self.container.symbols_of(i)]) for i in range(len(self))]

    def decode(self, *, threads: int = 1) -> np.ndarray:
        """Return all symbols, (count,).

        Raises:
            FormatError: a chunk is damaged.
        """
        out = np.empty(self.count, self.dtype)
        run_all(self.tasks(out), threads)
        return out


def decode(data: bytes | memoryview | np.ndarray, *, threads: int = 1, portable: bool = False) -> np.ndarray:
    """The symbols that `encode` was given, (count,) in their own dtype.

    Raises:
        FormatError: the data is damaged, cut off or followed by something else.
    """
    decoder = Decoder(data, portable=portable)
    size = data.nbytes if isinstance(data, np.ndarray | memoryview) else len(data)
    if decoder.container.length != size:
        raise FormatError(f"a coded array of {decoder.container.length} bytes lies in {size}; fetch the file again")
    return decoder.decode(threads=threads)
