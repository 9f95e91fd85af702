"""How a tensor becomes a payload: 8-bit codes, symbols on a grid, or lossless byte planes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ggpass.errors import FormatError
from ggpass.formats import FORMATS, Format, Quantized, Scheme, get_format, quantize
from ggpass.packed.codec.container import Array
from ggpass.packed.codec.encoder import encode_pieces
from ggpass.packed.codec.planes import split_planes
from ggpass.packed.dtypes import DTYPE_BITS, WEIGHT_DTYPES, as_bytes, as_tensor, planes_of
from ggpass.packed.grid import DEFAULT_LOSS, GridChoice, to_grid
from ggpass.packed.layout import Entry, Source
from ggpass.packed.manifest import Stored, codebook_hash

#: Bytes of a source read at a time where a tensor need not be in memory as a whole.
BLOCK_BYTES = 1 << 22

#: Tensors below this many bytes stay as they are when packing losslessly: tables and headers would eat what is saved.
MIN_LOSSLESS = 1 << 10


class Method(Protocol):
    """One way to pack."""

    @property
    def name(self) -> str:
        """What the command line and the resume journal call it."""
        ...

    def reason_to_leave(self, entry: Entry) -> str:
        """Why a tensor stays as it is; empty where this method takes it."""
        ...

    def encode(self, source: Source, threads: int) -> tuple[Stored, Iterator[Array]]:
        """The manifest's entry, its check still 0, and the coded arrays of the payload, computed as they are written.

        Raises:
            FormatError: the tensor cannot be held this way (NaN, infinity); without its name.
        """
        ...


def _no_weight(entry: Entry) -> str:
    if entry.dtype not in WEIGHT_DTYPES:
        return f"is {entry.dtype}, not a floating-point weight"
    if len(entry.shape) < 2:
        return f"{len(entry.shape)}-D (bias, norm): stays as it is"
    return "" if entry.size else "is empty"


@dataclass(frozen=True)
class Codes:
    """w ≈ codebook[codes]·scale, the codes at their entropy, the scales lossless.

    Attributes:
        format: the codebook.
        scheme: how scales are chosen.
    """

    format: Format
    scheme: Scheme = field(default_factory=Scheme)

    @property
    def name(self) -> str:
        return f"{self.format.name} {self.scheme}"

    def reason_to_leave(self, entry: Entry) -> str:
        reason = _no_weight(entry)
        if not reason and entry.size + 4 * entry.shape[0] >= entry.nbytes:
            return "codes and scales would be no smaller"
        return reason

    def encode(self, source: Source, threads: int) -> tuple[Stored, Iterator[Array]]:
        entry = source.entry
        quantized = self._quantize(source)
        stored = Stored("codes", entry.dtype, entry.shape, 0, self.format.name, codebook_hash(self.format))
        return stored, encode_codes(quantized, threads)

    def _quantize(self, source: Source) -> Quantized:
        entry = source.entry
        rows, columns = entry.shape[0], entry.size // entry.shape[0]
        if self.scheme.granularity != "channel":
            return quantize(as_tensor(source.read(), entry.dtype, (rows, columns)), self.format, self.scheme)
        # A channel's scale needs its own row alone, so the float weight never is in memory as a whole.
        codes, scale = torch.empty(rows, columns, dtype=torch.uint8), torch.empty(rows)
        row_bytes = columns * DTYPE_BITS[entry.dtype] // 8
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            block = as_tensor(source.read(start * row_bytes, stop * row_bytes), entry.dtype, (stop - start, columns))
            scale[start:stop] = quantize(block, self.format, self.scheme, codes[start:stop]).scale
        return Quantized(codes, scale)


def encode_codes(quantized: Quantized, threads: int) -> Iterator[Array]:
    """Yield the codes, then the scales as the integers of their bits: powers of two are few different ones."""
    yield encode_pieces(quantized.codes.cpu().numpy(), threads=threads)
    yield encode_pieces(as_bytes(quantized.scale).view("<u4"))


@dataclass(frozen=True)
class Grid:
    """w ≈ step·q, the symbols q at their entropy.

    Attributes:
        choice: how each tensor's step is found.
        steps: name -> step, of tensors whose steps are known, as `Regularizer.grid_steps` tells them.
    """

    choice: GridChoice = field(default_factory=lambda: GridChoice(loss=DEFAULT_LOSS))
    steps: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"grid {self.choice}" + (f" {dict(self.steps)}" if self.steps else "")

    def reason_to_leave(self, entry: Entry) -> str:
        return _no_weight(entry)

    def encode(self, source: Source, threads: int) -> tuple[Stored, Iterator[Array]]:
        entry = source.entry
        weight: Tensor = as_tensor(source.read(), entry.dtype, entry.shape)
        known = self.steps.get(entry.name)
        step = (self.choice if known is None else GridChoice(step=known)).step_for(weight)
        symbols = to_grid(weight, step)
        return Stored("grid", entry.dtype, entry.shape, step=step), iter([encode_pieces(symbols, threads=threads)])


@dataclass(frozen=True)
class Lossless:
    """w itself: the bytes of its elements in planes, each at its entropy."""

    @property
    def name(self) -> str:
        return "lossless"

    def reason_to_leave(self, entry: Entry) -> str:
        return f"is smaller than {MIN_LOSSLESS} bytes" if entry.nbytes < MIN_LOSSLESS else ""

    def encode(self, source: Source, threads: int) -> tuple[Stored, Iterator[Array]]:
        entry = source.entry
        width, rotate = planes_of(entry.dtype)
        # Read in blocks: the planes take the place of the tensor, they do not stand beside it.
        planes = [np.empty(entry.nbytes // width, np.uint8) for _ in range(width)]
        step = BLOCK_BYTES // width
        for start in range(0, len(planes[0]), step):
            stop = min(len(planes[0]), start + step)
            block = split_planes(source.read(start * width, stop * width), width, rotate)
            for plane, part in zip(planes, block):
                plane[start:stop] = part
        arrays = (encode_pieces(planes.pop(0), threads=threads) for _ in range(width))
        return Stored("lossless", entry.dtype, entry.shape), arrays


def parse_method(text: str, loss: float | None = None) -> Method:
    """Parse a format's name, `lossless`, `grid` (the coarsest within `loss`), `grid:0.01` or `grid:sigma/8`.

    Raises:
        FormatError: none of these; the message lists them.
    """
    name, colon, argument = text.partition(":")
    if name != "grid" and (colon or loss is not None):
        raise FormatError(f"{name} takes no step and no loss; only grid does, as in grid:0.01 or grid:sigma/8")
    if name == "grid":
        return Grid(_parse_grid(argument, loss))
    if name == "lossless":
        return Lossless()
    if name not in FORMATS:
        raise FormatError(
            f"there is no way to pack called {name!r}; choose {', '.join(FORMATS)}, grid[:step] or lossless"
        )
    return Codes(get_format(name))


def _parse_grid(argument: str, loss: float | None) -> GridChoice:
    if not argument:
        return GridChoice(loss=DEFAULT_LOSS if loss is None else loss)
    if loss is not None:
        raise FormatError(f"a grid has a step ({argument}) or a loss ({loss}), not both")
    text = argument.replace("σ", "sigma").replace(" ", "")
    try:
        if text.startswith("sigma/"):
            return GridChoice(sigma=1 / float(text.removeprefix("sigma/")))
        if text.endswith("sigma"):
            return GridChoice(sigma=float(text.removesuffix("sigma").removesuffix("*") or "1"))
        return GridChoice(step=float(text))
    except (ValueError, ZeroDivisionError) as error:
        raise FormatError(f"{argument!r} is no grid step ({error}); give a number, as 0.01, or sigma/8") from error
