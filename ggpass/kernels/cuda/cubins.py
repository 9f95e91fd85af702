"""Cubin: one built kernel, from the disk cache or built into it.

Only building needs TVM and a compiler: what is in the cache serves without, whatever versions built it, as the CPU's
libraries do.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from ggpass.kernels import cache
from ggpass.kernels.cuda import compiler
from ggpass.kernels.cuda.archs import parse
from ggpass.kernels.unavailable import KernelsUnavailable

logger = logging.getLogger("ggpass")

_HERE = Path(__file__).parent
_GENERATOR = _HERE / "generate"
_TRITON = _GENERATOR / "triton"

#: What a launch must know of a kernel beside its variant: raised when parameters change their meaning.
INTERFACE = 1


class Named(Protocol):
    """A variant, as far as building goes: `variants.Variant` and the tests' own."""

    @property
    def name(self) -> str: ...


class Source(Protocol):
    """CUDA C without includes, its entry point and its parameters' names in order."""

    @property
    def text(self) -> str: ...
    @property
    def entry(self) -> str: ...
    @property
    def parameters(self) -> Sequence[str]: ...


Generate = Callable[[Any], Source]


@dataclass(frozen=True)
class Cubin:
    """One kernel for one architecture.

    Attributes:
        name: of its variant.
        arch: as "sm_90".
        entry: the function's name in the image.
        parameters: names in order; `launch` knows their types.
        compiler: what built it, as "nvcc13.0.88".
        interface: hash of what a launch relies on, see `interface`.
        log: the compiler's words.
        image: the cubin itself.
    """

    name: str
    arch: str
    entry: str
    parameters: tuple[str, ...]
    compiler: str
    interface: str
    log: str
    image: bytes

    @property
    def cuda(self) -> int:
        """The CUDA release of its compiler: the driver's must not be older."""
        return int((re.findall(r"\d+", self.compiler) or ["0"])[0])

    @property
    def registers(self) -> int | None:
        """Registers a thread uses, as the compiler said."""
        return _number(r"Used (\d+) registers", self.log)

    @property
    def shared(self) -> int:
        """Bytes of static shared memory, as the compiler said."""
        return _number(r"(\d+) bytes smem", self.log) or 0

    @property
    def spills(self) -> int | None:
        """Bytes of registers spilled to memory, stores and loads, as the compiler said."""
        found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", self.log)
        return int(found[1]) + int(found[2]) if found else None

    def to_bytes(self) -> bytes:
        """A line of JSON and the image: what the disk cache and model files hold."""
        head = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "image"}
        return json.dumps(head, ensure_ascii=True).encode() + b"\n" + self.image

    @classmethod
    def from_bytes(cls, data: bytes) -> Cubin:
        """The inverse of `to_bytes`.

        Raises:
            ValueError: anything else.
        """
        line, newline, image = data.partition(b"\n")
        head = json.loads(line)
        names = {field.name for field in fields(cls)} - {"image"}
        if not newline or not isinstance(head, dict) or set(head) != names or not image.startswith(b"\x7fELF"):
            raise ValueError("it is no cubin with its description")
        parameters = head.pop("parameters")
        texts = [*head.values(), *(parameters if isinstance(parameters, list) else [None])]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("its description is not made of strings")
        parse(head["arch"])
        return cls(**head, parameters=tuple(parameters), image=image)


def _number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return int(found[1]) if found else None


@functools.cache
def interface() -> str:
    """Sixteen hex digits that change with what a launch relies on: geometry, blocking, parameters."""
    return cache.key_of(f"cuda interface {INTERFACE}", _described())


@functools.cache
def key() -> str:
    """Sixteen hex digits that change whenever the generated CUDA C could."""
    return cache.key_of(f"cuda {INTERFACE}", [*sorted(_GENERATOR.glob("*.py")), *_described()])


def _described() -> list[Path]:
    """The files that describe the kernels in numbers."""
    return sorted([*_HERE.glob("*geometry.py"), _HERE / "variants.py"])


def generated(variant: Any) -> Source:
    """The CUDA C that TVM generates.

    Raises:
        KernelsUnavailable: TVM is not installed, or cannot be imported.
    """
    try:
        from ggpass.kernels.cuda.generate.source import source
    except ImportError as error:
        raise KernelsUnavailable(
            f"apache-tvm cannot be imported to build {variant.name} ({error}); run `pip install 'ggpass[tvm]'`"
        ) from error
    return source(variant)


