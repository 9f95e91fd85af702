"""One launch on the emulator."""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ggpass.kernels.cuda.compiler import Source
from ggpass.kernels.cuda.variants import Launch
from support.cuda_emulator.build import library

#: What an output holds before the run: a NaN as float32, bfloat16 and float16 alike.
POISON = 0xFF
_GUARD = 64


class EmulatorFault(AssertionError):
    """The kernel did what a GPU forbids, or leaves undefined."""


@dataclass
class _Placed:
    """An argument in memory: at a multiple of 16 bytes and of no more, guard zones around it."""

    name: str
    memory: np.ndarray
    start: int
    bytes: int
    writes: np.ndarray | None

    @property
    def address(self) -> int:
        return self.memory.ctypes.data + self.start

    def guards(self) -> Iterable[np.ndarray]:
        return self.memory[: self.start], self.memory[self.start + self.bytes :]


def _place(name: str, array: np.ndarray, output: bool) -> _Placed:
    memory = np.full(array.nbytes + 2 * _GUARD + 32, POISON, np.uint8)
    start = _GUARD + (16 - (memory.ctypes.data + _GUARD)) % 32
    placed = _Placed(name, memory, start, array.nbytes, np.zeros(array.nbytes, np.uint8) if output else None)
    if not output:
        memory[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return placed


def sparse(count: int) -> np.ndarray:
    """Zeros that take memory only where they are touched: for offsets beyond 31 bits."""
    return np.frombuffer(mmap.mmap(-1, count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


def _place_as_it_is(name: str, array: np.ndarray, output: bool) -> _Placed:
    writes = sparse(array.nbytes) if output else None
    return _Placed(name, array.reshape(-1).view(np.uint8), 0, array.nbytes, writes)


def run(
    source: Source,
    launch: Launch,
    arguments: Mapping[str, np.ndarray | int],
    outputs: Mapping[str, np.ndarray],
    *,
    seed: int = 0,
    blocks: Iterable[tuple[int, int, int]] | None = None,
    in_place: bool = False,
) -> None:
    """Launch the kernel.

    Args:
        source: of the kernel.
        launch: its grid, block and shared memory.
        arguments: inputs by parameter name, arrays or numbers; those that the kernel does not take are left out.
        outputs: arrays by parameter name, filled by the run. Each byte is to be written once, by what is run of it.
        seed: of the order in which threads run; 0 for that of their numbers.
        blocks: only these, instead of the whole grid; then an output need not be written wholly.
        in_place: take the arrays where they are, instead of copies between guard zones.

    Raises:
        EmulatorFault: see the package.
    """
    emulated = library(source)
    place = _place_as_it_is if in_place else _place
    placed: dict[str, _Placed] = {}
    values = []
    emulated.emulator_forget_buffers()
    for name in source.parameters:
        value = outputs[name] if name in outputs else arguments[name]
        if isinstance(value, int):
            values.append(ctypes.c_int32(value))
            continue
        at = placed[name] = place(name, value, name in outputs)
        written = None if at.writes is None else ctypes.c_void_p(at.writes.ctypes.data)
        begin = ctypes.c_void_p(at.address)
        if emulated.emulator_add_buffer(name.encode(), begin, ctypes.c_size_t(at.bytes), written):
            raise RuntimeError("the emulator holds no more buffers")
        values.append(begin)
    _launch(emulated, launch, values, seed, blocks)
    for name, at in placed.items():
        if not in_place and any((guard != POISON).any() for guard in at.guards()):
            raise EmulatorFault(f"the guard zone of {name} was written")
    for name, array in outputs.items():
        at = placed[name]
        if blocks is None and not (at.writes == 1).all():
            missing = int(np.flatnonzero(at.writes != 1)[0])
            raise EmulatorFault(f"byte {missing} of {name} was not written, and {int((at.writes != 1).sum())} in all")
        if not in_place:
            content = at.memory[at.start : at.start + at.bytes]
            array[...] = content.view(array.dtype).reshape(array.shape)


def _launch(emulated: ctypes.CDLL, launch: Launch, values: list, seed: int, blocks) -> None:
    chosen = list(itertools.product(*map(range, launch.grid)) if blocks is None else blocks)
    numbers = np.array(chosen, np.uint32).reshape(-1)
    grid = np.array(launch.grid, np.uint32)
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    message = ctypes.create_string_buffer(500)
    failed = emulated.emulator_run(
        ctypes.c_void_p(grid.ctypes.data), ctypes.c_void_p(numbers.ctypes.data), ctypes.c_size_t(len(chosen)),
        ctypes.c_int(launch.block), ctypes.c_size_t(launch.shared), ctypes.c_uint(seed), pointers, message,
        ctypes.c_size_t(len(message)),
    )  # fmt: skip
    if failed:
        raise EmulatorFault(message.value.decode())
