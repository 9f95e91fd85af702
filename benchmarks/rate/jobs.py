"""Job: one training run as a value; its result is a JSON file named by what was asked, so that a run can resume."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        task: mlp, cnn, byte-lm or minilm-classifier.
        method: adamw, l1, backslash, paper-code, or init.
        setting: the numbers of the method: lr, weight_decay, strength, step, target_bits, init, shape.
        seed: of weights and row order.
        epochs: instead of the task's own.
    """

    task: str
    method: str
    setting: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    epochs: int | None = None

    @property
    def key(self) -> str:
        """A name for its file."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.task}-{self.method}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@cache
def task_of(name: str, epochs: int | None) -> Any:
    """A task, loaded once in each process."""
    from dataclasses import replace

    if name == "byte-lm":
        from training.text_task import text_task

        task = text_task()
    elif name == "minilm-classifier":
        from minilm import model_folder
        from training.gloss_task import gloss_task

        return gloss_task(model_folder(), **({} if epochs is None else {"epochs": epochs}))
    else:
        from training.image_tasks import image_task

        task = image_task(name)
    return task if epochs is None else replace(task, epochs=epochs)


def run(job: Job) -> Result:
    """Train, measure on all grids, and say what was seen; runs in a worker with one thread."""
    import torch

    torch.set_num_threads(1)
    from training.grid_points import grid_points
    from training.loop import train

    from . import methods
    from .plans import PLANS

    task = task_of(job.task, job.epochs)
    recipe, model = methods.prepare(task, job)
    losses: list[float] = []
    every = max(1, task.steps // 100)

    def watch(step: int, loss: Any, status: str) -> None:
        if step % every == 0:
            losses.append(round(float(loss), 5))

    start = time.process_time()
    trained, regularizer = train(task, recipe, job.seed, model=model, watch=watch)
    seconds = time.process_time() - start
    result: Result = {"job": asdict(job), "seconds": round(seconds, 1), "losses": losses}
    if regularizer is not None:
        result["rate"] = {"bits": regularizer.bits(), "strength": regularizer.strength, "status": regularizer.status()}
    points = grid_points(task, trained, _grids(job, task, trained, regularizer), tables=PLANS[job.task].tables)
    result["points"] = [
        [p.step, p.bits, p.held_out.score, p.held_out.nll, p.test.score, p.test.nll, p.spread] for p in points
    ]
    if job.setting.get("keep"):
        from safetensors.torch import save_file

        folder = Path(job.setting["keep"])
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.contiguous().clone() for k, v in trained.state_dict().items()}
        save_file(state, folder / f"{job.task}-{job.method}-{job.seed}.safetensors")
    return result


def _grids(job: Job, task: Any, model: Any, regularizer: Any) -> list[Any]:
    """The grids to measure on: a model that ends on a grid has one of its own, initializers need none."""
    from training.grid_points import STEPS, Grid, own_grids, uniform_grids

    from .plans import PLANS

    if job.method == "init":
        return []
    if "grid" in job.setting or job.method == "controller":
        steps = tuple(regularizer.grid_steps.values())  # in the order of `matrices`: the model's, tied ones once
        return [Grid(job.setting["step"], job.setting.get("spread", 0.0), steps)]
    plan = PLANS[job.task]
    steps = STEPS if plan.steps is None else plan.steps
    return [
        grid
        for spread in plan.spreads
        for grid in (own_grids(task, model, spread, steps) if spread else uniform_grids(model, steps))
    ]


def run_all(jobs: Iterable[Job], folder: Path, workers: int, label: str) -> list[Result]:
    """The results of all jobs, in their order; those that a former run left in `folder` are read."""
    jobs = list(jobs)
    folder.mkdir(parents=True, exist_ok=True)
    missing = _missing(jobs, folder)
    if missing:
        with _progress() as progress, ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            bar = progress.add_task(label, total=len(missing))
            futures = {pool.submit(run, job): job for job in missing}
            for future in as_completed(futures):
                _write(folder / f"{futures[future].key}.json", future.result())
                progress.advance(bar)
    return read_all(jobs, folder)


def restore(kept: Path, folder: Path) -> None:
    """Put the runs that are kept in a file, one a line, into `folder`, where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for line in kept.read_text(encoding="utf-8").splitlines() if kept.exists() else ():
        result = json.loads(line)
        path = folder / f"{Job(**result['job']).key}.json"
        if not path.exists():
            _write(path, result)


def keep(results: Iterable[Result], kept: Path) -> None:
    """Write runs to a file, one a line, in the order of their keys."""
    found = {Job(**result["job"]).key: result for result in results}
    lines = [json.dumps(found[key], separators=(",", ":")) + "\n" for key in sorted(found)]
    beside = kept.with_suffix(".tmp")
    beside.write_text("".join(lines), encoding="utf-8")
    beside.replace(kept)


def read_all(jobs: Iterable[Job], folder: Path) -> list[Result]:
    """The results that are there already, in the order of the jobs."""
    paths = [folder / f"{job.key}.json" for job in jobs]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def _missing(jobs: list[Job], folder: Path) -> list[Job]:
    found = {job.key: job for job in jobs if not (folder / f"{job.key}.json").exists()}
    return list(found.values())


def _write(path: Path, result: Result) -> None:
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(json.dumps(result), encoding="utf-8")
    beside.replace(path)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )
