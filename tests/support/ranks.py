"""Two ranks of a training, each a process, over gloo on the CPU."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

WORLD = 2

#: Seconds for all ranks of one way; they take 10 when the machine is idle.
PATIENCE = 600

DISTRIBUTED = torch.distributed.is_available() and torch.distributed.is_gloo_available()

Runs = dict[str, Any]


def run_ranks(way: str, folder: Path, script: str) -> list[Runs]:
    """Run two ranks of a worker script, and return the tensors that each of them saved."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    logs = [folder / f"rank-{rank}.log" for rank in range(WORLD)]
    processes = []
    for rank, path in enumerate(logs):
        with path.open("w") as log:
            command = [sys.executable, script, way, str(rank), str(folder)]
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    deadline = time.monotonic() + PATIENCE
    try:
        # When one rank fails, the others would wait for it: stop at the first failure.
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        codes = [p.poll() for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if codes != [0] * WORLD:
        said = "\n".join(f"--- rank {rank}\n{path.read_text()[-3000:]}" for rank, path in enumerate(logs))
        pytest.fail(f"{way}: the ranks ended with {codes} (None: still running after {PATIENCE} s)\n{said}")
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(WORLD)]
