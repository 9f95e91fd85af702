"""ONNX Runtime with the ggpass operators: a session that runs 8-bit weights, ready to use.

`library_path()`, or `python -m ggpass.onnxruntime`, names the custom-op library for C++, C# and Java.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggpass.errors import GgpassError
from ggpass.onnxruntime.library import library_path

if TYPE_CHECKING:
    import onnxruntime

logger = logging.getLogger("ggpass")


def library_or_reason() -> Path | str:
    """Return the custom-op library, or why there is none and what to do about it."""
    try:
        return library_path()
    except GgpassError as error:
        return str(error)


def session_options(options: onnxruntime.SessionOptions | None = None) -> onnxruntime.SessionOptions:
    """Session options with the custom-op library registered.

    Without a library (a wheel for another platform) files still run by the fallback in them; that is logged.

    Args:
        options: options to add to; new ones if left out.

    Raises:
        GgpassError: onnxruntime is not installed, or refuses the library.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise GgpassError("running an ONNX model needs onnxruntime; pip install 'ggpass[onnx]'") from error
    options = onnxruntime.SessionOptions() if options is None else options
    library = library_or_reason()
    if isinstance(library, str):
        logger.info("ONNX Runtime computes ai.ggpass operators by their fallback bodies: %s", library)
        return options
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # ONNX Runtime raises its own classes, all derived from Exception
        raise GgpassError(
            f"onnxruntime {onnxruntime.__version__} refuses {library.name}: {' '.join(str(error).split())}; install "
            "versions of ggpass and onnxruntime that belong together"
        ) from error
    return options


def session(
    path: str | Path, options: onnxruntime.SessionOptions | None = None, **kwargs: Any
) -> onnxruntime.InferenceSession:
    """An InferenceSession for a file that ggpass wrote (or any other), on the CPU unless `providers` says otherwise.

    Args:
        path: the model.
        options: options to add to.
        kwargs: as InferenceSession takes them.

    Raises:
        GgpassError: onnxruntime is not installed, or refuses the library.
    """
    ready = session_options(options)
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), ready, **{"providers": ["CPUExecutionProvider"], **kwargs})


__all__ = ["library_or_reason", "library_path", "session", "session_options"]
