"""CudaKernels: the right kernel with the right parameters, from tensors of any shape, stride, alignment and dtype.

A stub stands in the driver's place, and what it is told to launch is computed in NumPy from the parameters alone.
"""

import dataclasses
import logging
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.closeness import assert_rejects_corruption, dot_bound
from support.cuda_device import Gpu, describe, kernels_of, make_gpu
from support.cuda_stub import Stub, stub  # noqa: F401

from ggpass.errors import KernelsUnavailable
from ggpass.formats import FORMATS, quantize
from ggpass.kernels.cuda import build, choice, cubin, variants
from ggpass.kernels.cuda.build import Builder
from ggpass.kernels.cuda.cubin import FileKernels
from ggpass.kernels.cuda.kernels import NotPrepared, aligned
from ggpass.kernels.cuda.uses import inexact, table_of

BF16, F16 = torch.bfloat16, torch.float16
RF8 = FORMATS["rf8"].codebook


@pytest.fixture
def gpu(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:  # noqa: F811
    monkeypatch.setattr(cubin, "FROM_FILES", FileKernels())
    return make_gpu(stub, tmp_path / "kernels", monkeypatch)


def weight(n: int, k: int, name: str = "rf8", granularity: str = "channel", seed: int = 0) -> tuple:
    from ggpass.formats import Scheme

    values = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    made = quantize(values, FORMATS[name], Scheme(granularity=granularity))
    return made.codes, made.scale, FORMATS[name].codebook


def exact(codes: torch.Tensor, scale: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return codebook.double()[codes.int()] * scale.double()[:, None]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 70),
    st.integers(1, 40),
    st.integers(1, 70),
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from([BF16, F16]),
    st.sampled_from(["channel", "tensor"]),
    st.sampled_from([None, torch.float32, BF16, F16]),
    st.sampled_from(["plain", "sliced", "transposed", "odd"]),
)
def test_linear_hands_over_what_the_reference_computes(
    gpu: Gpu, m: int, n: int, k: int, name: str, dtype: torch.dtype, granularity: str, bias_dtype, layout: str
) -> None:
    codes, scale, codebook = weight(n, k, name, granularity)
    x = torch.randn(m, k).to(dtype)
    match layout:
        case "sliced":
            x = torch.randn(m, 2 * k).to(dtype)[:, ::2]
        case "transposed":
            x = torch.randn(k, m).to(dtype).t()
        case "odd":
            x = torch.randn(m * k + 1).to(dtype)[1:].view(m, k)
    bias = None if bias_dtype is None else torch.randn(n).to(bias_dtype)
    y = gpu.kernels.linear(x, codes, scale, bias, codebook)
    assert (y.dtype, tuple(y.shape), y.is_contiguous()) == (dtype, (m, n), True)
    expected = x.double() @ exact(codes, scale, codebook).T + (0 if bias is None else bias.double())
    bound = dot_bound(x, codebook[codes.int()], scale, bias) + expected.abs() * torch.finfo(dtype).eps
    assert ((y.double() - expected).abs() <= bound + 1e-30).all()
    if m * n > 1 and bias is None:
        assert_rejects_corruption(y.float(), expected, bound)


@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 33, 64, 65, 700])
def test_the_launch_is_the_variants_own(gpu: Gpu, m: int) -> None:
    codes, scale, codebook = weight(48, 32)
    gpu.kernels.linear(torch.ones(m, 32, dtype=BF16), codes, scale, None, codebook)
    variant = variants.linear_variants("rf8", "bfloat16", m, 48, 32)[0]
    launch = variant.launch(m, 48, 32)
    assert (gpu.last.name, gpu.last.grid, gpu.last.block) == (variant.name, launch.grid, launch.block)
    assert (gpu.last.shared, gpu.last.stream) == (launch.shared, 7)
    assert gpu.compiler.built == [(variant.name, "sm_90")]


@pytest.mark.parametrize("m", [0, 3])
@pytest.mark.parametrize("bias", [None, torch.tensor([1.0, 2.0])])
def test_nothing_to_multiply_launches_nothing(gpu: Gpu, m: int, bias) -> None:
    codes, scale = torch.empty(2, 0, dtype=torch.uint8), torch.ones(2)
    y = gpu.kernels.linear(torch.empty(m, 0, dtype=BF16), codes, scale, bias, RF8)
    assert y.tolist() == [[0.0, 0.0] if bias is None else [1.0, 2.0]] * m
    assert y.dtype is BF16
    assert not gpu.stub.launches


def test_codes_that_are_not_aligned_are_copied_and_that_is_said_once(gpu: Gpu, caplog) -> None:
    codes, scale, codebook = weight(4, 33)
    base = torch.cat([torch.zeros(1, dtype=torch.uint8), codes.flatten()])[1:].view(4, 33)
    x = torch.randn(2, 33).to(BF16)
    with caplog.at_level(logging.WARNING, logger="ggpass"):
        results = [gpu.kernels.linear(x, c, scale, None, codebook) for c in (base, base, codes)]
    assert torch.equal(results[0], results[2])
    assert sum("copied at each call" in r.getMessage() for r in caplog.records) == 1


