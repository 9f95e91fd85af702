"""The driver through ctypes against a stub: what it answers, what it refuses, and what a launch hands over."""

import ctypes
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cuda_stub import Stub, stub  # noqa: F401

from ggpass.errors import KernelsUnavailable
from ggpass.kernels.cuda import archs, driver
from ggpass.kernels.cuda.cubin import Cubin
from ggpass.kernels.cuda.driver import DriverError, reason_against
from ggpass.kernels.cuda.launch import KINDS, Kernel, layout_of


@dataclass(frozen=True)
class Launch:
    grid: tuple[int, int, int] = (3, 1, 1)
    block: int = 128
    shared: int = 0


def elf(arch: int, entry: str, abi: int = 8) -> bytes:
    """As much of a cubin as a driver looks at before it reads code: the header, and the entry's name."""
    head = bytearray(64)
    head[:9] = b"\x7fELF\x02\x01\x01\x41" + bytes([abi])
    head[40:48] = (64 + len(entry) + 1).to_bytes(8, "little")
    head[48:52] = (arch << 8 if abi >= 8 else arch).to_bytes(4, "little")
    return bytes(head) + entry.encode() + b"\0"


def cubin(arch: int = 90, parameters: tuple[str, ...] = ("x", "y", "n"), compiler: str = "nvcc13.0.88") -> Cubin:
    abi = 8 if compiler.startswith("nvcc13") else 7
    return Cubin("twice", f"sm_{arch}", "twice", parameters, compiler, "", "", elf(arch, "twice", abi))


def test_devices_are_told_as_they_are(stub: Stub) -> None:  # noqa: F811
    stub.count(2)
    stub.device(1, "NVIDIA L4", 8, 9, 101376)
    first, second = stub.driver().devices()
    assert (first.index, first.arch, second.name, second.capability, second.shared) == (
        0,
        "sm_90",
        "NVIDIA L4",
        (8, 9),
        101376,
    )
    assert stub.driver().version == (13, 0)
    assert reason_against(stub.path) == ""


def test_no_driver_says_so() -> None:
    assert "no NVIDIA driver" in reason_against("libcuda-of-nobody.so.1")
    assert "install it" in reason_against("libcuda-of-nobody.so.1")


def test_a_library_without_the_functions_is_too_old() -> None:
    with pytest.raises(KernelsUnavailable, match=r"too old.*update"):
        driver.open_driver("libc.so.6")


