"""Time ONNX files in ONNX Runtime: RF8 with and without the custom-op library, float32, and MatMulNBits of 8 bits.

    python benchmarks/onnx_runtime.py
    python benchmarks/onnx_runtime.py --threads 1 --rounds 5 --no-transformer

Two models: a chain of 4096×4096 layers, larger than any cache, and a BERT of 12 layers. Rounds are interleaved over the
files; in each, a file runs once after a pause, and then some times back to back, as a decoding loop does. A figure is
the median over rounds of a run's milliseconds, and its ratio that of float32 in the same round.
Then the memory of one process that opens and runs a file. Writes a table, `onnx.json` and `onnx.png` to `out/`.
"""

from __future__ import annotations

import itertools
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime
import typer
from onnx import helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from rich.console import Console
from rich.table import Table

import ggpass
from ggpass.onnxruntime import library_or_reason, session_options

WIDTH = 4096
FLOAT32 = "float32"
LIBRARY, FAST, LOWMEM = "rf8, library", "rf8, fallback fast", "rf8, fallback lowmem"
NBITS = "MatMulNBits 8, level 4"

#: Seconds between runs: the threads of a session spin on for a while, and would take a core from the next.
PAUSE = 0.05

#: Rounds of the slowest variant, after the first.
SLOW_ROUNDS = 1

#: Runs back to back, after the one that follows a pause; the slowest variant, which takes much longer, has one.
REPEATS = 4

console = Console(width=None if Console().is_terminal else 160)


