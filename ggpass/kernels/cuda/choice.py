"""Which of several variants that compute the same is taken: the first, until a measurement on this GPU says otherwise.

Measuring is never hidden in a call: `CudaKernels.tune` does it when it is asked to. What it found is kept on disk for
each GPU model and each bucket of shapes, and thrown away when the kernels change.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from filelock import FileLock

from ggpass.kernels import cache
from ggpass.kernels.cuda.cubin import interface
from ggpass.kernels.cuda.driver import Device
from ggpass.kernels.cuda.variants import Variant

logger = logging.getLogger("ggpass")

#: Weights are read from as many copies as fill this: more than any GPU's second-level cache holds twice.
ROTATED_BYTES = 256 << 20


def bucket(decoder: str, dtype: str, m: int, n: int, k: int) -> str:
    """Return the shapes that share a choice: one layer's, with m rounded up to a power of two, from 8 to 65536."""
    rows = min(1 << max(3, (m - 1).bit_length()), 1 << 16)
    return f"{decoder} {dtype} m{rows} n{n} k{k}"


class Choices:
    """The measured choices for one GPU model. Any thread and any process may ask and add."""

    def __init__(self, device: Device, directory: Path | None = None) -> None:
        """Args:
        device: its name is the key.
        directory: where the choices are kept; the kernels' cache directory if None.
        """
        directory = cache.default_directory() if directory is None else directory
        name = re.sub(r"\W+", "-", device.name).strip("-").lower()
        self.path = directory / f"cuda-choice-{name}-{device.arch}-{interface()}.json"
        self._lock = threading.Lock()
        self._chosen: dict[str, str] | None = None

    def pick(self, candidates: Sequence[Variant], decoder: str, dtype: str, m: int, n: int, k: int) -> Variant:
        """Return the measured one of the candidates, else the first."""
        if len(candidates) == 1:
            return candidates[0]
        with self._lock:
            if self._chosen is None:
                self._chosen = self._read()
            name = self._chosen.get(bucket(decoder, dtype, m, n, k))
        return next((variant for variant in candidates if variant.name == name), candidates[0])

    def add(self, chosen: Mapping[str, str]) -> None:
        """Keep measured choices, bucket -> variant; a directory that cannot be written keeps them for this process."""
        with self._lock:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(f"{self.path}.lock"):
                    merged = {**self._read(), **chosen}
                    part = self.path.with_suffix(".part")
                    part.write_text(json.dumps(merged, indent=1, sort_keys=True), encoding="utf-8")
                    part.replace(self.path)
            except OSError as error:
                logger.warning("the choice of kernels cannot be kept in %s (%s): tune again", self.path, error)
                merged = {**(self._chosen or {}), **chosen}
            self._chosen = merged

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            logger.warning("the choice of kernels in %s cannot be read (%s): tune again", self.path, error)
            return {}
        if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
            logger.warning("the choice of kernels in %s is not one: tune again", self.path)
            return {}
        return found


def event_ms(run: Callable[[int], None], rounds: int = 20) -> float:
    """Milliseconds of run(i), by CUDA events: the median of `rounds` after three untimed ones.

    Args:
        run: queues the i-th launch on torch's current stream.
    """
    for i in range(3):
        run(i)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for i in range(rounds):
        run(i)
        marks[i + 1].record()
    marks[-1].synchronize()
    times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    return times[len(times) // 2]
