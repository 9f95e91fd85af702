"""Generate the kernels of the ONNX Runtime library from the CPU target's own TVM definitions, while a wheel is built.

For each instruction set of this architecture: an object file, and a C++ table of what it holds (kernels.h). Neither
needs TVM afterwards. Results are kept in the build folder under a key of everything that they depend on.
CMake runs this while it configures, since a machine without TVM should get a wheel without this one library.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ggpass.kernels.cpu.isa import Isa

HERE = Path(__file__).resolve()
PACKAGE = HERE.parents[2] / "ggpass"
KERNELS = PACKAGE / "kernels" / "cpu"


def make_package_light() -> None:
    """Let `import ggpass.kernels...` find its files without running ggpass/__init__.py, which imports torch."""
    package = types.ModuleType("ggpass")
    package.__path__ = [str(PACKAGE)]
    sys.modules["ggpass"] = package
    # An editable install elsewhere would lead to its own files instead.
    sys.meta_path = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable_")]


def instruction_sets() -> dict[str, Isa]:
    """Every set of this machine's architecture; the library chooses among them where it runs."""
    from ggpass.kernels.cpu import isa

    portable = isa.portable()
    return {one.name: one for one in isa.ALL if one.triple == portable.triple}


def key(one: Isa) -> str:
    """What changes whenever the generated code could."""
    digest = hashlib.sha256(repr(one).encode())
    sources = [HERE, KERNELS / "regimes.py", *sorted((KERNELS / "generate").glob("*.py"))]
    for source in sources:
        digest.update(source.read_bytes())
    for distribution in ("apache-tvm", "apache-tvm-ffi"):
        digest.update(f"{distribution}={metadata.version(distribution)}".encode())
    return digest.hexdigest()


def identifier(one: Isa) -> str:
    """The set's name as a C++ identifier."""
    return one.name.replace("-", "_")


def table(one: Isa) -> str:
    """The C++ source that says which kernel of the object does what."""
    from ggpass.kernels.cpu.regimes import BY_KIND, PANEL_VECTORS  # BY_KIND is in the order of Kind in kernels.h

    def symbol(name: str) -> str:
        return f"__tvm_ffi_{identifier(one)}_{name}"

    names: list[str] = []
    decoders = []
    for kind, regimes in BY_KIND.items():
        # What BY_KIND leaves to torch's BLAS is left to the tile kernel here.
        ranges = [*((str(last), kernel) for last, kernel in regimes.ranges), ("INT64_MAX", "tile")]
        listed = []
        for last, kernel in ranges:
            width = PANEL_VECTORS * one.lanes if kernel == "tile" else int(kernel.removeprefix("rows"))
            listed.append(f"{{{last}, {width}, {symbol(f'{kernel}_{kind}')}}}")
        others = [symbol(f"{kernel}_{kind}") for kernel in ("dequantize", "embedding")]
        names += [*(symbol(f"{kernel}_{kind}") for _, kernel in ranges), *others]
        decoders.append(f"        {{{{{', '.join(listed)}}}, {', '.join(others)}}},")
    return "\n".join(
        [
            "// Written by native/onnxruntime/generate.py.",
            '#include "kernels.h"',
            "",
            'extern "C" {',
            *(f"ggpass::Generated {name};" for name in dict.fromkeys(names)),
            "}",
            "",
            f"extern const ggpass::Isa ggpass_isa_{identifier(one)};",
            f"const ggpass::Isa ggpass_isa_{identifier(one)} = {{",
            f'    "{one.name}",',
            "    {",
            *decoders,
            "    }};",
            "",
        ]
    )


def generate_one(one: Isa, folder: Path) -> None:
    """Write the object and its table."""
    import tvm

    from ggpass.kernels.cpu.generate.decoders import decoders
    from ggpass.kernels.cpu.generate.module import TILE, compile_module, module
    from ggpass.kernels.cpu.generate.tile import tile_kernel

    functions = {name.name_hint: function for name, function in module(one).functions.items()}
    for decoder in decoders(one):
        # There is no BLAS here, so the tile kernel multiplies however many rows there are, for every decoder.
        functions.setdefault(f"tile_{decoder.name}", tile_kernel(one, decoder, TILE))
    renamed = {f"{identifier(one)}_{name}": function for name, function in functions.items()}
    renamed = {name: function.with_attr("global_symbol", name) for name, function in renamed.items()}
    compile_module(one, tvm.IRModule(renamed)).write_to_file(str(folder / f"{identifier(one)}.o"))
    (folder / f"{identifier(one)}.cpp").write_text(table(one), encoding="utf-8")


def generate_all(folder: Path) -> None:
    """Generate what is missing or stale, one process for each instruction set, and print their identifiers."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = instruction_sets()
    stale = []
    for one in sets.values():
        stamp = folder / f"{identifier(one)}.key"
        if not stamp.is_file() or stamp.read_text(encoding="ascii") != key(one):
            stamp.unlink(missing_ok=True)
            stale.append(one)

    def run(one: Isa) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(HERE), str(folder), "--isa", one.name]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for one, done in zip(stale, pool.map(run, stale)):
            if done.returncode != 0:
                raise SystemExit(f"the {one.name} kernels could not be generated: {done.stderr.strip()}")
            (folder / f"{identifier(one)}.key").write_text(key(one), encoding="ascii")
    sys.stdout.write(";".join(identifier(one) for one in sets.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the objects and tables go")
    parser.add_argument("--isa", help="only this instruction set, in this process")
    arguments = parser.parse_args()
    make_package_light()
    if importlib.util.find_spec("tvm") is None:
        raise SystemExit("apache-tvm is not installed where the wheel was built")
    if arguments.isa is None:
        generate_all(arguments.folder)
    else:
        generate_one(instruction_sets()[arguments.isa], arguments.folder)


if __name__ == "__main__":
    main()
