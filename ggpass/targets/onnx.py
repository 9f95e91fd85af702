"""The target `onnx`: the lowered graph runs in torch, and `ggpass.export_onnx` writes it as a file."""

from dataclasses import dataclass
from importlib.util import find_spec

from ggpass.targets.base import Target

#: What writing needs, and checking what was written.
PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class OnnxTarget(Target):
    """Any format; the Artifact is what the file is checked against."""

    def unavailable(self) -> str | None:
        missing = [name for name in PACKAGES if find_spec(name) is None]
        return f"needs {', '.join(missing)}; pip install 'ggpass[onnx]'" if missing else None
