"""Where a model's tensors lie, and what a save may do to files: all or nothing, and nothing of two different saves."""

import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.onnx_files import FLOAT, node, rounded, same, save, weight
from support.onnx_runs import WAYS, onnx, onnxruntime

import ggpass
from ggpass import FormatError, GgpassError, InputError, TargetError
from ggpass.onnx import save as saving
from ggpass.onnx.inspect import measure
from ggpass.packed.staging import Staging

pytest.importorskip("onnx_ir", reason="needs onnx-ir; pip install 'ggpass[onnx]'")
helper, numpy_helper = onnx.helper, onnx.numpy_helper

X = {"x": (FLOAT, ["n", 64])}


def one_matrix(path: Path, w: np.ndarray, **options: Any) -> Path:
    return save(path, [node("MatMul", ["x", "w"], "y")], X, {"w": w}, **options)


def external(w: np.ndarray, location: str, offset: int = 0) -> Any:
    tensor = onnx.TensorProto(data_type=FLOAT, dims=w.shape, name="w", data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", w.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def with_constant(path: Path, tensor: Any) -> Path:
    nodes = [helper.make_node("Constant", [], ["w"], value=tensor), node("MatMul", ["x", "w"], "y")]
    graph = helper.make_graph(
        nodes,
        "constant",
        [helper.make_tensor_value_info("x", FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", FLOAT, ["n", 640])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("external_data", [True, False, None])
@pytest.mark.parametrize("location", ["out.onnx.data", "weights.bin"])
def test_data_of_a_constant_node_is_read_counted_and_never_overwritten(
    location: str, external_data: bool | None, tmp_path: Path
) -> None:
    w = weight(64, 640)
    (tmp_path / location).write_bytes(bytes(64) + w.tobytes())
    path = with_constant(tmp_path / "in.onnx", external(w, location, 64))
    report = ggpass.lower_onnx(path, tmp_path / "out.onnx", external_data=external_data)
    assert [c.name for c in report.changes] == ["w"]
    assert (tmp_path / location).read_bytes() == bytes(64) + w.tobytes()
    files = [p for p in tmp_path.iterdir() if p.name.startswith("out.onnx") and p.name != location]
    written, before = sum(p.stat().st_size for p in files), w.nbytes + 64 + path.stat().st_size
    assert report.notes[-1] == f"out.onnx: {written} bytes, {written / before:.3f} of in.onnx"
    want = one_matrix(tmp_path / "want.onnx", rounded(w, True))
    same(tmp_path / "out.onnx", want, {"x": weight(5, 64)})


@pytest.mark.parametrize("location", ["../x", "a/../../x", "/etc/passwd", "missing.bin"])
def test_data_of_a_constant_node_elsewhere_is_refused(location: str, tmp_path: Path) -> None:
    w = weight(64, 640)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").mkdir()
    (tmp_path / "x").write_bytes(w.tobytes())
    path = with_constant(folder / "in.onnx", external(w, location))
    with pytest.raises(FormatError, match=r"outside its directory; do not trust it|is missing"):
        ggpass.lower_onnx(path, tmp_path / "out.onnx")


def test_sizes_count_the_tensors_of_constant_nodes(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "w"], "h"),
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(weight(300, 2).astype(np.float64))),
        node("ReduceSum", ["c"], "s", keepdims=0),
        node("Cast", ["s"], "t", to=FLOAT),
        node("Add", ["h", "t"], "y"),
    ]
    path = save(tmp_path / "in.onnx", nodes, X, {"w": weight(64, 640)})
    ggpass.lower_onnx(path, tmp_path / "out.onnx")
    measured = measure(tmp_path / "out.onnx")
    # Scales and zeros, and the constant; the bodies hold a few short constants of their own.
    assert 4800 <= measured.other_bytes - 4 * 640 * 2 <= 4800 + 256


def cached(folder: Path, w: np.ndarray, link: Callable[[Path, Path], None]) -> Path:
    """A model as a download cache lays it out: a folder of links to files that lie together elsewhere."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "0a1b" / "onnx"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    one_matrix(blobs / "11", w, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    (blobs / "model.onnx_data").rename(blobs / "22")
    link(blobs / "11", snapshot / "model.onnx")
    link(blobs / "22", snapshot / "model.onnx_data")
    return snapshot / "model.onnx"


LINKS: dict[str, Callable[[Path, Path], None]] = {
    "relative": lambda target, link: link.symlink_to(os.path.relpath(target, link.parent)),
    "absolute": lambda target, link: link.symlink_to(target),
    "hard": lambda target, link: os.link(target, link),
    "data only": lambda target, link: (
        os.link(target, link) if link.suffix == ".onnx" else link.symlink_to(target)  # a link out of the model's folder
    ),
}


@pytest.mark.parametrize("kind", LINKS)
def test_models_in_a_download_cache(kind: str, tmp_path: Path) -> None:
    w = weight(64, 640)
    path = cached(tmp_path, w, LINKS[kind])
    if kind == "data only":
        with pytest.raises(FormatError, match="outside its directory"):
            ggpass.lower_onnx(path, tmp_path / "out.onnx")
        return
    assert ggpass.lower_onnx(path, tmp_path / "out.onnx").bytes_before == w.nbytes
    same(tmp_path / "out.onnx", one_matrix(tmp_path / "want.onnx", rounded(w, True)), {"x": weight(5, 64)})


@pytest.mark.parametrize("external_data", [True, False, None])
@pytest.mark.parametrize("size", [24, 300])
def test_what_torch_writes_with_external_data(size: int, external_data: bool | None, tmp_path: Path) -> None:
    """Nothing of the written model lies in the source's data file: it loads from another folder, the source gone."""
    model = torch.nn.Sequential(torch.nn.Linear(64, size), torch.nn.LayerNorm(size), torch.nn.Linear(size, 64)).eval()
    program = torch.onnx.export(model, (torch.randn(2, 64),), dynamo=True, input_names=["x"], verbose=False)
    assert program is not None
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    program.save(str(source / "model.onnx"), external_data=True)
    ggpass.lower_onnx(source / "model.onnx", target / "model.onnx", external_data=external_data)
    for file in source.iterdir():
        file.unlink()
    assert len(list(target.iterdir())) == (2 if external_data else 1)
    x = torch.randn(2, 64)
    with torch.no_grad():
        want = model(x)
    for way in WAYS:
        (got,) = WAYS[way](target / "model.onnx", {"x": x})
        assert 1e-4 < (got - want).norm() / want.norm() < 0.1


KILLED = """
import os, sys
from pathlib import Path
import ggpass
folder, step = Path(sys.argv[1]), int(sys.argv[2])
seen = 0
def audit(event, arguments):
    global seen
    if event in ("open", "os.rename", "os.link", "os.remove") and str(folder) in str(arguments):
        seen += 1
        if seen == step:
            os._exit(9)
sys.addaudithook(audit)
ggpass.lower_onnx(folder / "b.onnx", folder / "out.onnx", external_data=True)
os._exit(0)
"""


@pytest.mark.parametrize("ends", ["killed", "killed, then saved again"])
def test_a_killed_save_leaves_the_old_model_or_the_new_one(ends: str, tmp_path: Path) -> None:
    """At every call that touches a file of the folder: what runs is one of the two, and the next save cleans up."""
    one, two = weight(64, 640), weight(64, 640)
    results = {}
    x = {"x": torch.randn(3, 64)}
    for name, w in (("a", one), ("b", two)):
        one_matrix(tmp_path / f"{name}.onnx", w)
        ggpass.lower_onnx(tmp_path / f"{name}.onnx", tmp_path / f"{name}_out.onnx", external_data=True)
        results[name] = WAYS["stock"](tmp_path / f"{name}_out.onnx", x)[0]
    others = {p.name for p in tmp_path.iterdir()}
    finished, step, seen = False, 1, set()
    while not finished:
        ggpass.lower_onnx(tmp_path / "a.onnx", tmp_path / "out.onnx", external_data=True)
        assert len([p for p in tmp_path.iterdir() if p.name not in others]) == 2
        run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(step)], capture_output=True, check=False)
        assert run.returncode in (0, 9), run.stderr.decode()
        (got,) = WAYS["stock"](tmp_path / "out.onnx", x)
        matches = [name for name, want in results.items() if torch.equal(got, want)]
        assert matches, f"step {step}: a mixture"
        seen.update(matches)
        if ends != "killed":
            ggpass.lower_onnx(tmp_path / "b.onnx", tmp_path / "out.onnx", external_data=True)
            assert torch.equal(WAYS["stock"](tmp_path / "out.onnx", x)[0], results["b"])
            assert len([p for p in tmp_path.iterdir() if p.name not in others]) == 2
        finished, step = run.returncode == 0, step + (1 if step < 6 else 3)
    assert seen == {"a", "b"}


