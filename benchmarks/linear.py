"""Time one linear layer, y = x Wᵀ, of ggpass and of its peers, with weights that are never in the cache.

    python benchmarks/linear.py --quick
    python benchmarks/linear.py --threads 1 --threads 2 --m 1 --m 8 --m 64 --m 512

Rounds are interleaved over the peers, each in a process of its own; a figure is the median over rounds, beside it the
spread (half the distance of the quartiles). Writes a table, `linear.json` and `linear.png` to `out/`.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import platform
import statistics
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from peers import PEERS, worker
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

#: Weights of all layers together, in bytes of fp32: several times any last-level cache.
FOOTPRINT = 400 << 20

console = Console()
app = typer.Typer(add_completion=False)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = f"{lines[0]} x {len(lines)}" if lines else cpu
    versions = {}
    for package in sorted({package for peer in PEERS for package in peer.packages} | {"apache-tvm", "apache-tvm-ffi"}):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"cpu": cpu, "system": platform.platform(), "python": platform.python_version(), "versions": versions}


def measure(
    shape: tuple[int, int], ms: list[int], threads: int, rounds: int, seconds: float, progress: Progress
) -> list[dict[str, Any]]:
    """Rows of {peer, n, k, m, threads, ms, spread} or {peer, absent}."""
    context = multiprocessing.get_context("spawn")
    layers = max(3, FOOTPRINT // (4 * shape[0] * shape[1]))
    pipes, processes, rows = {}, [], []
    for index, peer in enumerate(PEERS):
        pipe, end = context.Pipe()
        process = context.Process(target=worker, args=(end, index, shape, layers, threads), daemon=True)
        process.start()
        processes.append(process)
        absent = pipe.recv()
        if absent is None:
            pipes[peer.name] = pipe
        else:
            rows.append({"peer": peer.name, "n": shape[0], "k": shape[1], "threads": threads, "absent": absent})
    task = progress.add_task(f"{shape[0]} x {shape[1]}, {threads} thread(s)", total=rounds * len(ms) * len(pipes))
    for m in ms:
        times: dict[str, list[float]] = {name: [] for name in pipes}
        failed: dict[str, str] = {}
        for _ in range(rounds):
            for name, pipe in pipes.items():
                if name not in failed:
                    pipe.send((m, seconds))
                    answer = pipe.recv()
                    if isinstance(answer, str):
                        failed[name] = answer
                    else:
                        times[name].append(statistics.median(answer))
                progress.advance(task)
        base = {"n": shape[0], "k": shape[1], "m": m, "threads": threads}
        for name in pipes:
            if name in failed:
                rows.append({"peer": name, **base, "absent": failed[name]})
                continue
            quartiles = statistics.quantiles(times[name], n=4) if rounds > 1 else [times[name][0]] * 3
            spread = (quartiles[2] - quartiles[0]) / 2
            rows.append({"peer": name, **base, "ms": quartiles[1] * 1e3, "spread": spread * 1e3})
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join(30)
    return rows


def show(rows: list[dict[str, Any]], shape: tuple[int, int], ms: list[int], threads: int) -> None:
    """One table: milliseconds ± spread, and how many times faster than torch fp32 in the same run."""
    here = [row for row in rows if (row["n"], row["k"], row["threads"]) == (*shape, threads)]
    table = Table(title=f"{shape[0]} x {shape[1]}, {threads} thread(s): ms ± spread (x torch fp32)")
    table.add_column("")
    for m in ms:
        table.add_column(f"M = {m}", justify="right")
    torch_ms = {row["m"]: row["ms"] for row in here if row["peer"] == "torch fp32" and "ms" in row}
    for peer in PEERS:
        mine = {row.get("m"): row for row in here if row["peer"] == peer.name}
        if None in mine:
            table.add_row(peer.name, f"absent: {mine[None]['absent']}")
            continue
        cells = []
        for m in ms:
            row = mine[m]
            if "absent" in row:
                cells.append(row["absent"])
            else:
                cells.append(f"{row['ms']:.2f} ± {row['spread']:.2f} ({torch_ms[m] / row['ms']:.2f}x)")
        table.add_row(peer.name, *cells, style="bold" if peer.name.startswith("ggpass") else "")
    console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed against torch fp32 over M, one panel for each shape and number of threads."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        console.print("no plot: matplotlib is not installed (pip install 'ggpass[plot]')")
        return
    panels = sorted({(row["n"], row["k"], row["threads"]) for row in rows})
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), sharey=True, squeeze=False)
    for axis, panel in zip(axes[0], panels):
        here = [row for row in rows if (row["n"], row["k"], row["threads"]) == panel and "ms" in row]
        torch_ms = {row["m"]: row["ms"] for row in here if row["peer"] == "torch fp32"}
        for peer in PEERS:
            points = sorted((row["m"], torch_ms[row["m"]] / row["ms"]) for row in here if row["peer"] == peer.name)
            if points:
                width = 2.5 if peer.name.startswith("ggpass") else 1.2
                axis.plot(*zip(*points), marker="o", linewidth=width, label=peer.name)
        axis.set(xscale="log", yscale="log", xlabel="rows of x", title=f"{panel[0]} x {panel[1]}, {panel[2]} thread(s)")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("times as fast as torch fp32")
    axes[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@app.command()
def main(
    quick: Annotated[bool, typer.Option(help="one shape, three M, few rounds")] = False,
    m: Annotated[list[int] | None, typer.Option(help="rows of x; may be repeated")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="may be repeated")] = None,
    rounds: Annotated[int, typer.Option(help="interleaved rounds")] = 7,
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("out"),
) -> None:
    """Time one linear layer of ggpass and its peers."""
    shapes = [(4096, 4096)] if quick else [(4096, 4096), (11008, 4096)]
    ms = m or ([1, 8, 64] if quick else [1, 2, 4, 8, 16, 64, 256, 512])
    rounds, seconds = (3, 0.1) if quick else (rounds, 0.3)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for count in threads or [1, 2]:
        for shape in shapes:
            with Progress(console=console, transient=True) as progress:
                rows += measure(shape, ms, count, rounds, seconds, progress)
            show(rows, shape, ms, count)
    record = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **machine(), "rows": rows}
    (out / "linear.json").write_text(json.dumps(record, indent=1))
    plot(rows, out / "linear.png")
    console.print(f"written: {out / 'linear.json'}, {out / 'linear.png'}")


if __name__ == "__main__":
    app()