def obtain(
    variant: Named,
    arch: str,
    newest: int | None = None,
    *,
    directory: Path | None = None,
    generate: Generate = generated,
) -> Cubin:
    """The cubin of a variant for an architecture, from the disk cache or built into it.

    Raises:
        KernelsUnavailable: it is not there and cannot be built.
    """
    parse(arch)
    directory = cache.default_directory() if directory is None else directory
    if variant.name.startswith("triton_"):
        return _obtain_triton(variant, arch, newest, directory)
    stem = f"cuda-{arch}-{variant.name}-{key()}"
    tvm = cache.version_of("apache-tvm")
    try:
        built_by = compiler.find(newest)
    except KernelsUnavailable as error:
        return _cached(directory, stem, newest, f"kernel {variant.name} for {arch}", str(error))
    if tvm is None:
        reason = "apache-tvm is not installed to build it; run `pip install 'ggpass[tvm]'`"
        return _cached(directory, stem, newest, f"kernel {variant.name} for {arch}", reason)
    path = directory / f"{stem}-tvm{tvm}-{built_by.label}.cubin"

    def build(to: Path) -> None:
        made = generate(variant)
        compiled = built_by.compile(made.text, arch, variant.name)
        cubin = Cubin(
            variant.name,
            arch,
            made.entry,
            tuple(made.parameters),
            built_by.label,
            interface(),
            compiled.log,
            compiled.cubin,
        )
        to.write_bytes(cubin.to_bytes())

    return _read(cache.obtain(path, build))


def _obtain_triton(variant: Any, arch: str, newest: int | None, directory: Path) -> Cubin:
    """The cubin of a kernel of Triton's, which brings its own compiler."""
    stem = f"cuda-{arch}-{variant.name}-{cache.key_of('triton', [*sorted(_TRITON.glob('*.py')), *_described()])}"
    version = cache.version_of("triton")
    if version is None:
        reason = "triton is not installed to build it; run `pip install triton`"
        return _cached(directory, stem, newest, f"kernel {variant.name} for {arch}", reason)

    def build(to: Path) -> None:
        try:
            from ggpass.kernels.cuda.generate.triton.gemm import build as compile_triton

            made = compile_triton(variant, arch)
        except Exception as error:  # whatever goes wrong in another compiler, the other kernels are there
            raise KernelsUnavailable(f"triton {version} does not build {variant.name} for {arch}: {error}") from error
        label = f"ptxas{made.cuda}-triton{version}"
        described = (variant.name, made.arch, made.entry, tuple(made.parameters), label, interface(), made.log)
        to.write_bytes(Cubin(*described, made.cubin).to_bytes())

    cubin = _read(cache.obtain(directory / f"{stem}-triton{version}.cubin", build))
    if newest is not None and cubin.cuda > newest:
        raise KernelsUnavailable(
            f"triton {version} builds for CUDA {cubin.cuda} and the driver takes {newest}; update the driver"
        )
    return cubin


def _read(path: Path) -> Cubin:
    try:
        return Cubin.from_bytes(path.read_bytes())
    except (OSError, ValueError) as error:
        raise KernelsUnavailable(f"cannot read {path} ({error}); delete the file to build it anew") from error


def _cached(directory: Path, stem: str, newest: int | None, what: str, reason: str) -> Cubin:
    """What any version of TVM and of a compiler built, where this process cannot build."""
    for path in sorted(directory.glob(f"{stem}-*.cubin"), reverse=True):
        if cache.whole(path):
            cubin = _read(path)
            if newest is None or cubin.cuda <= newest:
                return cubin
    raise KernelsUnavailable(f"{what} is not in {directory}, and {reason}; or load a file that carries it")


def obtain_all(
    variants: Iterable[Named],
    arch: str,
    newest: int | None = None,
    *,
    directory: Path | None = None,
    generate: Generate = generated,
) -> list[Cubin]:
    """`obtain` for each variant, compiling several at a time.

    Triton's kernels are alternatives to others: where one cannot be had it is left out, which is logged.

    Raises:
        KernelsUnavailable: as `obtain`.
    """
    # TVM generates one text at a time, while the compilers are processes of their own.
    lock = threading.Lock()

    def one_at_a_time(variant: Any) -> Source:
        with lock:
            return generate(variant)

    def build(variant: Named) -> Cubin | None:
        try:
            return obtain(variant, arch, newest, directory=directory, generate=one_at_a_time)
        except KernelsUnavailable as error:
            if not variant.name.startswith("triton_"):
                raise
            logger.info("left out: %s", error)
            return None

    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1)), "ggpass-nvcc") as pool:
        return [cubin for cubin in pool.map(build, variants) if cubin is not None]
