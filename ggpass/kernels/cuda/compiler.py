"""CUDA C -> cubin, by nvcc or by nvrtc, whichever is there.

Sources include nothing, so nvrtc needs no headers. A cubin holds machine code and no PTX: the driver has nothing to
compile, and must only be of the compiler's CUDA release or newer ("CUDA Compatibility", NVIDIA: within one major
release any driver of that release loads it; 13.x needs R580 or newer, 12.x R525).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggpass.errors import KernelsUnavailable

#: The first driver branch of a CUDA release, for the messages.
DRIVER_BRANCH = {11: "R450", 12: "R525", 13: "R580"}

_NVRTC_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12")


@dataclass(frozen=True)
class Source:
    """A translation unit with one kernel.

    Attributes:
        text: CUDA C without any include, the same for every architecture.
        entry: the kernel's name.
        parameters: their names, in order.
    """

    text: str
    entry: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Compiled:
    """A cubin, and what the compiler said: with `-Xptxas -v` registers, shared memory and spills."""

    cubin: bytes
    log: str


def find(newest: int | None = None) -> Nvcc | Nvrtc:
    """nvcc, or else nvrtc.

    Args:
        newest: the CUDA release of the driver that is to load the result; newer compilers are passed over.

    Raises:
        KernelsUnavailable: there is neither, or only newer ones; names both and what to install.
    """
    seen: list[str] = []
    for compiler in _compilers():
        if newest is None or compiler.major <= newest:
            return compiler
        seen.append(compiler.label)
    if seen:
        raise KernelsUnavailable(
            f"the driver takes cubins of CUDA {newest} and older, and {', '.join(seen)} would make newer ones; update "
            f"the driver, or `pip install nvidia-cuda-nvrtc-cu{newest}`"
        )
    raise KernelsUnavailable(
        "no CUDA compiler: nvcc is neither on PATH nor below CUDA_HOME, CUDA_PATH or /usr/local/cuda, and libnvrtc is "
        "neither beside torch nor in an nvidia package nor known to the linker; `pip install nvidia-cuda-nvrtc`, or "
        "install the CUDA toolkit"
    )


def _compilers() -> Iterator[Nvcc | Nvrtc]:
    for path in _nvcc_paths():
        found = nvcc_at(path)
        if found is not None:
            yield found
    for library in _nvrtc_paths():
        loaded = nvrtc_at(library)
        if loaded is not None:
            yield loaded


def _nvcc_paths() -> list[str]:
    roots = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [shutil.which("nvcc"), *(shutil.which("nvcc", path=f"{r}/bin") for r in (*roots, "/usr/local/cuda"))]
    return list(dict.fromkeys(p for p in places if p))


def _nvrtc_paths() -> list[str]:
    """Files beside torch and in NVIDIA's packages, the newest release first, then what the linker knows."""
    folders: list[Path] = []
    for package, below in (("torch", "lib"), ("nvidia", "")):
        spec = importlib.util.find_spec(package)
        folders += [Path(place) / below for place in (spec.submodule_search_locations or ())] if spec else []
    found = [str(path) for folder in folders for path in folder.glob("**/libnvrtc.so.*")]
    found.sort(key=lambda path: int((re.findall(r"\.so\.(\d+)", path) or ["0"])[-1]), reverse=True)
    roots = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    toolkit = [str(path) for root in (*roots, "/usr/local/cuda") for path in Path(root).glob("lib64/libnvrtc.so.*")]
    return [*found, *toolkit, *_NVRTC_NAMES]


@dataclass(frozen=True)
class Nvcc:
    """The toolkit's compiler.

    Attributes:
        path: of the program.
        version: as "13.0.88".
    """

    path: str
    version: str

    @property
    def label(self) -> str:
        """Name and version, as in "nvcc13.0.88": part of the key of what it built."""
        return f"nvcc{self.version}"

    @property
    def major(self) -> int:
        """Return its CUDA release, which the driver must have too."""
        return int(self.version.partition(".")[0])

    def compile(self, source: str, arch: str, name: str) -> Compiled:
        """Return the cubin of a source without includes.

        Args:
            source: CUDA C.
            arch: as "sm_90" or "sm_90a".
            name: for messages and temporary files.

        Raises:
            KernelsUnavailable: the compiler refused; the message holds its words.
        """
        with tempfile.TemporaryDirectory(prefix="ggpass-nvcc-") as folder:
            text, cubin = Path(folder) / f"{name}.cu", Path(folder) / f"{name}.cubin"
            text.write_text(source, encoding="utf-8")
            command = [self.path, "-cubin", f"-arch={arch}", "-O3", "-Xptxas", "-v", "-o", str(cubin), str(text)]
            try:
                run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            except OSError as error:
                raise KernelsUnavailable(f"{self.path} cannot be run ({error}); mend the CUDA toolkit") from error
            log = (run.stdout + run.stderr).replace(f"{folder}/", "").strip()
            if run.returncode or not cubin.is_file():
                raise _refused(self.label, name, arch, log)
            return Compiled(cubin.read_bytes(), log)


@functools.cache
def nvcc_at(path: str) -> Nvcc | None:
    """Return the nvcc at `path`; None if it does not say its version."""
    try:
        run = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    version = re.search(r"\bV(\d+\.\d+\.\d+)", run.stdout)
    return Nvcc(path, version[1]) if version else None


class Nvrtc:
    """The compiler as a library, with the members of `Nvcc`.

    Attributes:
        path: of the library.
        version: as "13.0".
        major: its CUDA release.
    """

    def __init__(self, library: ctypes.CDLL, path: str) -> None:
        """Wrap a loaded library."""
        self._library, self.path = library, path
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
        self.major, self.version = major.value, f"{major.value}.{minor.value}"

    @property
    def label(self) -> str:
        return f"nvrtc{self.version}"

    def compile(self, source: str, arch: str, name: str) -> Compiled:
        library, program = self._library, ctypes.c_void_p()
        made = library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None)
        self._check(made, "nvrtcCreateProgram")
        try:
            options = [f"--gpu-architecture={arch}".encode(), b"--ptxas-options=-v"]
            result = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
            log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
            if result:
                reason = library.nvrtcGetErrorString(result).decode()
                raise _refused(self.label, name, arch, log or reason)
            return Compiled(self._read(program, "CUBIN"), log)
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        """What nvrtcGet`what`Size and nvrtcGet`what` hold."""
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), f"nvrtcGet{what}Size")
        text = ctypes.create_string_buffer(max(1, size.value))
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, text), f"nvrtcGet{what}")
        return text.raw[: size.value]

    def _check(self, result: int, call: str) -> None:
        if result:
            words: Any = self._library.nvrtcGetErrorString(result)
            raise KernelsUnavailable(f"{call} failed in {self.path}: {words.decode()}; install nvrtc again")


@functools.cache
def nvrtc_at(path: str) -> Nvrtc | None:
    """Return the nvrtc in the library at `path`; None if it cannot be loaded."""
    try:
        # It asks the linker for this library by name when it compiles, and a package's folder is none of the linker's.
        if os.sep in path:
            for builtins in Path(path).parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins))
        return Nvrtc(ctypes.CDLL(path), path)
    except (OSError, AttributeError, KernelsUnavailable):
        return None


def _refused(label: str, name: str, arch: str, log: str) -> KernelsUnavailable:
    unknown = re.search("gpu.architecture", log)
    hint = f"does it know {arch}? sm_100 needs CUDA 12.8 or newer" if unknown else "the source is at fault: report this"
    return KernelsUnavailable(f"{label} cannot compile {name} for {arch} ({hint}):\n{log}")
