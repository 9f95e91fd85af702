"""The cubin of a variant: from the disk cache, from a file that was loaded, or built into the cache.

Only building needs TVM and a compiler: what is in the cache serves without, whatever versions built it, as the CPU's
libraries do. The generator is the caller's: this module knows no TVM.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ggpass.errors import KernelsUnavailable
from ggpass.kernels import cache
from ggpass.kernels.cuda import compiler, cubin
from ggpass.kernels.cuda.archs import Capability, arch_for, parse
from ggpass.kernels.cuda.compiler import Source
from ggpass.kernels.cuda.cubin import INTERFACE, Cubin, described, interface
from ggpass.kernels.cuda.variants import Variant

logger = logging.getLogger("ggpass")

_GENERATOR = Path(__file__).parent / "generate"
_TRITON = _GENERATOR / "triton"

Generate = Callable[[Variant], Source]


@functools.cache
def key() -> str:
    """Return sixteen hex digits that change whenever the generated CUDA C could."""
    return cache.key_of(f"cuda {INTERFACE}", [*sorted(_GENERATOR.glob("*.py")), *described()])


@dataclass(frozen=True)
class Builder:
    """Cubins of one generator in one folder.

    Attributes:
        generate: the CUDA C of a variant.
        directory: where built kernels are kept; the user's cache directory if None.
    """

    generate: Generate
    directory: Path | None = None

    def find(self, variant: Variant, capability: Capability, newest: int | None = None) -> Cubin:
        """Return the cubin of a variant for a device: a cached one, a loaded file's, or one that is built now.

        A file's kernels serve every model of the process, so that they come behind those that this machine built.

        Args:
            capability: of the device.
            newest: the driver's CUDA release.

        Raises:
            KernelsUnavailable: none can be had, with the reason and the next action.
        """
        brought = cubin.FROM_FILES.find(variant.name, capability, newest)
        try:
            return self.obtain(variant, arch_for(capability), newest, brought)
        except KernelsUnavailable as error:
            there = cubin.FROM_FILES.archs()
            also = f"; loaded files carry other kernels, for {', '.join(there)}" if there else ""
            raise KernelsUnavailable(f"{error}{also}") from error

    def obtain(self, variant: Variant, arch: str, newest: int | None = None, brought: Cubin | None = None) -> Cubin:
        """Return the cubin of a variant for an architecture, from the disk cache or built into it.

        Args:
            brought: the one of a loaded file, taken instead of building.

        Raises:
            KernelsUnavailable: it is not there and cannot be built.
        """
        parse(arch)
        if variant.name.startswith("triton_"):
            return self._obtain_triton(variant, arch, newest, brought)
        stem, tvm = f"cuda-{arch}-{variant.name}-{key()}", cache.version_of("apache-tvm")
        try:
            built_by = compiler.find(newest)
        except KernelsUnavailable as error:
            return self._cached(stem, newest, str(error), brought)
        if tvm is None:
            reason = "apache-tvm is not installed to build it; run `pip install 'ggpass[tvm]'`"
            return self._cached(stem, newest, reason, brought)

        def build(to: Path) -> None:
            made = self.generate(variant)
            compiled = built_by.compile(made.text, arch, variant.name)
            head = (variant.name, arch, made.entry, made.parameters, built_by.label, interface(), compiled.log)
            to.write_bytes(Cubin(*head, compiled.cubin).to_bytes())

        return self._kept_or_built(f"{stem}-tvm{tvm}-{built_by.label}", build, brought)

    def obtain_all(self, variants: Iterable[Variant], arch: str, newest: int | None = None) -> list[Cubin]:
        """`obtain` for each variant, compiling several at a time.

        Triton's kernels are alternatives to others: one that cannot be had is left out, which is logged.

        Raises:
            KernelsUnavailable: as `obtain`.
        """
        # TVM generates one text at a time, while the compilers are processes of their own.
        lock = threading.Lock()

        def one_at_a_time(variant: Variant) -> Source:
            with lock:
                return self.generate(variant)

        builder = replace(self, generate=one_at_a_time)

        def build(variant: Variant) -> Cubin | None:
            try:
                return builder.obtain(variant, arch, newest)
            except KernelsUnavailable as error:
                if not variant.name.startswith("triton_"):
                    raise
                logger.info("left out: %s", error)
                return None

        with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1)), "ggpass-nvcc") as pool:
            return [built for built in pool.map(build, variants) if built is not None]

    def _obtain_triton(self, variant: Any, arch: str, newest: int | None, brought: Cubin | None) -> Cubin:
        """Return the cubin of a kernel of Triton's, which brings its own compiler."""
        sources = [*sorted(_TRITON.glob("*.py")), *described()]
        stem, version = f"cuda-{arch}-{variant.name}-{cache.key_of('triton', sources)}", cache.version_of("triton")
        if version is None:
            reason = "triton is not installed to build it; run `pip install triton`"
            return self._cached(stem, newest, reason, brought)

        def build(to: Path) -> None:
            try:
                from ggpass.kernels.cuda.generate.triton.gemm import build as compile_triton

                made = compile_triton(variant, arch)
            except Exception as error:  # whatever goes wrong in another compiler, the other kernels are there
                raise KernelsUnavailable(
                    f"triton {version} does not build {variant.name} for {arch}: {error}"
                ) from error
            label = f"ptxas{made.cuda}-triton{version}"
            head = (variant.name, made.arch, made.entry, made.parameters, label, interface(), made.log)
            to.write_bytes(Cubin(*head, made.cubin).to_bytes())

        built = self._kept_or_built(f"{stem}-triton{version}", build, brought)
        if newest is not None and built.cuda > newest:
            raise KernelsUnavailable(
                f"triton {version} builds for CUDA {built.cuda} and the driver takes {newest}; update the driver"
            )
        return built

    @property
    def _folder(self) -> Path:
        return cache.default_directory() if self.directory is None else self.directory

    def _kept_or_built(self, name: str, build: Callable[[Path], None], brought: Cubin | None) -> Cubin:
        path = self._folder / f"{name}.cubin"
        return brought if brought is not None and not cache.whole(path) else _read(cache.obtain(path, build))

    def _cached(self, stem: str, newest: int | None, reason: str, brought: Cubin | None) -> Cubin:
        """What any version of TVM and of a compiler built, or a file brought: this process cannot build."""
        for path in sorted(self._folder.glob(f"{stem}-*.cubin"), reverse=True):
            if cache.whole(path):
                built = _read(path)
                if newest is None or built.cuda <= newest:
                    return built
        if brought is not None:
            return brought
        _, arch, name, _ = stem.split("-")
        raise KernelsUnavailable(
            f"kernel {name} for {arch} is not in {self._folder}, and {reason}; or load a file that carries it"
        )


def _read(path: Path) -> Cubin:
    try:
        return Cubin.from_bytes(path.read_bytes())
    except (OSError, ValueError) as error:
        raise KernelsUnavailable(f"cannot read {path} ({error}); delete the file to build it anew") from error
