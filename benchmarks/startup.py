"""How much `import ggpass` adds to `import torch`: interleaved fresh interpreters, medians.

python benchmarks/startup.py [--rounds 9]
"""

import statistics
import subprocess
import sys
import time
from typing import Annotated

import typer


def seconds(statement: str) -> float:
    """Wall time of a fresh interpreter that runs one statement."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main(rounds: Annotated[int, typer.Option(help="Interpreters of each kind.")] = 9) -> None:
    """Print the medians and their difference; the promise is 0.3 s."""
    statements = ("import torch", "import ggpass")
    times: dict[str, list[float]] = {s: [] for s in statements}
    for s in statements:
        seconds(s)  # the first one reads the files from disk
    for _ in range(rounds):
        for s in statements:
            times[s].append(seconds(s))
    medians = [statistics.median(times[s]) for s in statements]
    for s, median in zip(statements, medians):
        print(f"{s:14} {median:.3f} s (from {min(times[s]):.3f} to {max(times[s]):.3f}, {rounds} rounds)")
    print(f"difference     {medians[1] - medians[0]:.3f} s")


if __name__ == "__main__":
    typer.run(main)
