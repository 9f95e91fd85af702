"""Imports point one way, chains of them stay short, and heavy packages stay out of `import ggpass`.

Every import counts: at the top of a file, inside a function, under TYPE_CHECKING.
"""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import ggpass

PACKAGE = Path(ggpass.__file__).parent
ROOT = PACKAGE.parent

#: Each room may import from rooms of a lower number, and from itself. errors is everyone's.
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
    "__init__": 7,
    "cli": 8,
    "integrations": 7,
}

#: A reader who follows imports from any file meets the ground after this many files.
LONGEST_CHAIN = 12

MOST_ENTRIES = 18


def module_of(path: Path) -> str:
    parts = ("ggpass", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(module: str) -> set[str]:
    """The files of the package that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ggpass":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in FILES else str(node.module))
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relatively; name the whole path"
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in FILES}
    return found - {module}


IMPORTS = {module: imports_of(module) for module in FILES}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


@pytest.mark.parametrize("module", FILES)
def test_rooms_import_from_rooms_below(module: str) -> None:
    room = room_of(module)
    assert room in LEVELS, f"give {room} a level here"
    for other in map(room_of, IMPORTS[module]):
        assert other == room or LEVELS[other] < LEVELS[room], f"{room} must not import {other}"


def test_no_files_import_each_other_and_chains_are_short() -> None:
    @functools.cache
    def chain(module: str) -> tuple[str, ...]:
        assert module not in open_modules, f"a cycle of imports: {' -> '.join([*open_modules, module])}"
        open_modules.append(module)
        longest: tuple[str, ...] = max((chain(other) for other in sorted(IMPORTS[module])), key=len, default=())
        open_modules.pop()
        return (module, *longest)

    open_modules: list[str] = []
    longest = max(map(chain, FILES), key=len)
    assert len(longest) <= LONGEST_CHAIN, " -> ".join(longest)


def test_a_newcomer_sees_the_architecture_at_once() -> None:
    listed = subprocess.run(["git", "ls-files", "ggpass"], cwd=ROOT, capture_output=True, text=True, check=False)
    entries = {line.split("/")[1] for line in listed.stdout.splitlines()} or {
        path.name for path in PACKAGE.iterdir() if path.suffix != ".so" and path.name != "__pycache__"
    }
    assert len(entries) <= MOST_ENTRIES, sorted(entries)


def test_the_root_links_lead_into_the_package() -> None:
    for name in ("passes", "targets"):
        assert (ROOT / name).resolve() == (PACKAGE / name).resolve()


def test_import_ggpass_loads_nothing_heavy() -> None:
    heavy = [
        "tvm",
        "tvm_ffi",
        "onnx",
        "onnxruntime",
        "triton",
        "transformers",
        "matplotlib",
        "scipy",
        "typer",
        "rich",
        "sympy",
    ]
    heavy += ["accelerate", "lightning", "ggpass.integrations"]
    code = "import sys, torch; before = set(sys.modules); import ggpass; print(*(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "ggpass.api" in loaded
    assert not loaded & set(heavy)


@pytest.mark.parametrize("name", ["file.Grid", "formats.FORMATS", "ggd.GGD", "onnxruntime.session", "passes.GGInit"])
def test_rooms_are_there_after_a_plain_import(name: str) -> None:
    code = f"import ggpass; ggpass.{name}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_room'"):
        _ = ggpass.no_such_room
