"""The emulator itself: its floats and warp collectives against torch, and each fault that it is there to see."""

import numpy as np
import pytest
import torch
from support import cuda_emulator
from support.cuda_emulator import EmulatorFault

from ggpass.kernels.cuda.variants import Launch

pytest.importorskip("tvm")
pytestmark = pytest.mark.skipif(bool(cuda_emulator.reason_against()), reason=cuda_emulator.reason_against())

PRELUDE = "#define uint unsigned int\n#define uchar unsigned char\n#define ushort unsigned short\n"


def launch(body: str, arguments: dict, outputs: dict, *, block: int = 32, grid: int = 1, shared: int = 1024, **options):
    """Run a kernel with this body; parameters by the arrays' names and types, and 32-bit words of shared memory."""
    from ggpass.kernels.cuda.compiler import Source

    types = {"uint8": "uchar", "uint16": "ushort", "uint32": "uint", "int32": "int", "float32": "float"}
    every = arguments | outputs
    signature = ", ".join(f"{types[a.dtype.name]}* __restrict__ {name}" for name, a in every.items())
    body = f"  extern __shared__ __align__(64) uint words[];\n  int t = (int)threadIdx.x;\n{body}\n"
    entry = f"probe_{abs(hash(body + signature))}"
    text = f'{PRELUDE}extern "C" __global__ void __launch_bounds__({block}) {entry}({signature}) {{\n{body}}}\n'
    source = Source(text, entry, tuple(every))
    cuda_emulator.run(source, Launch((grid, 1, 1), block, shared), arguments, outputs, **options)


def faults(message: str, body: str, **options) -> None:
    y, x = np.zeros(64, np.uint32), np.arange(64, dtype=np.uint32)
    with pytest.raises(EmulatorFault, match=message):
        launch(body, {"x": x}, {"y": y}, block=64, **options)


WRITES_Y = "  y[t] = x[t];"
BARRIER = "  __syncthreads();\n"


def test_a_sound_kernel_runs_in_any_order() -> None:
    body = "  words[t] = x[t];\n  __syncthreads();\n  y[blockIdx.x * 64 + t] = words[63 - t] + blockIdx.x;"
    x, y = np.arange(64, dtype=np.uint32), np.zeros(192, np.uint32)
    for seed in range(4):
        launch(body, {"x": x}, {"y": y}, block=64, grid=3, seed=seed)
        np.testing.assert_array_equal(y.reshape(3, 64), x[::-1] + np.arange(3)[:, None])


@pytest.mark.parametrize(
    ("message", "body"),
    [
        (r"reads 4 bytes outside every buffer, 256 from the beginning of x", "  y[t] = x[t + 1];"),
        (r"reads 4 bytes outside every buffer, -4 from the beginning of x", "  y[t] = x[t - 1];"),
        (r"writes 4 bytes outside every buffer, 256 from .* y", WRITES_Y + "\n  if (t == 63) y[64] = 1;"),
        (r"writes 2 bytes outside every buffer, 256 from .* y", WRITES_Y + "\n  if (t == 1) ((ushort*)y)[128] = 1;"),
        (r"not aligned", "  y[t] = *(uint*)((uchar*)x + t);"),
        (r"not aligned", "  y[t] = (*(uint4*)(x + t % 60)).x;"),
        (r"writes x at byte \d+, which is only to be read", "  x[t] = 1;"),
        (r"writes byte \d+ of y a second time", "  y[t / 2] = x[t];"),
        (r"reads byte \d+ of y, which nobody wrote", "  y[t] = y[t ^ 1];"),
        (r"byte 252 of y was not written, and 4 in all", "  if (t < 63) y[t] = x[t];"),
        (r"at 1024 of shared memory, which has 1024", "  words[t + 193] = x[t];"),
        (r"reads byte \d+ of .*, which nobody wrote", "  words[t] = x[t];\n" + BARRIER + "  y[t] = words[t + 1];"),
        (r"race", "  words[t] = 0;\n  __syncthreads();\n  words[t] = x[t];\n  y[t] = words[t ^ 1];"),
        (r"race: writes byte \d+ of shared memory, which thread", "  words[t / 2] = x[t];"),
        (
            r"race: writes byte \d+ of shared memory, which another thread",
            "  words[t] = x[t];\n  __syncthreads();\n  y[t] = words[(t + 1) % 64];\n  words[t] = 0;",
        ),
        (r"race|nobody", "  words[t] = x[t];\n  __syncwarp();\n  y[t] = words[t ^ 32];"),
        (r"waits at a barrier, and thread \d+ has returned", WRITES_Y + "\n  if (t != 5) __syncthreads();"),
        (r"at different barriers", "  if (t < 32) {\n" + BARRIER + "  y[t] = 1;\n  } else {\n" + BARRIER + "  }"),
        (r"waits in __syncwarp for lanes of its warp that never come", "  if (t != 5) __syncwarp();"),
        (r"an index outside a local array", "  uint a[4] = {};\n  a[x[t] % 5] = 1;\n  y[t] = a[0] + a[x[t] % 3];"),
        (r"a product overflows", "  y[t] = (uint)((int)x[t] * 1000000000);"),
        (r"a shift by more", "  y[t] = 1u << x[t];"),
    ],
)  # fmt: skip
def test_each_fault_is_reported(message: str, body: str) -> None:
    faults(message, body)
    faults(message, body, seed=5)