def chain(path: Path, layers: int) -> None:
    """y = W_L · … · W_1 x: square float32 layers, the norm kept near 1."""
    rng = np.random.default_rng(0)
    names = ["x", *(f"h{i}" for i in range(1, layers)), "y"]
    nodes = [
        helper.make_node("MatMul", [a, f"w{i}"], [b], name=f"layer{i}")
        for i, (a, b) in enumerate(itertools.pairwise(names))
    ]
    weights = [
        numpy_helper.from_array(rng.standard_normal((WIDTH, WIDTH), dtype=np.float32) / np.float32(WIDTH**0.5), f"w{i}")
        for i in range(layers)
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "chain", [info("x", 1, ["m", WIDTH])], [info("y", 1, ["m", WIDTH])], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")


def transformer(path: Path) -> None:
    """A BERT encoder of 12 layers and width 768, as torch.onnx writes it."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=1000), add_pooling_layer=False).eval()
    ids = torch.randint(0, 1000, (2, 9))
    auto = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    program = torch.onnx.export(
        model,
        (),
        kwargs=inputs,
        dynamo=True,
        opset_version=21,
        dynamic_shapes=dict.fromkeys(inputs, auto),
        verbose=False,
    )
    assert program is not None
    program.save(str(path), external_data=True)


def nbits(source: Path, path: Path) -> None:
    """The weight-only quantization of ONNX Runtime: blocks of 128 weights, int8 activations (accuracy level 4)."""
    config = DefaultWeightOnlyQuantConfig(block_size=128, is_symmetric=True, accuracy_level=4, bits=8)
    quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=8, block_size=128, algo_config=config)
    quantizer.process()
    onnx.save(quantizer.model.model, path, save_as_external_data=True, location=f"{path.name}.data")


def variants(source: Path) -> dict[str, Path]:
    """The files to compare, made from a float32 one."""
    fast, lowmem, bits = (source.with_name(f"{source.stem}-{kind}.onnx") for kind in ("fast", "lowmem", "nbits"))
    ggpass.lower_onnx(source, fast, external_data=True)
    ggpass.lower_onnx(source, lowmem, external_data=True, fallback="lowmem")
    nbits(source, bits)
    return {FLOAT32: source, LIBRARY: fast, FAST: fast, LOWMEM: lowmem, NBITS: bits}


def open_session(name: str, path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A session of that many threads, with the custom-op library where `name` asks for it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if name == LIBRARY:
        options = session_options(options)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feed_of(session: onnxruntime.InferenceSession, m: int) -> dict[str, Any]:
    """M rows of activations, or M tokens."""
    rng = np.random.default_rng(1)
    feed: dict[str, Any] = {}
    for i in session.get_inputs():
        if i.type == "tensor(float)":
            feed[i.name] = rng.standard_normal((m, WIDTH), dtype=np.float32)
        else:
            feed[i.name] = np.ones((1, m), np.int64) if "ids" not in i.name else rng.integers(0, 2, (1, m))
    return feed


def milliseconds(session: onnxruntime.InferenceSession, feed: dict[str, Any]) -> float:
    """Of one run."""
    start = time.perf_counter()
    session.run(None, feed)
    return (time.perf_counter() - start) * 1e3


def timings(files: dict[str, Path], ms: list[int], threads: int, rounds: int, model: str) -> list[dict[str, Any]]:
    """Rows of {model, threads, m, variant, ms, ratio} back to back, and {after_pause_ms, after_pause_ratio}."""
    sessions = {name: open_session(name, path, threads) for name, path in files.items()}
    rows = []
    for m in ms:
        times: dict[str, list[float]] = {name: [] for name in sessions}
        after_pause: dict[str, list[float]] = {name: [] for name in sessions}
        feeds = {name: feed_of(session, m) for name, session in sessions.items()}
        for turn in range(rounds + 1):
            for name, session in sessions.items():
                if name == LOWMEM and turn > SLOW_ROUNDS:
                    continue
                taken = [milliseconds(session, feeds[name]) for _ in range(2 if name == LOWMEM else 1 + REPEATS)]
                if turn:  # the first round pages the weights in
                    after_pause[name].append(taken[0])
                    times[name].append(statistics.median(taken[1:]))
                time.sleep(PAUSE)
        for name in sessions:
            row: dict[str, Any] = {"model": model, "threads": threads, "m": m, "variant": name}
            for prefix, kind in (("", times), ("after_pause_", after_pause)):
                row[f"{prefix}ms"] = statistics.median(kind[name])
                row[f"{prefix}ratio"] = statistics.median(a / b for a, b in zip(kind[FLOAT32], kind[name]))
            rows.append(row)
    return rows


MEMORY = """
import re, sys
from pathlib import Path
import numpy as np, onnxruntime
from ggpass.onnxruntime import session_options

def megabytes(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

path, library, empty = sys.argv[1], sys.argv[2] == "library", sys.argv[3]
options = session_options() if library else onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
onnxruntime.InferenceSession(empty, options, providers=["CPUExecutionProvider"])
before, peak_before = megabytes("RssAnon"), megabytes("VmHWM")
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
feed = np.ones((1, session.get_inputs()[0].shape[1]), np.float32)
for _ in range(3):
    session.run(None, {"x": feed})
print(megabytes("RssAnon") - before, megabytes("VmHWM") - peak_before)
"""


def memory(files: dict[str, Path], folder: Path) -> list[dict[str, Any]]:
    """Rows of {variant, anonymous_mb, peak_mb}, beyond a session of an empty model; each in a fresh process."""
    empty = folder / "empty.onnx"
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "empty", [info("x", 1, ["m", 1])], [info("y", 1, ["m", 1])]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), empty)
    rows = []
    for name, path in files.items():
        how = "library" if name == LIBRARY else "stock"
        run = subprocess.run(
            [sys.executable, "-c", MEMORY, str(path), how, str(empty)], capture_output=True, text=True, check=True
        )
        anonymous, peak = map(float, run.stdout.split())
        rows.append({"variant": name, "anonymous_mb": anonymous, "peak_mb": peak})
    return rows


def show(rows: list[dict[str, Any]], files: dict[str, Path], model: str) -> None:
    """One line for each variant, a column for each thread count and M."""
    columns = list(dict.fromkeys((r["threads"], r["m"]) for r in rows))
    title = "ms a run back to back, speed relative to float32 in that round (after a pause)"
    table = Table(title=f"{model}: {title}")
    table.add_column("")
    table.add_column("MB", justify="right")
    for threads, m in columns:
        table.add_column(f"{threads} thread{'s' * (threads > 1)}, M = {m}", justify="right")
    for name, path in files.items():
        data = path.with_name(f"{path.name}.data")
        cells = [
            f"{r['ms']:.2f}  {r['ratio']:.2f}× ({r['after_pause_ratio']:.2f})" for r in rows if r["variant"] == name
        ]
        table.add_row(name, f"{data.stat().st_size / 1e6:.0f}", *cells)
    console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of speed relative to float32, one panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(r["model"] for r in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(6.5 * len(models), 4), squeeze=False, layout="constrained")
    for axis, model in zip(axes[0], models):
        mine = [r for r in rows if r["model"] == model]
        groups = list(dict.fromkeys((r["threads"], r["m"]) for r in mine))
        names = [n for n in dict.fromkeys(r["variant"] for r in mine) if n != FLOAT32]
        for i, name in enumerate(names):
            ratios = [r["ratio"] for r in mine if r["variant"] == name]
            axis.bar(
                [g + (i - len(names) / 2) * 0.8 / len(names) for g in range(len(groups))],
                ratios,
                0.75 / len(names),
                align="edge",
                label=name,
            )
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(groups)), [f"{t} thread{'s' * (t > 1)}\nM = {m}" for t, m in groups])
        axis.set_ylabel("speed relative to float32")
        axis.set_title(model)
    axes[0][0].legend()
    figure.savefig(path, dpi=120)


def main(
    threads: Annotated[list[int] | None, typer.Option(help="may be repeated")] = None,
    m: Annotated[list[int] | None, typer.Option(help="rows of x, or tokens; may be repeated")] = None,
    rounds: Annotated[int, typer.Option(help="interleaved rounds")] = 11,
    layers: Annotated[int, typer.Option(help="of the chain; 12 hold 200 MB of codes")] = 12,
    with_transformer: Annotated[bool, typer.Option("--transformer/--no-transformer")] = True,
    with_memory: Annotated[bool, typer.Option("--memory/--no-memory")] = True,
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("out"),
) -> None:
    """Print the tables and write `onnx.json` and `onnx.png`."""
    out.mkdir(exist_ok=True)
    logging.getLogger().setLevel(logging.WARNING)  # onnxruntime.quantization turns everyone's messages on
    reason = library_or_reason()
    rows: list[dict[str, Any]] = []
    memories: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        builders = {f"chain of {layers} layers 4096×4096": lambda path: chain(path, layers)}
        if with_transformer:
            builders["BERT, 12 layers"] = transformer
        for index, (name, build) in enumerate(builders.items()):
            source = Path(folder) / f"model{index}.onnx"
            with console.status(f"building {name}"):
                build(source)
                files = variants(source)
            if isinstance(reason, str):
                console.print(f"no library: {reason}")
                del files[LIBRARY]
            for count in threads or [1, 2]:
                with console.status(f"timing {name} on {count} threads"):
                    rows += timings(files, m or [1, 64], count, rounds, name)
            show([r for r in rows if r["model"] == name], files, name)
            if with_memory and index == 0 and Path("/proc/self/status").exists():
                with console.status("measuring memory"):
                    memories = memory(files, Path(folder))
                table = Table(title=f"{name}: MB beyond an empty session, after three runs of M = 1 on one thread")
                for heading in ("", "anonymous", "peak"):
                    table.add_column(heading, justify="left" if not heading else "right")
                for row in memories:
                    table.add_row(row["variant"], f"{row['anonymous_mb']:.0f}", f"{row['peak_mb']:.0f}")
                console.print(table)
    (out / "onnx.json").write_text(
        json.dumps({"onnxruntime": onnxruntime.__version__, "timings": rows, "memory": memories}, indent=2)
    )
    plot(rows, out / "onnx.png")
    console.print(f"onnxruntime {onnxruntime.__version__}; wrote {out / 'onnx.json'} and {out / 'onnx.png'}")


if __name__ == "__main__":
    typer.run(main)
