"""Threads and processes: a forked child reads and writes files, and no task outlives the call that started it."""

import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ggpass.packed.codec.threads import run_all

#: Uses torch's threads and the codec's on both sides of a fork; an alarm ends a child that hangs.
FORKED = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    import numpy as np
    import torch
    from torch import nn
    from safetensors.torch import save_file
    import ggpass
    from ggpass.file import PackedFile, load, pack, save, unpack
    torch.set_num_threads(2)
    folder = Path(sys.argv[1])

    def model():
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Linear(700, 700) for _ in range(3)])

    def everything(mark):
        compiled = ggpass.compile(model(), target="rf8-reference") if mark == "parent" else low
        save(compiled, folder / f"{mark}.safetensors", threads=2)
        loaded = load(folder / f"{mark}.safetensors", into=model(), target="reference", threads=2)
        # Compared by numpy: torch in a child of a process that used its threads waits for ever.
        assert np.array_equal(loaded[1].lowered.codes.numpy(), compiled[1].lowered.codes.numpy())
        for method in ("lossless", "grid:0.01", "rf8"):
            packed = folder / f"{mark} {method[:4]}.safetensors"
            pack(folder / "plain.safetensors", packed, method, threads=2)
            PackedFile(packed).read_all(threads=2)
            load(packed, into=model(), target="reference", threads=2)
            unpack(packed, folder / f"{mark} {method[:4]} back.safetensors", threads=2)
        return compiled

    save_file(model().state_dict(), folder / "plain.safetensors")
    low = everything("parent")

    def in_child(depth):
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)
            everything(f"child {depth}")
            if depth:
                in_child(depth - 1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0, depth

    in_child(1)
    everything("parent again")
    """
)


def test_children_of_a_process_that_used_files_use_files(tmp_path: Path) -> None:
    """A child, a child of that child, and the parent afterwards: every way in and out, with two threads each."""
    run = subprocess.run([sys.executable, "-c", FORKED, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr


def _raise_value() -> None:
    raise ValueError("damaged")


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("fault", [_raise_value, _interrupt])
@pytest.mark.parametrize("at", [0, 3])
def test_no_task_outlives_the_call(fault: Callable[[], None], at: int) -> None:
    running, lock = [0, 0], threading.Lock()

    def slow() -> None:
        with lock:
            running[0] += 1
        time.sleep(0.05)
        with lock:
            running[1] += 1

    tasks: list[Callable[[], None]] = [slow] * 6
    tasks[at:at] = [fault]
    with pytest.raises((ValueError, KeyboardInterrupt)):
        run_all(tasks, 3)
    assert running[0] == running[1], "a task is still at work"
    before = list(running)
    time.sleep(0.1)
    assert running == before, "a task has started since"


OVERWRITTEN = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    import torch
    from torch import nn
    import ggpass
    from ggpass import FormatError
    from ggpass.file import PackedFile, load
    path = Path(sys.argv[1])
    data = path.read_bytes()
    with PackedFile(path) as file:
        entry = file.files[0].layout.entries["0.weight"]
        at = file.files[0].layout.data_at + (entry.begin if sys.argv[2] == "first" else entry.end - 40)
    damaged = bytearray(data)
    damaged[at + 3] ^= 1
    for _ in range(20):
        path.write_bytes(damaged)
        for read in (lambda: load(path, into=model, target="reference", threads=4),
                     lambda: PackedFile(path).read_all(threads=4)):
            model = nn.Sequential(*[nn.Linear(1500, 1500) for _ in range(2)])
            try:
                read()
            except FormatError:
                path.write_bytes(b"")  # as the message advises: the file is fetched again, in place
            else:
                sys.exit("the damage was not found")
            path.write_bytes(damaged)
    """
)


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_refused_file_can_be_overwritten(tmp_path: Path, place: str) -> None:
    """A thread that still read the mapping would die of SIGBUS, and take the process with it."""
    import torch
    from torch import nn

    import ggpass

    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(1500, 1500) for _ in range(2)])
    path = tmp_path / "m.safetensors"
    ggpass.save(ggpass.compile(net, target="rf8-reference"), path)
    run = subprocess.run(
        [sys.executable, "-c", OVERWRITTEN, str(path), place], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, (run.returncode, run.stderr)