@pytest.mark.parametrize("how", ["init", "count"])
def test_no_gpu_says_so(stub: Stub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:  # noqa: F811
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    stub.init(100) if how == "init" else stub.count(0)
    assert "sees no GPU (CUDA_VISIBLE_DEVICES is '')" in reason_against(stub.path)


def test_a_driver_that_does_not_start_is_named_by_its_own_words(stub: Stub) -> None:  # noqa: F811
    stub.init(803)
    reason = reason_against(stub.path)
    assert "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (words of the stub)" in reason
    assert "reboot, or install it again" in reason


def test_an_old_gpu_is_named(stub: Stub) -> None:  # noqa: F811
    stub.device(0, "Tesla T4", 7, 5)
    assert "need sm_80 or newer, and this is Tesla T4 (sm_75)" in reason_against(stub.path)


def test_one_gpu_that_is_new_enough_will_do(stub: Stub) -> None:  # noqa: F811
    stub.count(2)
    stub.device(0, "Tesla T4", 7, 5)
    assert reason_against(stub.path) == ""


def test_an_old_driver_is_named(stub: Stub) -> None:  # noqa: F811
    stub.version(11, 4)
    assert "supports CUDA 11.4" in reason_against(stub.path)
    assert "R525 or newer" in reason_against(stub.path)


def test_an_unknown_error_still_has_its_number(stub: Stub) -> None:  # noqa: F811
    stub.fail("cuDeviceGetCount", 998)
    with pytest.raises(DriverError, match=r"cuDeviceGetCount failed: CUDA error 998 \(no text\)"):
        stub.driver().count()


PARAMETERS = st.lists(st.sampled_from(sorted(KINDS)), unique=True, min_size=1).map(tuple)


@settings(max_examples=60)
@given(PARAMETERS, st.data())
def test_packed_parameters_lie_as_in_c(parameters: tuple[str, ...], data: st.DataObject) -> None:
    """Against ctypes, which lays a struct out by the platform's C ABI."""
    types = {"P": ctypes.c_uint64, "i": ctypes.c_int32}
    bounds = {"P": (0, 2**64 - 1), "i": (-(2**31), 2**31 - 1)}
    values = {name: data.draw(st.integers(*bounds[KINDS[name]])) for name in parameters}
    fields = [(name, types[KINDS[name]]) for name in parameters]
    expected = type("C", (ctypes.Structure,), {"_fields_": fields})(*values.values())
    layout = layout_of(parameters)
    packed = bytearray(layout.size)
    layout.pack_into(packed, 0, *values.values())
    assert bytes(packed) == bytes(expected)[: layout.size]
    assert layout.size + 8 > ctypes.sizeof(expected)


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(KernelsUnavailable, match="takes phase, which this ggpass does not know"):
        layout_of(("x", "phase"))


def test_a_launch_hands_everything_over(stub: Stub) -> None:  # noqa: F811
    made = stub.driver()
    kernel = Kernel(made, made.device(0), cubin())
    kernel(Launch((3, 2, 1), 128, 4096), 0xABCD, {"x": 0x1234_5678_9ABC, "y": 2**63, "n": -7, "m": 1})
    (launch,) = stub.launches
    assert (launch.name, launch.grid, launch.block, launch.shared) == ("twice", (3, 2, 1), 128, 4096)
    assert (launch.device, launch.stream) == (0, 0xABCD)
    assert launch.values(("x", "y", "n")) == {"x": 0x1234_5678_9ABC, "y": 2**63, "n": -7}
    assert stub.depth == 0


def test_a_launch_enters_its_own_device_and_leaves_it(stub: Stub) -> None:  # noqa: F811
    stub.count(2)
    made = stub.driver()
    kernels = [Kernel(made, device, cubin()) for device in made.devices()]
    with made.entered(made.context(1)):
        for kernel in kernels:
            kernel(Launch(), 0, {"x": 0, "y": 0, "n": 0})
        assert stub.depth == 1
    assert [launch.device for launch in stub.launches] == [0, 1]
    assert stub.depth == 0


def test_much_shared_memory_is_asked_for_once_and_no_more_than_there_is(stub: Stub) -> None:  # noqa: F811
    stub.device(0, "NVIDIA L4", 9, 0, 101376)
    made = stub.driver()
    kernel, much = Kernel(made, made.device(0), cubin()), Launch(shared=100_000)
    with pytest.raises(DriverError, match=r"cuLaunchKernel failed for twice.*100000 bytes shared.*INVALID_VALUE"):
        kernel(much, 0, {"x": 0, "y": 0, "n": 0})
    kernel.prepare(much)
    stub.fail("cuFuncSetAttribute", 1)
    kernel.prepare(much)
    kernel(much, 0, {"x": 0, "y": 0, "n": 0})
    with pytest.raises(KernelsUnavailable, match="takes 101377 bytes of shared memory, and NVIDIA L4 has 101376"):
        kernel.prepare(Launch(shared=101377))


def test_a_cubin_of_a_newer_cuda_names_the_driver(stub: Stub) -> None:  # noqa: F811
    stub.version(12, 4)
    made = stub.driver()
    with pytest.raises(KernelsUnavailable, match=r"built by CUDA 13 and the driver supports 12\.4; update it to R580"):
        Kernel(made, made.device(0), cubin())
    Kernel(made, made.device(0), cubin(compiler="nvcc12.8.93"))


@pytest.mark.parametrize(("built", "device", "runs"), [(80, (8, 6), True), (89, (8, 6), False), (90, (10, 0), False)])
def test_a_cubin_of_another_architecture_is_named(stub: Stub, built, device, runs) -> None:  # noqa: F811
    stub.device(0, "Some GPU", *device)
    made = stub.driver()
    assert archs.serves(f"sm_{built}", device) is runs
    if runs:
        Kernel(made, made.device(0), cubin(built))
        return
    with pytest.raises(KernelsUnavailable, match=f"is for sm_{built} and does not run on Some GPU"):
        Kernel(made, made.device(0), cubin(built))


def test_a_damaged_image_and_a_missing_entry_are_named(stub: Stub) -> None:  # noqa: F811
    made = stub.driver()
    bad = Cubin("twice", "sm_90", "thrice", (), "nvcc13.0.88", "", "", elf(90, "twice"))
    with pytest.raises(KernelsUnavailable, match="CUDA_ERROR_NOT_FOUND"):
        Kernel(made, made.device(0), bad)
    assert stub.depth == 0


def test_threads_launch_their_own_parameters(stub: Stub) -> None:  # noqa: F811
    made = stub.driver()
    kernel = Kernel(made, made.device(0), cubin())

    def work(thread: int) -> None:
        for i in range(200):
            kernel(Launch(), thread, {"x": thread * 1000 + i, "y": thread, "n": i})

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = [(launch.stream, launch.values(("x", "y", "n"))) for launch in stub.launches]
    expected = [(t, {"x": t * 1000 + i, "y": t, "n": i}) for t in range(4) for i in range(200)]
    assert sorted(seen, key=str) == sorted(expected, key=str)


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_80"),
        ((8, 7), "sm_80"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((11, 0), "sm_110"),
        ((12, 1), "sm_121"),
    ],
)
def test_the_architecture_for_a_device(capability: tuple[int, int], arch: str) -> None:
    assert archs.arch_for(capability) == arch
    assert archs.serves(arch, capability)


def test_sm_90a_serves_9_0_alone() -> None:
    assert archs.serves("sm_90a", (9, 0))
    assert not archs.serves("sm_90a", (9, 1))
    assert archs.serves("sm_90", (9, 1))


@pytest.mark.parametrize("arch", ["sm_75", "sm_7", "90", "compute_90", "sm_90 -o /etc/passwd", "", None])
def test_a_bad_architecture_is_named(arch: str) -> None:
    with pytest.raises(KernelsUnavailable, match="sm_80, sm_89, sm_90, sm_100"):
        archs.parse(arch)


def test_the_stub_is_no_part_of_the_machine(tmp_path: Path) -> None:
    """The driver in use is the one that was named: two stubs do not share what they were told."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = Stub(tmp_path / "a"), Stub(tmp_path / "b")
    first.count(0)
    assert second.driver().count() == 1