def test_saving_again_leaves_one_data_file_and_the_files_of_others(tmp_path: Path) -> None:
    path = one_matrix(tmp_path / "in.onnx", weight(64, 640))
    (tmp_path / "out.onnx.0123456.data").write_bytes(b"not ours: seven digits")
    for external_data in (True, True, True, False, True):
        ggpass.lower_onnx(path, tmp_path / "out.onnx", external_data=external_data)
        ours = sorted(p.name for p in tmp_path.iterdir() if p.name not in ("in.onnx", "out.onnx.0123456.data"))
        assert len(ours) == (2 if external_data else 1), ours
        WAYS["stock"](tmp_path / "out.onnx", {"x": torch.randn(1, 64)})


def test_an_unfinished_file_of_a_living_process_stays(tmp_path: Path) -> None:
    path = one_matrix(tmp_path / "in.onnx", weight(64, 640))
    with Staging(tmp_path / "out.onnx") as alive:
        dead = alive.path.with_name(alive.path.name.replace("-", "-0", 1))
        dead.mkdir()
        ggpass.lower_onnx(path, tmp_path / "out.onnx")
        assert alive.path.exists()
        assert not dead.exists()


@pytest.mark.parametrize("external_data", [True, False])
def test_a_full_disk_is_an_error_of_ours_and_leaves_the_old_model(
    external_data: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = one_matrix(tmp_path / "in.onnx", weight(64, 640))
    ggpass.lower_onnx(path, tmp_path / "out.onnx", external_data=external_data)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"could not be written: No space left on device; .* make room"):
        ggpass.lower_onnx(path, tmp_path / "out.onnx", external_data=external_data)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("way", ["stock", "library"])
