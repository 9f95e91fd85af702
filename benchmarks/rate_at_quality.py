"""Bits at equal quality: BackSlash against AdamW and proximal L1, each tuned on held-out rows; tables and plots.

    python benchmarks/rate_at_quality.py [--task mlp] [--quick] [--out out/rate]

Every run's result is a file under `--out`; what is there already is not run again, so that it resumes where it stopped.
It begins with the runs behind the published tables, `results/rate/runs.jsonl`; `--fresh` runs all anew.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent / "examples")]

from rate.jobs import read_all, restore, run_all, task_of  # noqa: E402
from rate.plans import PLANS, quick  # noqa: E402
from rate.tables import write  # noqa: E402


def main(
    task: Annotated[list[str] | None, typer.Option(help="Of these tasks alone.")] = None,
    quickly: Annotated[bool, typer.Option("--quick", help="One seed and fewer settings: 15 minutes.")] = False,
    out: Annotated[Path, typer.Option(help="Results, tables and plots.")] = Path("out/rate"),
    workers: Annotated[int, typer.Option(help="Processes of one thread.")] = 2,
    fresh: Annotated[bool, typer.Option("--fresh", help="Leave out the runs that came with the repository.")] = False,
    dry: Annotated[bool, typer.Option("--dry", help="Run nothing: write what the runs that are there tell.")] = False,
) -> None:
    """Run what is missing, resuming where a former run stopped, then write the tables and the plots."""
    if not fresh:
        restore(ROOT / "results" / "rate" / "runs.jsonl", out / "runs")
    for name in task or list(PLANS):
        plan = quick(PLANS[name]) if quickly else PLANS[name]
        runs = {
            part: read_all(jobs, out / "runs") if dry else run_all(jobs, out / "runs", workers, f"{name}: {part}")
            for part, jobs in (("curves", plan.curves()), ("control", plan.control()), ("init", plan.initializers()))
        }
        write(task_of(name, None), plan, runs, out)


if __name__ == "__main__":
    typer.run(main)
