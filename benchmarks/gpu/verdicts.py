"""What the figures say about each line that must hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peers import CUBLAS, OURS

#: Bandwidth of a copy, and times cuBLAS bf16 by rows of x: from this many on, at least this much.
BANDWIDTH = 0.85
SPEEDUPS = ((1, 1, 1.7), (16, 16, 1.5), (512, 1 << 30, 0.9))


@dataclass(frozen=True)
class Verdict:
    """One line that must hold, and whether it does."""

    line: str
    figure: str
    holds: bool


def bytes_moved(m: int, n: int, k: int) -> int:
    """Codes, a scale for each row, x and y in 16 bits: what a layer must read and write."""
    return n * k + 4 * n + 2 * m * k + 2 * m * n


def verdicts(rows: list[dict[str, Any]], bandwidth: float) -> list[Verdict]:
    """For each shape and number of rows of x that a line speaks of.

    Args:
        rows: of {peer, n, k, m, ms}.
        bandwidth: of a copy, bytes a second.
    """
    ms = {(row["peer"], row["n"], row["k"], row["m"]): row["ms"] for row in rows if "ms" in row}
    found = []
    for n, k, m in sorted({key[1:] for key in ms}):
        ours, cublas = ms.get((OURS, n, k, m)), ms.get((CUBLAS, n, k, m))
        if ours is None or cublas is None:
            continue
        where = f"M = {m}, ({n}, {k})"
        if m == 1:
            share = bytes_moved(m, n, k) / (ours / 1e3) / bandwidth
            found.append(
                Verdict(f"{where}: at least {BANDWIDTH:.0%} of copy bandwidth", f"{share:.1%}", share >= BANDWIDTH)
            )
        for first, last, least in SPEEDUPS:
            if first <= m <= last:
                found.append(
                    Verdict(f"{where}: at least {least}x cuBLAS", f"{cublas / ours:.2f}x", cublas / ours >= least)
                )
    return found
