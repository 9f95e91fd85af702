"""The kernels' loops run on torch's own OpenMP threads: one pool in the process, as many threads as torch says."""

import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from ggpass.errors import KernelsUnavailable
from ggpass.formats.rf8 import RF8_CODEBOOK
from ggpass.kernels.cpu.library import CpuKernels, load


@pytest.fixture(scope="module")
def kernels() -> CpuKernels:
    try:
        return load()
    except KernelsUnavailable as reason:
        pytest.skip(str(reason))


def run_in_new_process(body: str) -> str:
    script = textwrap.dedent("""
        import os, threading
        import torch
        from ggpass.formats.rf8 import RF8_CODEBOOK
        from ggpass.kernels.cpu.library import load

        def threads():
            return len(os.listdir("/proc/self/task"))

        def call(m=1):
            codes = torch.full((512, 512), 0x7B, dtype=torch.uint8)
            y = kernels.linear(torch.ones(m, 512), codes, torch.ones(1), None, RF8_CODEBOOK)
            assert bool((y == 512).all())

        kernels = load()
    """)
    command = [sys.executable, "-c", script + textwrap.dedent(body)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_one_openmp_runtime_is_mapped_and_its_threads_are_shared(kernels) -> None:
    run_in_new_process("""
        torch.set_num_threads(2)
        torch.ones(2000, 2000).sin()
        before = threads()
        for m in (1, 2, 8, 20, 300):
            call(m)
        assert threads() == before, (before, threads())
        maps = open("/proc/self/maps").read().splitlines()
        runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}
        assert len(runtimes) == 1, runtimes
    """)


def test_one_thread_runs_inline(kernels) -> None:
    run_in_new_process("""
        torch.set_num_threads(1)
        before = threads()
        for m in (1, 2, 8, 20):
            call(m)
        assert threads() == before, (before, threads())
    """)


def test_kernels_take_as_many_threads_as_torch_has(kernels) -> None:
    run_in_new_process("""
        torch.set_num_threads(1)
        call()
        before = threads()
        torch.set_num_threads(3)
        call()
        assert threads() == before + 2, (before, threads())
    """)


def test_a_small_layer_does_not_wake_the_pool_and_the_next_large_one_does(kernels) -> None:
    run_in_new_process("""
        torch.set_num_threads(3)
        before = threads()
        codes = torch.full((64, 64), 0x7B, dtype=torch.uint8)
        kernels.linear(torch.ones(1, 64), codes, torch.ones(1), None, RF8_CODEBOOK)
        assert threads() == before, (before, threads())
        call()
        assert threads() == before + 2, (before, threads())
    """)


def test_a_forked_child_computes_on_its_one_thread(kernels) -> None:
    """Its parent's pool is not in it: waiting for those threads would last for ever, as torch's own operators do."""
    run_in_new_process("""
        import signal
        torch.set_num_threads(2)
        codes = torch.full((512, 512), 0x7B, dtype=torch.uint8)
        inputs = [torch.ones(m, 512) for m in (1, 2, 8, 20)]
        multiply = lambda x: kernels.linear(x, codes, torch.ones(1), None, RF8_CODEBOOK)
        assert bool((multiply(inputs[2]) == 512).all())
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(0 if all(bool((multiply(x) == 512).all()) for x in inputs) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert bool((multiply(inputs[2]) == 512).all())
    """)


def test_calls_from_other_threads_at_once_agree(kernels) -> None:
    torch.manual_seed(0)
    codes = torch.randint(8, 128, (96, 200), dtype=torch.uint8) | 1
    inputs = [torch.randn(m, 200) for m in (1, 2, 4, 8, 17, 1, 2, 17)]
    scale = torch.ones(96)
    expected = [kernels.linear(x, codes, scale, None, RF8_CODEBOOK) for x in inputs]
    results: list[torch.Tensor | None] = [None] * len(inputs)

    def work(i: int) -> None:
        for _ in range(20):
            results[i] = kernels.linear(inputs[i], codes, scale, None, RF8_CODEBOOK)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(a, b) for a, b in zip(results, expected))


def test_the_result_does_not_depend_on_the_number_of_threads(kernels) -> None:
    codes = torch.randint(8, 128, (97, 333), dtype=torch.uint8) | 1
    before = torch.get_num_threads()
    try:
        for m in (1, 3, 8, 30):
            x, results = torch.randn(m, 333), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(kernels.linear(x, codes, torch.ones(1), None, RF8_CODEBOOK))
            assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(before)
