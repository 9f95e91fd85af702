# mypy: ignore-errors
"""All kernels of one instruction set as one TVM module, and its shared library."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
from pathlib import Path

import tvm

from ggpass.errors import KernelsUnavailable
from ggpass.kernels.cpu.generate.decoders import Decoder, decoders
from ggpass.kernels.cpu.generate.dequantize import dequantize_kernel, embedding_kernel
from ggpass.kernels.cpu.generate.rows import RowsShape, rows_kernel
from ggpass.kernels.cpu.generate.tile import TileShape, tile_kernel
from ggpass.kernels.cpu.isa import Isa
from ggpass.kernels.cpu.regimes import BY_KIND, PANEL_VECTORS

logger = logging.getLogger("ggpass")

#: Bytes that the disk must have: with less a linker that fails may have met its end, and says so in many ways.
LEAST_FREE = 16 << 20

# How each kernel is blocked, as measured on Zen 3 (4096 x 4096, one thread): rows of x, then GB/s of codes.
#
# rows1: two rows of codes at a time, N / 2 apart, read 5 to 15 % faster from memory than one (768 x 768 15.9 against
# 13.8, 1024 x 4096 15.3 against 14.7), the same from caches (16.9; without any decoding 20); rows close by, 10 to 11.
# Four sums in all: eight spill registers, 12.3. Prefetch 1 KiB ahead; 2 and 4 KiB lose some percent. Eight rows of x:
# rows8 takes 3.9 ms, a tile of one vector by twelve columns 4.5 ms (more loads than products), of two vectors by six
# 7.0 ms (half of it padding). A tile of four times six rows, 128 codes deep, takes 1 % less than one of two times six,
# 256 deep, and 2 % less than one of four times six, 256 deep.
ROWS = {
    shape.batch: shape
    for shape in (
        RowsShape(batch=1, chains=2, ahead=1024, streams=2),
        RowsShape(batch=2, chains=4, ahead=2, rows=64, depth=1024),
        RowsShape(batch=4, chains=2, ahead=2, rows=64, depth=512),
        RowsShape(batch=8, chains=1, ahead=2, rows=64, depth=512),
    )
}
TILE = TileShape(vectors=PANEL_VECTORS, columns=6, tiles=4, depth=128)


def module(isa: Isa) -> tvm.IRModule:
    """Return every kernel, named `<regime>_<decoder>`: those that the regimes choose from."""
    functions = {}
    for decoder in decoders(isa):
        for kernel in BY_KIND[decoder.name].kernels():
            functions[f"{kernel}_{decoder.name}"] = _make(kernel, isa, decoder)
    return tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in functions.items()})


def _make(kernel: str, isa: Isa, decoder: Decoder):
    match kernel:
        case "dequantize":
            return dequantize_kernel(isa, decoder)
        case "embedding":
            return embedding_kernel(isa, decoder)
        case "tile":
            return tile_kernel(isa, decoder, TILE)
    return rows_kernel(isa, decoder, ROWS[int(kernel.removeprefix("rows"))])


def compile_module(isa: Isa, mod: tvm.IRModule | None = None):
    """Return the module compiled for `isa`, whatever the CPU of this machine."""
    target = {"kind": "llvm", "mtriple": isa.triple, "mcpu": isa.cpu}
    if isa.features:
        target["mattr"] = list(isa.features)
    return tvm.compile(module(isa) if mod is None else mod, target=tvm.target.Target(target)).mod


def build(isa: Isa, path: Path) -> None:
    """Write the shared library of all kernels of `isa` to `path`, and what it is linked from beside it for a while.

    Raises:
        KernelsUnavailable: no linker, or one that refuses.
        OSError: the disk is full.
    """
    logger.info("building the %s kernels, once for this version (some seconds)", isa.name)
    objects = path.with_suffix(".o")
    compile_module(isa).write_to_file(str(objects))
    _link(objects, path)
    objects.unlink()


def _link(objects: Path, path: Path) -> None:
    """Link without a compiler: the object needs nothing but what the process already holds."""
    linker = next((found for name in ("ld", "ld.lld", "ld.gold", "cc") if (found := shutil.which(name))), None)
    if linker is None:
        raise KernelsUnavailable("no linker to build the kernels with; install binutils (or any C compiler)")
    run = subprocess.run(
        [linker, "-shared", "-o", str(path), str(objects)], capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        if shutil.disk_usage(path.parent).free < LEAST_FREE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path.parent))
        raise KernelsUnavailable(f"{linker} could not link the kernels: {run.stderr.strip()}; install binutils")
