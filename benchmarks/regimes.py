"""Sweep the number of rows of x over every kernel, to set the switch points in ggpass/kernels/regimes.py.

python benchmarks/regimes.py --format rf8 --threads 1
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from ggpass.formats import FORMATS
from ggpass.kernels.cpu import kernels as cpu
from ggpass.kernels.cpu.library import load
from ggpass.kernels.cpu.memory import aligned_empty
from ggpass.kernels.cpu.regimes import BY_KIND

BLAS = "dequantize + BLAS"


class Only:
    """Regimes of one kernel for every M."""

    def __init__(self, kernel: str) -> None:
        self._kernel = None if kernel == BLAS else kernel

    def kernel(self, m: int) -> str | None:
        return self._kernel


def seconds(run: Callable[[int], object], layers: int, rounds: int) -> float:
    """Median time of one call, over layers that push each other out of the cache."""
    times = []
    for _ in range(rounds):
        for layer in range(layers):
            start = time.perf_counter()
            run(layer)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(
    fmt: Annotated[str, typer.Option("--format")] = "rf8",
    threads: int = 1,
    n: int = 4096,
    k: int = 4096,
    m: Annotated[list[int] | None, typer.Option(help="rows of x; may be repeated")] = None,
    rounds: int = 3,
) -> None:
    """Print ms for each kernel and M; the regimes should choose the least of each column."""
    torch.set_num_threads(threads)
    kernels, format_ = load(), FORMATS[fmt]
    kind = format_.decoder.kind
    weights = [torch.randn(n, k) * 0.02 for _ in range(6)]
    layers = []
    for w in weights:
        codes = aligned_empty((n, k), torch.uint8)
        codes.copy_(format_.encode(w / (w.abs().amax() / format_.amax)))
        layers.append(codes)
    scale, bias = torch.ones(n), torch.zeros(n)
    ms = m or [1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 24, 32, 64, 128, 256, 512]
    names = [name for name in BY_KIND[kind].kernels() if name.startswith(("rows", "tile"))]
    table = Table("kernel", *(f"M={size}" for size in ms), title=f"{fmt}, {n} x {k}, {threads} thread(s): ms")
    chosen, linear = BY_KIND[kind], torch.nn.functional.linear
    for name in ("torch fp32", *names, BLAS, "chosen"):
        cells = []
        for size in ms:
            x = torch.randn(size, k)
            if name == "torch fp32":
                cells.append(f"{seconds(lambda i, x=x: linear(x, weights[i], bias), 6, rounds) * 1e3:.2f}")
                continue
            cpu.BY_KIND[kind] = chosen if name == "chosen" else Only(name)
            try:
                run = lambda i, x=x: kernels.linear(x, layers[i], scale, bias, format_.codebook)  # noqa: E731
                cells.append(f"{seconds(run, 6, rounds) * 1e3:.2f}")
            finally:
                cpu.BY_KIND[kind] = chosen
        table.add_row(name, *cells)
    Console(width=40 + 9 * len(ms)).print(table)


if __name__ == "__main__":
    typer.run(main)