@pytest.mark.parametrize("how", ["lower", "export"])
def test_a_file_that_does_not_open_is_never_written(
    how: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = one_matrix(tmp_path / "in.onnx", weight(64, 640))

    def refuse(file: Path, library: Path | None) -> Exception | None:
        refused = (library is None) == (way == "stock") and file.name != "in.onnx"
        return RuntimeError("Type Error: of node node_y") if refused else None

    monkeypatch.setattr(saving, "_refusal", refuse)
    if way == "library" and isinstance(ggpass.onnxruntime.library_or_reason(), str):
        pytest.skip("needs the custom-op library")
    model, x, out = torch.nn.Linear(64, 8).eval(), torch.randn(2, 64), tmp_path / "out.onnx"
    write = {"lower": lambda: ggpass.lower_onnx(path, out), "export": lambda: ggpass.export_onnx(model, x, out)}[how]
    with pytest.raises(TargetError, match=r"does not open what was written as out\.onnx.*node_y"):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["in.onnx"]


def test_a_model_with_operators_of_someone_else_is_lowered_with_a_note(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], "h"), helper.make_node("Magic", ["h"], ["y"], domain="some.where")]
    model = onnx.load(save(tmp_path / "in.onnx", nodes, X, {"w": weight(64, 640)}))
    model.opset_import.add(domain="some.where", version=1)
    onnx.save(model, tmp_path / "in.onnx")
    report = ggpass.lower_onnx(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert [c.name for c in report.changes] == ["w"]
    assert "not opened: ONNX Runtime does not open in.onnx either" in report.notes


def test_long_names(tmp_path: Path) -> None:
    path = one_matrix(tmp_path / "in.onnx", weight(64, 640))
    out = tmp_path / ("m" * 250 + ".onnx")
    ggpass.lower_onnx(path, out)
    WAYS["stock"](out, {"x": torch.randn(1, 64)})
    with pytest.raises(InputError, match="could not be written"):
        ggpass.lower_onnx(path, out, external_data=True)  # no room for .data behind it
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.onnx", out.name]


def loop_model() -> Any:
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [node("MatMul", ["h", "w"], "next"), node("Identity", ["go"], "go_on")],
        "body",
        [info("i", 7, []), info("go", 9, []), info("h", FLOAT, None)],
        [info("go_on", 9, []), info("next", FLOAT, None)],
        [numpy_helper.from_array(weight(64, 64), "w")],
    )
    graph = helper.make_graph(
        [node("Loop", ["trips", "", "x"], "y", body=body)],
        "loop",
        [info("x", FLOAT, ["n", 64])],
        [info("y", FLOAT, None)],
        [numpy_helper.from_array(np.array(2), "trips")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def mutate(data: bytes, pick: random.Random) -> bytes:
    """Other bytes, fewer or more, mostly near the front, where the structure is."""
    changed = bytearray(data)
    for _ in range(pick.choice((1, 1, 2, 4))):
        at, how = pick.randrange(min(len(changed), pick.choice((500, len(changed))))), pick.random()
        if how < 0.6:
            changed[at] = pick.randrange(256)
        elif how < 0.8:
            del changed[at : at + pick.randrange(1, 9)]
        else:
            changed[at:at] = pick.randbytes(pick.randrange(1, 5))
    return bytes(changed)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_models_are_lowered_or_refused_in_words_of_ours(seed: int, tmp_path: Path) -> None:
    pick = random.Random(seed)
    old = one_matrix(tmp_path / "old.onnx", weight(64, 64), opset=9, ir_version=3)
    sources = [old.read_bytes(), loop_model().SerializeToString()]
    old.unlink()
    lowered = refused = 0
    for _ in range(150):
        (tmp_path / "in.onnx").write_bytes(mutate(pick.choice(sources), pick))
        fallback = pick.choice(("fast", "lowmem", None))
        try:
            ggpass.lower_onnx(tmp_path / "in.onnx", tmp_path / "out.onnx", fallback=fallback)
            lowered += 1
        except GgpassError:
            refused += 1
        assert {p.name for p in tmp_path.iterdir()} <= {"in.onnx", "out.onnx"}
    assert lowered > 10
    assert refused > 10


def test_onnx_runtime_is_what_opens_files(tmp_path: Path) -> None:
    """The check itself must be able to fail: a file that ONNX Runtime refuses, refused by name."""
    path = save(tmp_path / "in.onnx", [node("MatMul", ["x", "w"], "y")], X, {"w": weight(63, 64)})
    with pytest.raises(Exception, match="MatMul"):
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with pytest.raises(TargetError, match=r"bad\.onnx"):
        saving.open_once(path, "bad.onnx", "fast")
