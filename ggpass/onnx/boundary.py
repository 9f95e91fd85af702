"""The one place where what other libraries raise about a model becomes an error of ours."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from ggpass.errors import FormatError, GgpassError, InputError


@contextmanager
def explained(subject: str, advice: str) -> Iterator[None]:
    """Turn any exception within into an error of ours: `{subject} (the reason); {advice}`.

    protobuf, onnx, onnx_ir, numpy and ONNX Runtime raise whatever a broken model makes of them, so no list of types is
    complete. An error of ours passes, out of any wrapping: `onnx_ir` wraps what a lazy tensor raises.

    Args:
        subject: what happened to which file.
        advice: what the user does next.

    Raises:
        InputError: the system refused a file (a full disk, a permission).
        FormatError: anything else.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, GgpassError | OSError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, GgpassError):
            raise cause from None
        if isinstance(cause, OSError) and cause.errno is not None:
            action = (
                "free some space" if cause.errno in (errno.ENOSPC, errno.EDQUOT) else "check the path and its rights"
            )
            raise InputError(f"{subject} ({cause.strerror or cause}); {action}, and try again") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FormatError(f"{subject} ({type(error).__name__}: {reason[:200]}); {advice}") from error
