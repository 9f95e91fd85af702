"""JSON from strangers: bounded depth, no duplicate keys, no numbers beyond JSON's own, one error type."""

import json
import re
from typing import Any

from ggpass.errors import FormatError

#: Deeper than any header or manifest; Python's parser recurses, so the depth is counted before it starts.
MAX_DEPTH = 8

# A string that is not closed runs to the end, so that no input makes the expression go back.
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FormatError(f"{twice!r} appears twice")
    return found


def _no_constant(name: str) -> None:
    raise FormatError(f"{name} is no JSON number")


def depth_of(text: bytes) -> int:
    """How deep arrays and objects are nested, without recursion."""
    depth = deepest = 0
    for bracket in _STRING.sub(b"", text).translate(None, _NO_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def parse_json(text: str | bytes, what: str) -> Any:
    """The value of a JSON text.

    Args:
        text: UTF-8 if bytes.
        what: what the text is, for the message.

    Raises:
        FormatError: not JSON, nested deeper than MAX_DEPTH, a key twice, NaN or infinity.
    """
    try:
        data = text.encode("utf-8") if isinstance(text, str) else text
        if depth_of(data) > MAX_DEPTH:
            raise FormatError(f"it is nested deeper than {MAX_DEPTH}")
        return json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # FormatError is a ValueError, as are JSON's and UTF-8's errors
        raise FormatError(f"{what} is corrupt: {error}; fetch the file again") from error