def test_where_no_kernel_fits_it_is_said(gpu: Gpu, monkeypatch) -> None:
    monkeypatch.setattr(variants, "linear_variants", lambda *shape: ())
    codes, scale, codebook = weight(8, 16)
    with pytest.raises(KernelsUnavailable, match=r"no kernel for 2 rows of bfloat16 and 8 × 16 codes fits the 232448"):
        gpu.kernels.linear(torch.ones(2, 16, dtype=BF16), codes, scale, None, codebook)


def test_aligned_copies_only_what_it_must() -> None:
    whole = torch.zeros(64, dtype=BF16)
    assert aligned(whole).data_ptr() == whole.data_ptr()
    assert aligned(whole[8:]).data_ptr() == whole[8:].data_ptr()
    moved = aligned(whole[1:])
    assert moved.data_ptr() % 16 == 0
    assert moved.data_ptr() != whole[1:].data_ptr()


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_embedding_and_dequantize(gpu: Gpu, name: str, dtype: torch.dtype) -> None:
    codes, scale, codebook = weight(9, 21, name)
    values = exact(codes, scale, codebook)
    ids = torch.tensor([0, 8, 3, 3, -1, 9])
    rows = gpu.kernels.embedding(ids.int(), codes, scale, codebook, dtype)
    assert rows[4:].isnan().all()
    eps = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(rows[:4].double(), values[ids[:4]], rtol=eps, atol=1e-7)
    torch.testing.assert_close(
        gpu.kernels.dequantize(codes, scale, codebook, dtype).double(), values, rtol=eps, atol=1e-7
    )
    for empty in (codes[:0], codes[:, :0]):
        part = scale[: empty.shape[0]]
        assert gpu.kernels.dequantize(empty, part, codebook, dtype).shape == empty.shape
    assert gpu.kernels.embedding(ids[:0], codes, scale, codebook, dtype).shape == (0, 21)


def test_every_launch_after_the_first_builds_and_loads_nothing(gpu: Gpu) -> None:
    codes, scale, codebook = weight(8, 16)
    x = torch.ones(2, 16, dtype=BF16)
    gpu.kernels.linear(x, codes, scale, None, codebook)
    gpu.kernels.linear(x[:1], codes, scale, None, codebook)
    assert (len(gpu.compiler.built), gpu.stub.modules) == (1, 1)
    again = gpu.again()
    again.kernels.linear(x, codes, scale, None, codebook)
    assert (len(gpu.compiler.built), gpu.stub.modules) == (1, 2)


def test_a_capture_runs_what_ran_before_and_refuses_what_did_not(gpu: Gpu) -> None:
    codes, scale, codebook = weight(8, 16, "int8")
    x = torch.ones(2, 16, dtype=BF16)
    gpu.kernels.linear(x, codes, scale, None, codebook)
    gpu.stub.capturing(True)
    before = gpu.stub.modules
    y = gpu.kernels.linear(x, codes, scale, None, codebook)
    assert y[0, 0] != 0
    # Scales that were never seen are worked out inside the graph, and not kept: their memory is the graph's.
    other = scale.clone()
    gpu.kernels.linear(x, codes, other, None, codebook)
    assert all(memory.find(other) is None for memory in gpu.kernels._scaled.values())
    with pytest.raises(NotPrepared, match=r"kernel small.* not loaded yet; run the model once"):
        gpu.kernels.linear(torch.ones(40, 16, dtype=BF16), codes, scale, None, codebook)
    with pytest.raises(NotPrepared, match="a codebook that it has not seen"):
        gpu.kernels.linear(x, codes, scale, None, codebook.clone())
    assert gpu.stub.modules == before
    gpu.stub.capturing(False)
    gpu.kernels.linear(torch.ones(40, 16, dtype=BF16), codes, scale, None, codebook)


def test_a_kernel_that_cannot_be_had_is_not_tried_again_until_a_file_brings_one(gpu: Gpu, monkeypatch) -> None:
    codes, scale, codebook = weight(8, 16)
    x = torch.ones(2, 16, dtype=BF16)
    elsewhere = Builder(describe, gpu.directory / "elsewhere")
    built = elsewhere.obtain(variants.linear_variants("rf8", "bfloat16", 2, 8, 16)[0], "sm_90")
    tries = []

    def fail(variant: object) -> None:
        tries.append(variant)
        raise KernelsUnavailable("apache-tvm is not installed")

    gpu.kernels._builder = Builder(fail, gpu.directory)
    for _ in range(3):
        with pytest.raises(KernelsUnavailable, match="not installed"):
            gpu.kernels.linear(x, codes, scale, None, codebook)
    assert len(tries) == 1
    cubin.FROM_FILES.add([built])
    gpu.kernels.linear(x, codes, scale, None, codebook)
    assert gpu.last.name == built.name


