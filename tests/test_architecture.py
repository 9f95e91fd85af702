"""Imports point one way, heavy packages stay out of `import ggpass`, and files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ggpass

PACKAGE = Path(ggpass.__file__).parent
ROOT = PACKAGE.parent

#: Each room may import from rooms of a lower number, and from its own. errors is everyone's.
LEVELS = {
    "errors": 0,
    "formats": 1,
    "ggd": 1,
    "codec": 1,
    "program": 1,
    "checkpoint": 1,
    "dynamo": 1,
    "ops": 2,
    "weights": 2,
    "pipeline": 2,
    "kernels": 2,
    "initialization": 2,
    "shaping": 2,
    "training": 3,
    "render": 3,
    "lowering": 3,
    "modules": 3,
    "inspection": 3,
    "plot": 4,
    "lower_module": 4,
    "passes": 4,
    "prepared": 5,
    "artifact": 4,
    "onnxruntime": 4,
    "onnx": 5,
    "targets": 5,
    "api": 6,
    "call_time": 6,
    "train_backend": 6,
    "backend": 7,
    "file": 7,
    "cli": 8,
    "integrations": 8,
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path: Path) -> list[str]:
    """The rooms that a file imports at module level; imports inside functions are lazy and may point anywhere."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ggpass."):
            found.append((node.module or "").split(".")[1])
        if isinstance(node, ast.ImportFrom) and node.module == "ggpass":
            found += [alias.name for alias in node.names if alias.name in LEVELS]
        if isinstance(node, ast.Import):
            found += [a.name.split(".")[1] for a in node.names if a.name.startswith("ggpass.")]
    return found


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    assert room in LEVELS, f"give {room} a level here"
    for other in imported_rooms(path):
        assert other == room or LEVELS[other] < LEVELS[room], f"{room} must not import {other}"


def test_the_root_links_lead_into_the_package() -> None:
    for name in ("passes", "targets"):
        assert (ROOT / name).resolve() == (PACKAGE / name).resolve()


def test_import_ggpass_loads_nothing_heavy() -> None:
    heavy = ["tvm", "tvm_ffi", "onnx", "onnxruntime", "triton", "transformers", "matplotlib", "scipy", "typer"]
    heavy += ["accelerate", "lightning", "ggpass.integrations"]
    code = "import sys, torch; before = set(sys.modules); import ggpass; print(*(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "ggpass.api" in loaded
    assert not loaded & set(heavy)
