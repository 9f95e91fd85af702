"""Where the custom-op library for ONNX Runtime lies: for Python, and for the hosts written in other languages.

It is one shared object without dependencies of its own. Hosts in C++, C# and Java register the path that
`python -m ggpass.onnxruntime` prints.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path

from ggpass.errors import GgpassError

#: The oldest ONNX Runtime whose function table the library asks for.
OLDEST_ONNXRUNTIME = "1.21"


def library_path() -> Path:
    """Return the shared object to hand to `SessionOptions.register_custom_ops_library`.

    Raises:
        GgpassError: this installation has none; the message holds the reason and the next action.
    """
    # The file is named like a module, so that wheels and editable installs both lead to it; it cannot be imported.
    spec = find_spec("ggpass._onnxruntime")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin)
    raise GgpassError(
        f"this installation of ggpass has no ONNX Runtime library: {_why_missing()}; install it again with "
        "`pip install --no-cache-dir --force-reinstall --no-deps .` in its source folder, on Linux, where apache-tvm "
        "can be installed"
    )


def _why_missing() -> str:
    """What the build wrote down when it left the library out."""
    try:
        return str(importlib.import_module("ggpass._onnxruntime_missing").REASON)
    except ImportError:
        return "it was put on the path without being built"
