"""Cubin: one built kernel, as the disk cache, a model's file and the driver take it; and those that files brought."""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from ggpass.kernels import cache
from ggpass.kernels.cuda.archs import Capability, parse, serves

#: What a launch must know of a kernel beside its variant: raised if parameters change their meaning.
INTERFACE = 1


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
        """Return the CUDA release of its compiler: the driver's must not be older."""
        return int((re.findall(r"\d+", self.compiler) or ["0"])[0])

    @property
    def registers(self) -> int | None:
        """Registers a thread uses, as the compiler said."""
        return _number(r"Used (\d+) registers", self.log)

    @property
    def shared(self) -> int:
        """Return bytes of static shared memory, as the compiler said."""
        return _number(r"(\d+) bytes smem", self.log) or 0

    @property
    def spills(self) -> int | None:
        """Return bytes of registers spilled to memory, stores and loads, as the compiler said."""
        found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", self.log)
        return int(found[1]) + int(found[2]) if found else None

    def to_bytes(self) -> bytes:
        """Return a line of JSON and the image: what the disk cache and model files hold."""
        head = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "image"}
        return json.dumps(head, ensure_ascii=True).encode() + b"\n" + self.image

    @classmethod
    def from_bytes(cls, data: bytes) -> Cubin:
        """Return the inverse of `to_bytes`.

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


def described() -> list[Path]:
    """Return the files that describe the kernels in numbers."""
    here = Path(__file__).parent
    return sorted([*here.glob("*geometry.py"), here / "variants.py"])


@functools.cache
def interface() -> str:
    """Return sixteen hex digits that change with what a launch relies on: geometry, blocking, parameters."""
    return cache.key_of(f"cuda interface {INTERFACE}", described())


class FileKernels:
    """The cubins that came with loaded files. Any thread may ask.

    Attributes:
        generation: counts up with every file, so that what was not there before is looked for again.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._cubins: dict[tuple[str, str], Cubin] = {}
        self._lock = threading.Lock()

    def add(self, arrived: Iterable[Cubin]) -> list[str]:
        """Register cubins.

        Returns:
            For each that cannot be used by this version of ggpass its name.
        """
        now, foreign = interface(), []
        with self._lock:
            for cubin in arrived:
                if cubin.interface == now:
                    self._cubins[cubin.name, cubin.arch] = cubin
                else:
                    foreign.append(f"{cubin.name} for {cubin.arch}")
            self.generation += 1
        return foreign

    def find(self, name: str, capability: Capability, newest: int | None = None) -> Cubin | None:
        """Return a variant's cubin that runs on a device of this capability, the one for the newest architecture."""
        with self._lock:
            fitting = [
                cubin
                for (held, arch), cubin in self._cubins.items()
                if held == name and serves(arch, capability) and (newest is None or cubin.cuda <= newest)
            ]
        return max(fitting, key=lambda cubin: parse(cubin.arch), default=None)

    def archs(self) -> list[str]:
        """The architectures that there are cubins for."""
        with self._lock:
            return sorted({arch for _, arch in self._cubins})


#: The kernels of the files that this process loaded.
FROM_FILES = FileKernels()
