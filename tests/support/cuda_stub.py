"""The stub driver: tests/cuda_stub.c built as a libcuda.so.1, and a handle that tells it what to answer."""

import ctypes
import functools
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ggpass.kernels.cuda.driver import Driver, open_driver
from ggpass.kernels.cuda.launch import KINDS


class _Record(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 128),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("device", ctypes.c_int),
        ("stream", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("parameters", ctypes.c_ubyte * 512),
    )


@dataclass(frozen=True)
class Launched:
    """One launch as the driver saw it."""

    name: str
    grid: tuple[int, ...]
    block: int
    shared: int
    device: int
    stream: int
    parameters: bytes

    def values(self, names: tuple[str, ...]) -> dict[str, int]:
        """The parameters by name, read as the C ABI lays them out: each at a multiple of its own size."""
        found, at = {}, 0
        for name in names:
            size = 8 if KINDS[name] == "P" else 4
            at = -(-at // size) * size
            found[name] = struct.unpack_from("<Q" if size == 8 else "<i", self.parameters, at)[0]
            at += size
        return found


@functools.cache
def _built() -> Path | None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    library = Path(tempfile.mkdtemp(prefix="ggpass-stub-")) / "libcuda.so.1"
    source = Path(__file__).with_name("cuda_stub.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-lpthread"], check=True)
    return library


class Stub:
    """A driver of its own: each copy of the library has its own state."""

    def __init__(self, folder: Path) -> None:
        built = _built()
        if built is None:
            pytest.skip("no C compiler to build the stub driver with")
        self.path = str(shutil.copy(built, folder / "libcuda.so.1"))
        self.library = ctypes.CDLL(self.path)
        self.library.stub_launch.restype = ctypes.POINTER(_Record)

    def version(self, major: int, minor: int) -> None:
        self.library.stub_version(1000 * major + 10 * minor)

    def device(self, index: int, name: str, major: int, minor: int, shared: int = 232448) -> None:
        self.library.stub_device(index, name.encode(), major, minor, shared)

    def count(self, number: int) -> None:
        self.library.stub_count(number)

    def init(self, code: int) -> None:
        self.library.stub_init(code)

    def fail(self, call: str, code: int) -> None:
        self.library.stub_fail(call.encode(), code)

    def capturing(self, yes: bool) -> None:
        self.library.stub_capturing(int(yes))

    def driver(self) -> Driver:
        return open_driver(self.path)

    def on_launch(self, run: Callable[[Launched], None]) -> None:
        """Call `run` inside every launch, in place of a device."""
        self._hook = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Record))(lambda record: run(_read(record[0])))
        self.library.stub_on_launch(self._hook)

    @property
    def modules(self) -> int:
        return self.library.stub_modules()

    @property
    def depth(self) -> int:
        """Contexts that were pushed on this thread and not popped."""
        return self.library.stub_depth()

    @property
    def launches(self) -> list[Launched]:
        return [_read(self.library.stub_launch(i)[0]) for i in range(self.library.stub_launches())]


def _read(record: _Record) -> Launched:
    return Launched(
        record.name.decode(),
        tuple(record.grid),
        record.block,
        record.shared,
        record.device,
        record.stream,
        bytes(record.parameters[: record.size]),
    )


@pytest.fixture
def stub(tmp_path: Path) -> Stub:
    """A stub driver with one GPU of capability 9.0 and CUDA 13.0."""
    return Stub(tmp_path)
