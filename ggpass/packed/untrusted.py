"""Files from strangers: whatever goes wrong in one is an error of ours, and its JSON is bounded and strict.

Bounded in size and depth, without duplicate keys and without numbers beyond JSON's own.
"""

import contextlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ggpass.errors import FormatError, GgpassError

#: Deeper than any header or manifest; Python's parser recurses, so the depth is counted before it starts.
MAX_DEPTH = 8

#: The most bytes that a header may have, by the format's own limit; other JSON files get no more.
MAX_BYTES = 100_000_000

# A string that is not closed runs to the end, so that no input makes the expression go back.
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise FormatError(f"{twice!r:.80} appears twice")
    return found


def _no_constant(name: str) -> None:
    raise FormatError(f"{name} is no JSON number")


def depth_of(text: bytes) -> int:
    """Return how deep arrays and objects are nested, without recursion."""
    depth = deepest = 0
    for bracket in _STRING.sub(b"", text).translate(None, _NO_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def parse_json(text: str | bytes, what: str) -> Any:
    """Return the value of a JSON text.

    Args:
        text: UTF-8 if bytes.
        what: what the text is, for the message.

    Raises:
        FormatError: not JSON, nested deeper than MAX_DEPTH, a key twice, NaN or infinity, half a character.
    """
    try:
        data = text.encode("utf-8") if isinstance(text, str) else text
        if depth_of(data) > MAX_DEPTH:
            raise FormatError(f"it is nested deeper than {MAX_DEPTH}")
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        if b"\\u" in data:  # an escape may stand for half a character, which no file or terminal takes
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except (ValueError, RecursionError) as error:  # FormatError is a ValueError, as are JSON's and UTF-8's errors
        raise FormatError(f"{what} is corrupt: {error}; fetch the file again") from error


def open_regular(path: Path) -> int:
    """Return a descriptor to read a file from; links to files are followed.

    Raises:
        FormatError: a directory, a pipe or a device, which could block whoever reads it.
        OSError: no such file, or no right to read it.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise FormatError(f"{path} is no regular file; give a file of tensors, or the directory that holds them")


def read_json(path: Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        FormatError: as `parse_json`, or a file that cannot be read or is larger than MAX_BYTES.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(text) > MAX_BYTES:
        raise FormatError(f"{path} is larger than {MAX_BYTES} bytes, which no such file is; fetch it again")
    return parse_json(text, str(path))


@contextlib.contextmanager
def reading(path: str | Path, name: str = "") -> Iterator[None]:
    """Raise FormatError for whatever goes wrong inside, with the file and the tensor in front of the reason.

    A damaged file can make any library that looks at it raise anything, so no list of exception types is complete.

    Args:
        path: of the file.
        name: of the tensor that is read; '' if it is the file as a whole.
    """
    place = f"{path}, {name}" if name else str(path)
    try:
        yield
    except OSError as error:
        raise FormatError(f"{place} cannot be read: {error.strerror or error}") from error
    except GgpassError as error:
        if not isinstance(error, FormatError) or str(error).startswith(str(path)):
            raise
        raise FormatError(f"{place}: {error}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise FormatError(
            f"{place} is no safetensors file, or is damaged ({reason}); download or save it again"
        ) from error