def test_threads_that_start_together_load_once(gpu: Gpu) -> None:
    codes, scale, codebook = weight(8, 16)
    results: list[torch.Tensor] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(
                gpu.kernels.linear(torch.ones(2, 16, dtype=BF16), codes, scale, None, codebook)
            )
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(torch.equal(result, results[0]) for result in results)
    assert gpu.stub.modules == 1


def test_load_builds_ahead_and_takes_what_files_carried(gpu: Gpu) -> None:
    wanted = list(variants.every_linear("rf8", "bfloat16", 16))
    first = Builder(describe, gpu.directory / "elsewhere").obtain(wanted[0], "sm_90")
    cubin.FROM_FILES.add([dataclasses.replace(first, log="carried")])
    gpu.compiler.built.clear()
    made = gpu.kernels.load(wanted)
    assert [cubin.name for cubin in made] == [variant.name for variant in wanted]
    assert made[0].log == "carried"
    assert len(gpu.compiler.built) == len(wanted) - 1
    assert gpu.stub.modules == len(wanted)


def test_where_the_first_choice_cannot_be_had_the_next_is_taken(gpu: Gpu, monkeypatch, caplog) -> None:
    @dataclasses.dataclass(frozen=True)
    class Triton:
        name: str = "triton_of_no_version"
        launch = staticmethod(lambda m, n, k: variants.Launch((1, 1, 1), 32, 0))

    version_of = build.cache.version_of
    monkeypatch.setattr(build.cache, "version_of", lambda name: None if name == "triton" else version_of(name))
    second = variants.every_linear("rf8", "bfloat16", 16)[0]
    monkeypatch.setattr(variants, "linear_variants", lambda *shape: (Triton(), second))
    codes, scale, codebook = weight(8, 16)
    gpu.kernels.linear(torch.ones(2, 16, dtype=BF16), codes, scale, None, codebook)
    assert gpu.last.name == second.name
    with caplog.at_level(logging.INFO, logger="ggpass"):
        assert [cubin.name for cubin in gpu.again().kernels.load([Triton(), second])] == [second.name]
    assert "left out: kernel triton_of_no_version for sm_90 is not in" in caplog.text
    monkeypatch.setattr(variants, "linear_variants", lambda *shape: (Triton(),))
    with pytest.raises(KernelsUnavailable, match="triton is not installed"):
        gpu.kernels.linear(torch.ones(40, 16, dtype=BF16), codes, scale, None, codebook)


def test_tuning_takes_the_fastest_from_then_on_and_in_other_processes(gpu: Gpu, monkeypatch) -> None:
    first, second = variants.every_linear("rf8", "bfloat16", 16)[:2]
    monkeypatch.setattr(variants, "linear_variants", lambda *shape: (first, second))
    codes, scale, codebook = weight(8, 16)
    x = torch.ones(2, 16, dtype=BF16)
    gpu.kernels.linear(x, codes, scale, None, codebook)
    assert gpu.last.name == first.name

    def measure(run) -> float:
        pointers = set()
        for i in range(4):
            run(i)
            pointers.add(gpu.last.values(("x", "codes"))["codes"])
        assert len(pointers) == 4, "weights do not rotate"
        return 2.0 if gpu.last.name == first.name else 1.0

    assert gpu.kernels.tune(2, codes, scale, codebook, BF16, measure) == {first.name: 2.0, second.name: 1.0}
    gpu.kernels.linear(x, codes, scale, None, codebook)
    assert gpu.last.name == second.name
    again = gpu.again()
    again.kernels.linear(x, codes, scale, None, codebook)
    assert gpu.last.name == second.name
    gpu.kernels.linear(torch.ones(9, 16, dtype=BF16), codes, scale, None, codebook)
    assert gpu.last.name == first.name, "another bucket of shapes has not been measured"
    again.kernels._choices.path.write_text("[broken")
    kernels_of(gpu.stub, gpu.directory).linear(x, codes, scale, None, codebook)
    assert gpu.last.name == first.name


def test_shapes_share_a_choice_by_powers_of_two() -> None:
    buckets = [choice.bucket("rf8", "bfloat16", m, 8, 8).split()[2] for m in (1, 8, 9, 16, 17, 1000, 10**6)]
    assert buckets == ["m8", "m8", "m16", "m16", "m32", "m1024", "m65536"]


def test_the_decoder_of_each_format() -> None:
    assert table_of(RF8) == ("rf8", 1.0, None)
    decoder, unit, table = table_of(FORMATS["int8"].codebook)
    assert (decoder, unit) == ("table", pytest.approx(1 / 127))
    assert table is not None
    assert table.tolist() == [*range(128), *range(-128, 0)]
    for fmt in FORMATS.values():
        assert table_of(fmt.codebook)[:2] == ("rf8" if fmt.decoder.kind == "rf8" else "table", fmt.decoder.unit)
        assert inexact(fmt.codebook, BF16) == 0
        assert inexact(fmt.codebook, F16) == 0
    assert inexact(torch.linspace(0.0, 1.0, 256), BF16) > 100