def test_lanes_of_one_warp_need_only_its_own_barrier() -> None:
    y = np.zeros(64, np.uint32)
    body = "  words[t] = x[t];\n  __syncwarp();\n  y[t] = words[t ^ 31];"
    launch(body, {"x": np.arange(64, dtype=np.uint32)}, {"y": y}, block=64)
    np.testing.assert_array_equal(y, np.arange(64) ^ 31)


COPY = "  ggp_later_copy(&words[4 * t], &x[4 * (t % 16)], 16);\n"


WAIT = "  ggp_later_commit();\n  ggp_later_wait(0);\n"


@pytest.mark.parametrize(
    ("message", "body"),
    [
        ("while thread 0's copy to it is under way", COPY + "  y[t] = words[4 * t];"),
        ("while thread 0's copy to it is under way", COPY + "  ggp_later_wait(0);\n  y[t] = words[4 * t];"),
        ("under way", COPY + "  ggp_later_commit();\n  ggp_later_wait(1);\n  y[t] = words[4 * t];"),
        ("under way", COPY + "  words[4 * t] = 1;"),
        ("under way", COPY + COPY),
        ("returns with copies under way", COPY + "  ggp_later_commit();\n" + WRITES_Y),
        ("returns with copies that are in no group", COPY + WRITES_Y),
        ("race", COPY + WAIT + BARRIER + COPY + WAIT + "  y[t] = words[4 * t ^ 4];"),
        ("no multiple of it", "  ggp_later_copy(&words[4 * t], &x[t + 1], 16);"),
        ("no multiple of it", "  ggp_later_copy(&words[4 * t + 2], x, 16);"),
        ("outside every buffer", "  ggp_later_copy(&words[4 * t], &x[64], 16);"),
        ("outside shared memory", "  ggp_later_copy(y, x, 16);"),
    ],
)
def test_copies_are_made_when_a_wait_demands_them(message: str, body: str) -> None:
    # In the order of their numbers thread 0 is the first to fail.
    x, y = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    with pytest.raises(EmulatorFault, match=message):
        launch(body, {"x": x}, {"y": y}, block=64)


