"""Generated CUDA C -> a library for the CPU, with the emulator in it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from ggpass.kernels.cuda.compiler import Source

_HERE = Path(__file__).parent
_PARTS = ("fibers", "memory", "warp")
_LANGUAGE = ("-std=c++17", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-U_FORTIFY_SOURCE")
#: Each access to memory becomes a call of the emulator's own functions; nothing of a sanitizer's run time is linked.
_ACCESSES = ("-fsanitize=kernel-address", "--param=asan-instrumentation-with-call-threshold=0", "--param=asan-stack=0")
_ARITHMETIC = "-fsanitize=bounds,shift,signed-integer-overflow,integer-divide-by-zero,alignment"


def reason_against() -> str:
    """Why nothing can be emulated here; empty where it can."""
    if shutil.which("g++") is None:
        return "no g++ to compile the emulated kernels with; install it"
    return ""


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    """Of the session: removed when the interpreter ends."""
    return tempfile.TemporaryDirectory(prefix="ggpass-emulator-")


def _compile(*arguments: str) -> None:
    run = subprocess.run(["g++", *_LANGUAGE, *arguments], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"g++ does not take the generated source:\n{run.stderr[:3000]}")


@functools.cache
def _parts(shared: str) -> tuple[str, ...]:
    """The emulator's own files, whose dynamic shared memory has the name that the kernel gives it."""
    objects = []
    for part in _PARTS:
        target = Path(_folder().name) / f"{part}-{shared}.o"
        _compile("-O2", "-Wall", "-Wextra", "-Werror", f"-DSHARED_NAME={shared}", "-c", str(_HERE / f"{part}.cpp"),
                 "-o", str(target))  # fmt: skip
        objects.append(str(target))
    return tuple(objects)


@functools.cache
def library(source: Source) -> ctypes.CDLL:
    """The source, unchanged, compiled for the CPU; once a session."""
    names = set(re.findall(r"extern __shared__ [^;]*?(\w+)\[\];", source.text))
    if len(names) > 1:
        raise RuntimeError(f"{source.entry} declares more than one dynamic shared array: {', '.join(sorted(names))}")
    # The loader takes a second library of the same name for the first.
    digest = hashlib.sha256(source.text.encode()).hexdigest()[:16]
    text = Path(_folder().name) / f"{source.entry}-{digest}.cu"
    text.write_text(source.text, encoding="utf-8")
    target = text.with_suffix(".so")
    _compile("-O1", "-w", "-shared", *_ACCESSES, _ARITHMETIC, "-fno-sanitize-recover=undefined",
             f"-DENTRY={source.entry}", f'-DSOURCE="{text}"', str(_HERE / "kernel.cpp"),
             *_parts(names.pop() if names else "emulated_shared"), "-o", str(target))  # fmt: skip
    return ctypes.CDLL(str(target))
