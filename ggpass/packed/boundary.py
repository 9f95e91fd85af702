"""reading: the boundary behind which files from strangers are parsed; whatever goes wrong there is an error of ours."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ggpass.errors import FormatError, GgpassError


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
