"""The disk cache of built kernels: one file for each generator, processor and compiler version.

A file is written under a temporary name and moved into place, its checksum beside it, so that nobody ever loads
half a library; a lock makes processes that start together build once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import platformdirs
from filelock import FileLock

from ggpass.errors import KernelsUnavailable

logger = logging.getLogger("ggpass")


def default_directory() -> Path:
    """Return the user's cache directory for built kernels."""
    return Path(platformdirs.user_cache_dir("ggpass")) / "kernels"


def version_of(distribution: str) -> str | None:
    """Return the installed version of a distribution, without importing it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def key_of(kind: str, sources: Iterable[Path]) -> str:
    """Return sixteen hex digits that change with `kind`, with the generator's files and with ggpass."""
    digest = hashlib.sha256(kind.encode())
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    for distribution in ("ggpass", "apache-tvm-ffi"):
        digest.update(f"{distribution}={version_of(distribution)}".encode())
    return digest.hexdigest()[:16]


def obtain(path: Path, build: Callable[[Path], None]) -> Path:
    """Return `path`, whole, built by `build(temporary path)` if it is not there yet or damaged.

    Folders and files are the user's alone, whatever the umask: they hold machine code.

    Raises:
        KernelsUnavailable: its directory cannot be written, or whatever `build` raises.
    """
    if whole(path):
        return path
    try:
        for folder in (*reversed(path.parent.parents), path.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock"), mode=0o600):
            if not whole(path):
                _remove_leftovers(path)
                _publish(build, path)
    except OSError as error:
        raise KernelsUnavailable(
            f"cannot write built kernels to {path.parent} ({error}); make it writable, or free some space"
        ) from error
    return path


def _checksum_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def whole(path: Path) -> bool:
    """Is `path` there and the file that was written? A damaged one is logged; the caller builds it anew."""
    try:
        content, expected = path.read_bytes(), _checksum_path(path).read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        logger.warning("cannot read the built kernels in %s (%s): building them again", path, error)
        return False
    if hashlib.sha256(content).hexdigest() == expected:
        return True
    logger.warning("the built kernels in %s are damaged (wrong checksum): building them again", path)
    return False


def _build_prefix(path: Path) -> str:
    return f".build-{path.name}-"


def _remove_leftovers(path: Path) -> None:
    """Remove what killed builds of this file left, and what those of any file left a day ago; its lock is held."""
    yesterday = time.time() - 86400
    for folder in path.parent.glob(".build-*"):
        # Builds of other files go on meanwhile, and remove theirs.
        with suppress(FileNotFoundError):
            if folder.name.startswith(_build_prefix(path)) or folder.stat().st_mtime < yesterday:
                shutil.rmtree(folder, ignore_errors=True)


def _publish(build: Callable[[Path], None], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_build_prefix(path)) as folder:
        library, checksum = Path(folder) / "kernels.so", Path(folder) / "sha256"
        build(library)
        checksum.write_text(hashlib.sha256(library.read_bytes()).hexdigest() + "\n", encoding="ascii")
        for file in (library, checksum):
            file.chmod(0o600)
        # The old library never meets the new checksum as a pair that passes.
        os.replace(checksum, _checksum_path(path))
        os.replace(library, path)
