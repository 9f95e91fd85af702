"""Data files out of Debian packages: found on this machine, or downloaded once into the user's cache.

Every file has a pinned SHA-256 (the same in Debian 12 and 13), and what is parsed is what was checked. A download is
unpacked beside its place and moved there file by file, so that a broken one leaves nothing behind; a lock makes
processes that start together download once. The cache is `platformdirs.user_cache_dir("ggpass")/data`, which follows
XDG_CACHE_HOME.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

SYSTEM = Path("/")
SECONDS = 900.0  # for one whole download; apt gives up on a silent server long before

console = Console(stderr=True)


class DataError(Exception):
    """Data cannot be had, or is not what it should be; the message says what to do next."""


class DataUnavailable(DataError):
    """The files are neither on this machine nor to be fetched now."""


@dataclass(frozen=True)
class Package:
    """A Debian package, the folder in it that is read, and the SHA-256 of each file that is used."""

    name: str
    version: str
    folder: str
    checksums: Mapping[str, str]

    @property
    def by_hand(self) -> str:
        """How a person brings the files to a machine that cannot fetch them."""
        return (
            f"on a Debian machine run `apt-get download {self.name}` and `dpkg -x {self.name}_*.deb DIR`, "
            "then bring DIR here and pass `--data DIR`"
        )


def cache_folder(package: Package) -> Path:
    """Where a package's files are kept."""
    return Path(platformdirs.user_cache_dir("ggpass")) / "data" / package.name


def read(package: Package, data: Path | str | None = None) -> dict[str, bytes]:
    """The checked bytes of each of the package's files, by name.

    Args:
        data: a folder into which the package was unpacked, or which holds the files themselves; without it the
            installed package is read, else the cache, else the package is downloaded.

    Raises:
        DataUnavailable: the files are not here and cannot be fetched.
        DataError: a file in `data` or in the downloaded package is not the pinned one.
    """
    if data is not None:
        inside = Path(data) / package.folder
        folder = inside if inside.is_dir() else Path(data)
        contents = load(package, folder)
        if contents is None:
            missing = [name for name in package.checksums if not (folder / name).is_file()]
            raise DataUnavailable(f"{folder} lacks {', '.join(missing)} of {package.name}; {package.by_hand}")
        return contents
    for folder in (SYSTEM / package.folder, cache_folder(package)):
        try:
            contents = load(package, folder)
        except DataError as error:
            console.print(f"{error}; looking further", style="yellow", markup=False)
            continue
        if contents is not None:
            return contents
    return fetch(package)


def load(package: Package, folder: Path) -> dict[str, bytes] | None:
    """The checked files in `folder`; None where one of them is not there.

    Raises:
        DataError: a file cannot be read, or has another checksum than the pinned one.
    """
    contents = {}
    for name, expected in package.checksums.items():
        try:
            contents[name] = (folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise DataError(f"cannot read {folder / name} ({error.strerror}); make it readable") from error
        found = hashlib.sha256(contents[name]).hexdigest()
        if found != expected:
            raise DataError(
                f"{folder / name} is damaged or another version: its SHA-256 is {found[:16]}…, "
                f"that of {package.name} {package.version} is {expected[:16]}…; delete or replace the file"
            )
    return contents


def fetch(package: Package) -> dict[str, bytes]:
    """Downloads the package into the cache, unless another process just has.

    Raises:
        DataUnavailable: there is no apt, the download failed, or the cache cannot be written.
        DataError: the package holds other files than the pinned ones.
    """
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise _unavailable(package, f"this machine has no {tool}", package.by_hand)
    folder = cache_folder(package)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            return _fetched_meanwhile(package, folder) or _fetch_into(folder, package)
    except OSError as error:
        reason = f"{folder} cannot be written ({error.strerror or error})"
        raise _unavailable(package, reason, "make it writable, free some space, or set XDG_CACHE_HOME") from error


def _unavailable(package: Package, reason: str, action: str) -> DataUnavailable:
    return DataUnavailable(f"{package.name} is not installed and cannot be fetched: {reason}; {action}")


def _fetched_meanwhile(package: Package, folder: Path) -> dict[str, bytes] | None:
    try:
        return load(package, folder)
    except DataError:
        return None  # `read` has said so; the download replaces the file


def _fetch_into(folder: Path, package: Package) -> dict[str, bytes]:
    # The lock is held: what an earlier process left here when it was killed belongs to nobody.
    for stale in folder.glob(".fetch-*"):
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        archive = _download(package, Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        _run(package, ["dpkg", "-x", str(archive), str(unpacked)], Path(scratch), "the package cannot be unpacked")
        contents = load(package, unpacked / package.folder)
        if contents is None:
            raise DataError(
                f"{archive.name} lacks files of {package.name} {package.version} in {package.folder}; {package.by_hand}"
            )
        for name in contents:
            os.replace(unpacked / package.folder / name, folder / name)
    return contents


def _download(package: Package, scratch: Path) -> Path:
    """The package file, downloaded by apt into `scratch` with a progress bar."""
    command = ["apt-get", "-o", "Acquire::http::Timeout=30", "-o", "Acquire::Retries=2", "download", package.name]
    reason = "apt-get cannot download it"
    listed = _run(package, [*command, "--print-uris"], scratch, reason)
    size = re.search(r"^'\S+' \S+ (\d+)", listed, re.MULTILINE)  # 'address' file size checksum
    total = int(size[1]) if size else None
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"fetching {package.name}", total=total)
        _run(package, command, scratch, reason, lambda: progress.update(task, completed=_size(scratch)))
        progress.update(task, completed=_size(scratch))
    archives = list(scratch.glob("*.deb"))
    if len(archives) != 1:
        raise _unavailable(package, f"apt-get left {len(archives)} packages instead of one", package.by_hand)
    return archives[0]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.deb"))


def _run(
    package: Package, command: list[str], folder: Path, reason: str, watch: Callable[[], None] = lambda: None
) -> str:
    """What `command` printed; `watch` is called while it runs.

    Raises:
        DataUnavailable: it failed or took longer than SECONDS; the message quotes its last words.
    """
    environment = {**os.environ, "LC_ALL": "C"}
    with tempfile.TemporaryFile("w+", dir=folder, encoding="utf-8", errors="replace") as output:
        deadline = time.monotonic() + SECONDS
        with subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        ) as process:
            try:
                while process.poll() is None and time.monotonic() < deadline:
                    watch()
                    time.sleep(0.05)
            finally:
                process.kill()  # no-op for one that has ended
        late = process.returncode < 0 and time.monotonic() >= deadline
        output.seek(0)
        said = output.read()
    if process.returncode == 0:
        return said
    errors = [line for line in said.splitlines() if line.startswith(("E:", "Err:", "dpkg"))] or said.splitlines()
    words = f"no end after {SECONDS:.0f} s" if late else f"it says `{errors[-1]}`" if errors else "it says nothing"
    raise _unavailable(
        package, f"{reason}: {words}", f"run `apt-get update` as root and try again, or {package.by_hand}"
    )