def test_a_wait_leaves_the_last_groups_under_way() -> None:
    body = """  for (int i = 0; i < 3; ++i) {
    ggp_later_copy(&words[4 * i], &x[4 * i], i == 1 ? 0 : 16);
    ggp_later_commit();
  }
  ggp_later_wait(1);
  for (int i = 0; i < 8; ++i) y[i] = words[i];
  ggp_later_wait(0);
  for (int i = 8; i < 12; ++i) y[i] = words[i];"""
    x, y = np.arange(1, 13, dtype=np.uint32), np.zeros(12, np.uint32)
    launch(f"  if (t == 0) {{\n{body}\n  }}", {"x": x}, {"y": y})
    # Without bytes to copy a copy is zeros, as cp.async fills them in.
    np.testing.assert_array_equal(y, [1, 2, 3, 4, 0, 0, 0, 0, 9, 10, 11, 12])


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_floats_are_torchs(kind: str, dtype: torch.dtype) -> None:
    every = np.arange(1 << 16, dtype=np.uint32)
    floats = np.zeros(1 << 16, np.float32)
    body = f"  for (int i = t; i < 65536; i += 32) {{\n    y[i] = ggp_float_{kind}(x[i]);\n  }}"
    launch(body, {"x": every}, {"y": floats})
    expected = torch.from_numpy(every.astype(np.uint16).view(np.int16)).view(dtype).float()
    torch.testing.assert_close(torch.from_numpy(floats), expected, rtol=0, atol=0, equal_nan=True)
    assert np.array_equal(np.signbit(floats), np.signbit(expected.numpy()))

    # Every 16-bit float, each midpoint between neighbours, and what lies beside those.
    finite = expected[torch.isfinite(expected)].unique()
    middle = (finite[1:].double() + finite[:-1].double()).div(2).float()
    beside = [torch.nextafter(middle, torch.tensor(way)) for way in (torch.inf, -torch.inf)]
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-45, -0.0])
    values = torch.cat([finite, middle, *beside, torch.randn(10000) * 1e-6, odd]).numpy()
    bits = np.zeros(len(values), np.uint32)
    body = f"  for (int i = t; i < {len(values)}; i += 32) y[i] = ggp_bits_{kind}(x[i]);"
    launch(body, {"x": values}, {"y": bits})
    rounded = torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(dtype)
    torch.testing.assert_close(rounded, torch.from_numpy(values).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_mma_multiplies_as_the_ptx_isa_lays_it_out() -> None:
    """Fragments packed here by the tables of the ISA's figures: lane 4g + t, registers as (row, first column)."""
    a, b = torch.randint(-8, 9, (16, 16)).half(), torch.randint(-8, 9, (16, 8)).half()
    c = torch.randint(-8, 9, (16, 8)).float()
    x, out = np.zeros((32, 6, 2), np.float16), np.zeros((32, 4), np.float32)
    start = np.zeros((32, 4), np.float32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for register, (row, column) in enumerate([(g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8)]):
            x[lane, register] = a[row, column : column + 2]
        for register, row in enumerate([2 * t, 2 * t + 8]):
            x[lane, 4 + register] = b[row : row + 2, g]
        start[lane] = [c[g, 2 * t], c[g, 2 * t + 1], c[g + 8, 2 * t], c[g + 8, 2 * t + 1]]
    body = """  float sums[4];
  uint ab[6];
  for (int i = 0; i < 4; ++i) sums[i] = start[t * 4 + i];
  for (int i = 0; i < 6; ++i) ab[i] = x[t * 6 + i];
  ggp_warp_mma(sums, ab, ab + 4, ggp_float_f16);
  for (int i = 0; i < 4; ++i) y[t * 4 + i] = sums[i];"""
    launch(body, {"x": x.view(np.uint32), "start": start}, {"y": out})
    expected = a.float() @ b.float() + c
    for lane in range(32):
        g, t = divmod(lane, 4)
        assert out[lane].tolist() == [
            *expected[g, 2 * t : 2 * t + 2].tolist(),
            *expected[g + 8, 2 * t : 2 * t + 2].tolist(),
        ]


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_ldmatrix_hands_out_rows(matrices: int, transposed: int) -> None:
    values = np.arange(matrices * 64, dtype=np.uint16)
    out = np.zeros((32, matrices), np.uint32)
    body = f"""  for (int i = t; i < {matrices * 32}; i += 32) words[i] = x[i];
  __syncthreads();
  uint out[4];
  ggp_warp_ldmatrix(out, &words[(t % {matrices * 8}) * 4], {matrices}, {transposed});
  for (int i = 0; i < {matrices}; ++i) y[t * {matrices} + i] = out[i];"""
    launch(body, {"x": values.view(np.uint32)}, {"y": out})
    for i, matrix in enumerate(values.reshape(matrices, 8, 8)):
        held = matrix.T if transposed else matrix
        pairs = np.ascontiguousarray(held).reshape(32, 2)
        np.testing.assert_array_equal(out[:, i], pairs[:, 0].astype(np.uint32) | pairs[:, 1].astype(np.uint32) << 16)


def test_lanes_exchange_values() -> None:
    y = np.zeros(32, np.uint32)
    launch("  y[t] = ggp_warp_xor(x[t], 5);", {"x": np.arange(32, dtype=np.uint32)}, {"y": y})
    np.testing.assert_array_equal(y, np.arange(32) ^ 5)
