"""The GPU kernels that a compiled model carries: into a packed file, and from there into the process that loads it."""

import logging
from pathlib import Path
from typing import Any

from torch import nn

from ggpass.errors import FormatError
from ggpass.graph.report import Report
from ggpass.kernels.cuda import cubin
from ggpass.kernels.cuda.cubin import Cubin
from ggpass.packed.reader import PackedFile
from ggpass.targets.artifact import Artifact

logger = logging.getLogger("ggpass")

#: In front of their names in a file.
PREFIX = "ggpass.kernel/"

#: Where an Artifact and a lowered module hold them.
IN_ARTIFACT, IN_MODULE = "kernels", "ggpass_kernels"


def kernels_of(model: nn.Module | Artifact) -> tuple[Cubin, ...]:
    """Return the kernels that a model carries: those of the target `cuda`."""
    return model.__dict__.get(IN_ARTIFACT if isinstance(model, Artifact) else IN_MODULE, ())


def kernels_to_save(model: nn.Module | Artifact) -> dict[str, bytes]:
    """Return their bytes, by name in the file."""
    return {f"{PREFIX}{kernel.arch}/{kernel.name}": kernel.to_bytes() for kernel in kernels_of(model)}


def read_kernels(path: str | Path) -> tuple[Cubin, ...]:
    """Return the kernels that a file carries.

    Raises:
        FormatError: one is damaged, or is no kernel; the message names it.
    """
    with PackedFile(path) as file:
        found = []
        for name in file.manifest.kernels:
            try:
                found.append(Cubin.from_bytes(file.kernel(name)))
            except FormatError:
                raise
            except Exception as error:  # whatever the parser of a stranger's bytes raises
                raise FormatError(
                    f"{path}: {name} is no kernel that this ggpass knows ({error}); update ggpass"
                ) from error
        return tuple(found)


def take_kernels(found: tuple[Cubin, ...], into: Any, report: Report) -> None:
    """Let the kernels of a file serve this process, and the model carry them on."""
    if not found:
        return
    foreign = cubin.FROM_FILES.add(found)
    report.notes.append(f"carries {len(found)} CUDA kernels for {', '.join(sorted({c.arch for c in found}))}")
    if foreign:
        report.notes.append(
            f"{len(foreign)} of its kernels are of another version of ggpass and are not used: compile and save again"
        )
        logger.warning("%s: %s", report.title, report.notes[-1])
    into.__dict__[IN_ARTIFACT if isinstance(into, Artifact) else IN_MODULE] = found
