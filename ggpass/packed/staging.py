"""Staging: the private directory beside a target in which it is written, and from which it gets its name at the end.

Until a file or directory is whole it lies in `.NAME.TOKEN.ggpass-part`, a directory that only its owner can enter: no
link of anybody else lies in there. The token says what is written into which target, so that an equal run finds what an
interrupted one left and goes on, and runs with other settings never meet. What is only in memory cannot be resumed; its
token is random.
"""

import contextlib
import glob
import hashlib
import json
import os
import secrets
import shutil
import stat
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

from ggpass.errors import FormatError, GgpassError, InputError, WeightError

PART_SUFFIX = ".ggpass-part"


def sync_directory(path: Path) -> None:
    """Make a rename in this directory last through a power cut, if the system can."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def refuse_existing(target: Path, replace: bool = False) -> None:
    """Raise GgpassError if something has this name that is not to be replaced; a link that leads nowhere counts.

    Every command that writes a file asks this.
    """
    if os.path.lexists(target) and not replace:
        raise GgpassError(
            f"{target} exists already; choose another name, remove it first, or pass --force to replace it"
        )


class Staging(contextlib.AbstractContextManager["Staging"]):
    """Owns the temporary directory of one target; use as a context manager, and call `publish` at the end.

    What goes wrong with the disk inside comes out as GgpassError. What a run with a plan has finished then stays for
    the next run; if the source is refused, nothing stays.

    Attributes:
        target: the final name.
        path: the private directory.
        new: in it, what becomes the target.
    """

    def __init__(self, target: Path, plan: str | None = None) -> None:
        """Make the directory, or take over that of an interrupted run.

        Args:
            target: the final name, of a file or a directory.
            plan: the settings of the run: equal ones go on with what is there. None: nothing is ever resumed.

        Raises:
            GgpassError: it cannot be made, or another process is writing this target.
        """
        self.target, self._resumable = target, plan is not None
        # A name may have 255 bytes, and UTF-8 takes up to four for a character.
        self._prefix = f".{target.name[:32]}.{_digest(target.name)}-"
        token = secrets.token_hex(8) if plan is None else _digest(plan)
        self.path = target.with_name(f"{self._prefix}{token}{PART_SUFFIX}")
        self.new = self.path / "new"
        try:
            self._lock = _enter(self.path, target)
            if (self.path / "old").exists() and not target.exists():
                (self.path / "old").rename(target)  # a kill came between the two renames of `publish`
        except OSError as error:
            with contextlib.suppress(OSError):
                self.path.rmdir()  # an empty one is ours, and just made
            raise self._error(error) from error

    def work(self, name: str = "") -> Path:
        """Return a directory for the unfinished parts of the file `name` in the target, made if it is not there."""
        path = self.path / "work" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def publish(self, replace: bool = False) -> None:
        """Give `new` the final name, make that last, and remove what interrupted runs left for the same target.

        Args:
            replace: whether an older file or directory goes; it does in one step, or stays if anything fails.

        Raises:
            GgpassError: the target exists, or the system refuses.
        """
        refuse_existing(self.target, replace)
        for root, _, _ in os.walk(self.new):
            sync_directory(Path(root))
        if self.target.is_dir() and not self.target.is_symlink():
            self.target.rename(self.path / "old")
            try:
                self.new.rename(self.target)
            except OSError:
                (self.path / "old").rename(self.target)
                raise
        else:
            self._name(replace)
        sync_directory(self.target.parent)
        shutil.rmtree(self.path, ignore_errors=True)
        for left in glob.glob(f"{glob.escape(self._prefix)}*{PART_SUFFIX}", root_dir=self.target.parent):
            with contextlib.suppress(GgpassError, OSError):  # one that is at work is locked, and stays
                lock = _enter(self.target.with_name(left), self.target)
                shutil.rmtree(self.target.with_name(left), ignore_errors=True)
                os.close(lock)

    def _name(self, replace: bool) -> None:
        if replace or self.new.is_dir():
            self.new.replace(self.target)
            return
        try:
            os.link(self.new, self.target)  # unlike a rename, this replaces nothing that has come meanwhile
        except FileExistsError:
            refuse_existing(self.target)
        except OSError:  # a file system without such links
            self.new.replace(self.target)

    def _error(self, error: OSError) -> GgpassError:
        rest = "an older file of that name is as it was: make room, or choose another place, and save again"
        if self._resumable:
            rest = (
                f"the source is as it was, and {self.path.name} holds what is finished: make room and run the same "
                "command again to go on"
            )
        return InputError(f"{self.target} could not be written: {error.strerror or error}; {rest}")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self._resumable or isinstance(error, FormatError | WeightError):
            shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self._lock)
        if isinstance(error, OSError):
            raise self._error(error) from error


def _digest(text: str) -> str:
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()[:16]


def _enter(path: Path, target: Path) -> int:
    """Return the lock of a staging directory, which is made if it is not there.

    Raises:
        GgpassError: another process holds it, or something else is in the way.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            path.mkdir(0o700)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise GgpassError(f"{path} is in the way, and no directory of yours; remove it, or choose another target")
        try:
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # its owner has just finished, and removed it
        try:
            flock(lock, LOCK_EX | LOCK_NB)
            if os.path.samestat(os.fstat(lock), (path / "lock").stat()):
                return lock
        except FileNotFoundError:
            pass
        except BlockingIOError as error:
            os.close(lock)
            raise GgpassError(f"another process is writing {target}; wait for it, or choose another name") from error
        os.close(lock)
