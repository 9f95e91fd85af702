"""The command: check, time, conclude; see `benchmarks/cuda.py`."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from checks import check_linear, check_rows
from peers import CUBLAS, PEERS, Absent, Layer, encoded
from rich.console import Console
from rich.table import Table
from timing import DEVICE, FOOTPRINT, Run, captured, copy_bandwidth, interleaved
from verdicts import Verdict, verdicts

from ggpass.formats import get_format
from ggpass.kernels.cuda.kernels import CudaKernels
from ggpass.targets.cuda_operators import kernels_on

LAYERS = ((4096, 4096), (11008, 4096), (28672, 8192))
ROWS = (1, 16, 64, 512, 4096)
NO_GPU = 77
SCRIPT = Path(__file__).parents[1] / "cuda.py"

console = Console()
app = typer.Typer(add_completion=False)


def machine(kernels: CudaKernels) -> dict[str, Any]:
    """What the figures depend on."""
    versions = {}
    for package in ("torch", "triton", "torchao", "bitsandbytes", "apache-tvm"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "gpu": kernels.device.name, "arch": kernels.device.arch, "cuda": torch.version.cuda, "versions": versions,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def built(weights: list[torch.Tensor], kernels: CudaKernels) -> tuple[dict[str, list[Layer]], dict[str, str]]:
    """Each peer's layers, and why others are absent."""
    layers, absent = {}, {}
    for peer in PEERS:
        try:
            layers[peer.name] = peer.build(weights, kernels)
        except Absent as reason:
            absent[peer.name] = str(reason)
        except Exception as error:  # a peer's own failure is its figure, not the end of the run
            absent[peer.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return layers, absent


def time_layer(
    kernels: CudaKernels, n: int, k: int, ms: list[int], rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Rows of {peer, n, k, m, ms, spread, graph} or {peer, n, k, absent}, and of each variant's own milliseconds."""
    count = max(2, -(-FOOTPRINT // (n * k)))
    weights = [torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) for _ in range(count)]
    layers, absent = built(weights, kernels)
    rows: list[dict[str, Any]] = [{"peer": name, "n": n, "k": k, "absent": why} for name, why in absent.items()]
    codes, scale = encoded(weights[0])
    for m in ms:
        tuned = kernels.tune(m, codes, scale, get_format("rf8").codebook.to(DEVICE), torch.bfloat16)
        rows += [{"variant": name, "n": n, "k": k, "m": m, "ms": found} for name, found in tuned.items()]
        x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
        runs: dict[str, Run] = {}
        graph: dict[str, bool] = {}
        for name, mine in layers.items():
            given = x.half() if name.startswith("bitsandbytes") else x
            try:
                runs[name], graph[name] = captured(lambda mine=mine, given=given: [layer(given) for layer in mine])
            except Exception as error:  # as above
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                rows.append({"peer": name, "n": n, "k": k, "m": m, "absent": why})
        for name, (median, half) in interleaved(runs, rounds, seconds).items():
            found = {"ms": median / count, "spread": half / count, "graph": graph[name]}
            rows.append({"peer": name, "n": n, "k": k, "m": m, **found})
        del runs
        torch.cuda.empty_cache()
    return rows


def table_of(rows: list[dict[str, Any]], n: int, k: int, ms: list[int]) -> list[list[str]]:
    """Lines of cells: microseconds ± spread, and how many times as fast as cuBLAS in the same run."""
    here = [row for row in rows if "peer" in row and (row["n"], row["k"]) == (n, k)]
    base = {row["m"]: row["ms"] for row in here if row["peer"] == CUBLAS and "ms" in row}
    lines = [[f"({n}, {k}), µs", *(f"M = {m}" for m in ms)]]
    for name in dict.fromkeys(row["peer"] for row in here):
        cells = []
        for m in ms:
            row = next((r for r in here if r["peer"] == name and r.get("m", m) == m), {"absent": "-"})
            if "absent" in row:
                cells.append(row["absent"][:60])
                continue
            times = f" ({base[m] / row['ms']:.2f}x)" if m in base else ""
            note = "" if row["graph"] else ", no graph"
            cells.append(f"{row['ms'] * 1e3:.1f} ± {row['spread'] * 1e3:.1f}{times}{note}")
        lines.append([name, *cells])
    return lines


def write(folder: Path, result: dict[str, Any], tables: list[list[list[str]]], found: list[Verdict]) -> None:
    """The figures, as JSON and to be read."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cuda.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    where = result["machine"]
    lines = [f"# CUDA kernels on {where['gpu']} ({where['arch']}), {where['time']}", "", f"{where['versions']}", ""]
    lines += [f"Copy bandwidth {result['bandwidth'] / 1e9:.0f} GB/s. Wrong results: {len(result['wrong'])}.", ""]
    for table in tables:
        head, *body = [f"| {' | '.join(cells)} |" for cells in table]
        lines += [head, "|" + "---|" * len(table[0]), *body, ""]
    lines += [f"* {'holds' if v.holds else '**does not hold**'}: {v.line}: {v.figure}" for v in found]
    (folder / "cuda.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def sanitize() -> int:
    """Run the checks, fewer of them, under each of compute-sanitizer's tools that finds faults of a kernel."""
    roots = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [None, *(f"{root}/bin" for root in (*roots, "/usr/local/cuda"))]
    tool = next((found for place in places if (found := shutil.which("compute-sanitizer", path=place))), None)
    if tool is None:
        console.print("compute-sanitizer is not installed; it is part of the CUDA toolkit")
        return NO_GPU
    failed = 0
    for kind in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, str(SCRIPT), "--checks-only", "--few"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        clean = run.returncode == 0
        console.print(f"compute-sanitizer {kind}: {'clean' if clean else 'NOT CLEAN'}")
        if not clean:
            console.print((run.stdout + run.stderr)[-4000:], markup=False)
            failed = 1
    return failed


def check(kernels: CudaKernels, few: bool) -> list[str]:
    """What is wrong with the results, printed."""
    wrong, missing = check_linear(kernels, few)
    wrong += check_rows(kernels)
    for line in dict.fromkeys(missing):
        console.print(f"not built: {line}", markup=False)
    for line in wrong[:20]:
        console.print(f"WRONG {line}", markup=False)
    console.print(f"results against float64: {f'{len(wrong)} wrong' if wrong else 'all within the bound'}")
    return wrong


@app.command()
def main(
    m: Annotated[list[int] | None, typer.Option(help="Rows of x.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 11,
    seconds: Annotated[float, typer.Option(min=0.0, help="Of each peer in a round.")] = 0.1,
    checks_only: Annotated[bool, typer.Option(help="Time nothing.")] = False,
    few: Annotated[bool, typer.Option(help="Check fewer shapes.")] = False,
    sanitizer: Annotated[bool, typer.Option("--sanitize", help="Check under compute-sanitizer instead.")] = False,
    out: Annotated[Path, typer.Option(help="Where figures go.")] = Path("out"),
) -> None:
    """Check, time, conclude."""
    kernels = kernels_on(0)
    if isinstance(kernels, str) or torch.version.cuda is None:
        reason = kernels if isinstance(kernels, str) else f"torch {torch.__version__} is built without CUDA"
        console.print(f"nothing was checked or timed: {reason}", markup=False)
        raise typer.Exit(NO_GPU)
    if sanitizer:
        raise typer.Exit(sanitize())
    torch.manual_seed(0)
    wrong = check(kernels, few)
    if checks_only:
        raise typer.Exit(bool(wrong))
    ms = m or list(ROWS)
    bandwidth = copy_bandwidth(rounds)
    rows: list[dict[str, Any]] = []
    tables = []
    for n, k in LAYERS:
        rows += time_layer(kernels, n, k, ms, rounds, seconds)
        tables.append(table_of(rows, n, k, ms))
        shown = Table(*tables[-1][0])
        for line in tables[-1][1:]:
            shown.add_row(*line)
        console.print(shown)
    found = verdicts(rows, bandwidth)
    for verdict in found:
        console.print(f"{'holds' if verdict.holds else 'DOES NOT HOLD'}  {verdict.line}: {verdict.figure}")
    result = {"machine": machine(kernels), "bandwidth": bandwidth, "wrong": wrong, "rows": rows}
    write(out, result, tables, found)
    raise typer.Exit(bool(wrong) or not all(verdict.holds for verdict in found))
