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
    "graph": 1,
    "onnxruntime": 1,
    "kernels": 2,
    "packed": 2,
    "lowering": 2,
    "inspection": 3,
    "passes": 3,
    "targets": 4,
    "training": 4,
    "file": 5,
    "onnx": 5,
    "api": 6,
    "cli": 7,
    "integrations": 7,
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
