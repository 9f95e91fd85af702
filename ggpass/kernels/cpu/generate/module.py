# mypy: ignore-errors
"""All kernels of one instruction set as one TVM module, and its shared library."""

from __future__ import annotations

import logging
import shutil
import subprocess
import tempfile
from pathlib import Path

import tvm

from ggpass.kernels.cpu.generate.blocking import ROWS, TILE
from ggpass.kernels.cpu.generate.decoders import Decoder, decoders
from ggpass.kernels.cpu.generate.dequantize import dequantize_kernel, embedding_kernel
from ggpass.kernels.cpu.generate.rows import rows_kernel
from ggpass.kernels.cpu.generate.tile import tile_kernel
from ggpass.kernels.cpu.isa import Isa
from ggpass.kernels.cpu.regimes import BY_KIND
from ggpass.kernels.unavailable import KernelsUnavailable

logger = logging.getLogger("ggpass")


def module(isa: Isa) -> tvm.IRModule:
    """Every kernel, named `<regime>_<decoder>`: those that the regimes choose from."""
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
    """The module compiled for `isa`, whatever the CPU of this machine."""
    target = {"kind": "llvm", "mtriple": isa.triple, "mcpu": isa.cpu}
    if isa.features:
        target["mattr"] = list(isa.features)
    return tvm.compile(module(isa) if mod is None else mod, target=tvm.target.Target(target)).mod


def build(isa: Isa, path: Path) -> None:
    """Write the shared library of all kernels of `isa` to `path`."""
    logger.info("building the %s kernels, once for this version (some seconds)", isa.name)
    with tempfile.TemporaryDirectory() as folder:
        objects = Path(folder) / "kernels.o"
        compile_module(isa).write_to_file(str(objects))
        _link(objects, path)


def _link(objects: Path, path: Path) -> None:
    """Link without a compiler: the object needs nothing but what the process already holds."""
    linker = next((found for name in ("ld", "ld.lld", "ld.gold", "cc") if (found := shutil.which(name))), None)
    if linker is None:
        raise KernelsUnavailable("no linker to build the kernels with; install binutils (or any C compiler)")
    run = subprocess.run(
        [linker, "-shared", "-o", str(path), str(objects)], capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        raise KernelsUnavailable(f"{linker} could not link the kernels: {run.stderr.strip()}; install binutils")
