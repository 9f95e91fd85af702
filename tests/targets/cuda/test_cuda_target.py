"""The target `cuda` without a GPU: what it refuses and says, what it builds ahead of time, and its operators."""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.cuda_device import Gpu, NameCompiler, build_ahead, make_gpu
from support.cuda_stub import Stub, stub  # noqa: F401
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import ggpass
from ggpass import InputError, TargetError
from ggpass.errors import KernelsUnavailable
from ggpass.formats import FORMATS, quantize
from ggpass.integrations.dynamo.call_program import CallProgram
from ggpass.kernels import cache
from ggpass.kernels.cuda import compiler, cubin, driver, variants
from ggpass.kernels.cuda.build import Builder
from ggpass.kernels.cuda.cubin import FileKernels
from ggpass.lowering import operators as ops
from ggpass.lowering.decide import Lowering
from ggpass.passes.lower_weights import LowerWeights
from ggpass.passes.merge_linears import MergeLinears
from ggpass.targets import TARGETS, cuda, cuda_operators, resolve
from ggpass.targets.cuda import CudaArtifact

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cubin, "FROM_FILES", FileKernels())
    cuda_operators._say_once.cache_clear()
    known = cuda_operators.kernels_on
    known.cache_clear()
    yield
    known.cache_clear()


@pytest.fixture
def machine(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> Stub:  # noqa: F811
    """As on a machine with a driver, a GPU and a CUDA build of torch."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(driver, "LIBRARY", stub.path)
    return stub


@pytest.fixture
def gpu(machine: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A GPU that computes, under the operators; tensors on the CPU stand for tensors on it."""
    made = make_gpu(machine, tmp_path / "kernels", monkeypatch)
    monkeypatch.setattr(cuda_operators, "kernels_on", lambda index: made.kernels)
    return made


@pytest.fixture
def ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NameCompiler:
    return build_ahead(tmp_path, monkeypatch)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(50, 16), nn.Conv1d(16, 32, 3)
        self.q, self.k, self.head = nn.Linear(32, 32), nn.Linear(32, 16, bias=False), nn.Linear(48, 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.head(torch.cat([self.q(x), self.k(x)], -1))


IDS = torch.randint(50, (2, 9))


def test_here_the_reason_is_the_drivers_or_torchs(machine: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    target = TARGETS["cuda"]
    assert target.unavailable() is None
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA; install a CUDA build" in (target.unavailable() or "")
    machine.device(0, "Tesla T4", 7, 5)
    reason = target.unavailable() or ""
    assert "need sm_80 or newer, and this is Tesla T4 (sm_75)" in reason
    assert reason.endswith('or build for a GPU elsewhere with arch="sm_90", or use rf8-cpu')
    with pytest.raises(TargetError, match=r"cannot be used here: the kernels need sm_80"):
        ggpass.compile(nn.Linear(16, 16), target="rf8-cuda")


def test_a_model_on_the_cpu_is_refused_before_anything_is_converted(machine: Stub) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    before = model[0].weight.clone()
    for args in (None, (torch.ones(1, 64),)):
        with pytest.raises(TargetError, match=r"'0\.weight' is on cpu; call model\.to\('cuda'\) first"):
            ggpass.compile(model, args, target="rf8-cuda", inplace=True)
    assert torch.equal(model[0].weight, before)


def test_a_model_on_an_old_gpu_beside_a_new_one_is_refused(machine: Stub) -> None:
    machine.count(2)
    machine.device(1, "Tesla T4", 7, 5)
    with FakeTensorMode():
        new, old = torch.empty(8, 8, device="cuda:0"), torch.empty(8, 8, device="cuda:1")
    TARGETS["cuda"].check_tensor("w", new)
    with pytest.raises(TargetError, match=r"'w' is on cuda:1: .*Tesla T4 \(sm_75\); move the model to a newer GPU"):
        TARGETS["cuda"].check_tensor("w", old)
    TARGETS["cuda"].check_tensor("bias", torch.empty(8))


@pytest.mark.parametrize(("arch", "match"), [("sm_75", "sm_80 or newer, not sm_75"), ("hopper", "no GPU architecture")])
def test_a_bad_architecture_is_refused(arch: str, match: str) -> None:
    with pytest.raises(TargetError, match=match):
        ggpass.compile(nn.Linear(16, 16), target="rf8-cuda", arch=arch)


def test_other_targets_take_no_architecture() -> None:
    with pytest.raises(TargetError, match=r"target cpu builds for this machine; leave out arch="):
        ggpass.compile(nn.Linear(16, 16), target="rf8-cpu", arch="sm_90")


def test_ahead_of_time_without_a_compiler_or_tvm_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_compilers", lambda: iter([]))
    with pytest.raises(TargetError, match="no CUDA compiler"):
        resolve("rf8-cuda", ("sm_90",))
    monkeypatch.setattr(compiler, "_compilers", lambda: iter([NameCompiler()]))
    monkeypatch.setattr(cache, "version_of", lambda name: None)
    with pytest.raises(TargetError, match=r"apache-tvm is not installed.*pip install 'ggpass\[tvm\]'"):
        resolve("rf8-cuda", ("sm_90",))


def families(made: tuple) -> set[str]:
    return {cubin.name.partition("_")[0] for cubin in made}


def test_an_artifact_holds_every_kernel_its_graph_can_call(ahead: NameCompiler) -> None:
    art = ggpass.compile(Net().to(BF16), (IDS,), target="rf8-cuda", arch=("sm_80", "sm_90"))
    assert isinstance(art, CudaArtifact)
    assert families(art.kernels) >= {"small", "embedding", "dequantize"}
    wanted = {v.name for k in (32, 48) for v in variants.every_linear("rf8", "bfloat16", k)}
    for arch in ("sm_80", "sm_90"):
        assert wanted | {"embedding_rf8_bfloat16", "dequantize_rf8_bfloat16"} == {
            cubin.name for cubin in art.kernels if cubin.arch == arch
        }
    (note,) = (n for n in art.report.notes if "CUDA kernels" in n)
    assert note.startswith(f"{len(art.kernels)} CUDA kernels for sm_80, sm_90 by nvcc13.0.88")
    assert note.endswith("at most 40 registers a thread, none spilled")


def test_a_module_holds_them_too(ahead: NameCompiler) -> None:
    model = ggpass.compile(Net().half(), target="int8-cuda", arch="sm_90")
    held = model.__dict__["ggpass_kernels"]
    assert {cubin.name for cubin in held} >= {"embedding_table_float16", "dequantize_table_float16"}
    assert any("CUDA kernels" in note for note in ggpass.report(model).notes)


def test_float32_activations_are_said_to_have_no_kernels(ahead: NameCompiler) -> None:
    for compiled in (
        ggpass.compile(Net(), (IDS,), target="rf8-cuda", arch="sm_90"),
        ggpass.compile(Net(), target="rf8-cuda", arch="sm_90"),
    ):
        notes = [note for note in ggpass.report(compiled).notes if "activations are float32" in note]
        assert len(notes) == 1
        assert "compile model.to(torch.bfloat16) for speed" in notes[0]
        assert {name for name, _ in ahead.built} == {"embedding_rf8_float32", "dequantize_rf8_float32"}


def test_a_kernel_that_does_not_compile_fails_the_compilation(ahead: NameCompiler, monkeypatch) -> None:
    def refuse(source: str, arch: str, name: str) -> None:
        raise KernelsUnavailable(f"nvcc cannot compile {name}: line 3 is wrong")

    monkeypatch.setattr(ahead, "compile", refuse)
    with pytest.raises(TargetError, match=r"'rf8-cuda' with arch=.*cannot compile .*line 3 is wrong"):
        ggpass.compile(nn.Linear(64, 64).to(BF16), target="rf8-cuda", arch="sm_90")


def test_an_artifact_built_ahead_says_where_it_runs(ahead: NameCompiler) -> None:
    art = ggpass.compile(Net().to(BF16), (IDS,), target="rf8-cuda", arch="sm_90")
    with pytest.raises(
        InputError, match=r"built ahead of time \(sm_90\): save it, and load it.*target reference or cpu"
    ):
        art(IDS)


def weight(n: int, k: int, name: str = "rf8") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = quantize(torch.randn(n, k), FORMATS[name])
    return made.codes, made.scale, FORMATS[name].codebook


@pytest.mark.parametrize("shape", [(32,), (3, 32), (2, 5, 32), (0, 32), (2, 0, 32)])
@pytest.mark.parametrize("bias", [None, torch.randn(24)])
def test_linear_of_any_rank_equals_the_reference(gpu: Gpu, shape: tuple[int, ...], bias) -> None:
    x, operands = torch.randn(shape).to(BF16), weight(24, 32)
    got, expected = cuda_operators._linear(x, *operands, bias), ops.reference_linear(x, *operands, bias)
    assert (got.shape, got.dtype, got._base) == (expected.shape, BF16, None)
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7)
    assert bool(gpu.stub.launches) is (x.numel() > 0)


def test_float32_is_dequantized_and_multiplied_in_torch_and_says_so_once(
    gpu: Gpu, caplog: pytest.LogCaptureFixture
) -> None:
    x, operands, bias = torch.randn(2, 3, 32), weight(24, 32), torch.randn(24).to(BF16)
    with caplog.at_level(logging.WARNING, logger="ggpass"):
        for _ in range(2):
            got = cuda_operators._linear(x, *operands, bias)
    # Both round each of 32 products and sums in float32; RF8's weights and power-of-two scales are exact.
    torch.testing.assert_close(got, ops.reference_linear(x, *operands, bias), rtol=1e-5, atol=1e-5)
    assert [r.getMessage() for r in caplog.records if "activations are float32" in r.getMessage()] == [
        cuda_operators.float_note(torch.float32)
    ]
    assert [launch.name for launch in gpu.stub.launches] == ["dequantize_rf8_float32"] * 2


def test_embedding_and_dequantize_equal_the_reference(gpu: Gpu) -> None:
    operands, ids = weight(24, 32), torch.randint(24, (2, 7))
    for dtype in (BF16, torch.float16, torch.float32):
        got = cuda_operators._embedding(ids, *operands, dtype)
        torch.testing.assert_close(got, ops.reference_embedding(ids, *operands, dtype), rtol=0, atol=0)
        assert got._base is None
        got = cuda_operators._dequantize(*operands, dtype)
        torch.testing.assert_close(got, ops.reference_dequantize(*operands, dtype), rtol=0, atol=0)
    assert len(gpu.stub.launches) == 6
    wide = cuda_operators._dequantize(*operands, torch.float64)
    assert torch.equal(wide, ops.reference_dequantize(*operands, torch.float64))
    assert len(gpu.stub.launches) == 6
    with pytest.raises(TypeError, match=r"int64 or int32, not torch\.float32"):
        cuda_operators._embedding(ids.float(), *operands, BF16)


def test_without_kernels_the_reference_runs_and_says_so_once(gpu: Gpu, caplog: pytest.LogCaptureFixture) -> None:
    def fail(variant: object) -> None:
        raise KernelsUnavailable("apache-tvm is not installed; run `pip install 'ggpass[tvm]'`")

    gpu.kernels._builder = Builder(fail, gpu.directory)
    x, operands = torch.randn(3, 32).to(BF16), weight(24, 32)
    with caplog.at_level(logging.WARNING, logger="ggpass"):
        for _ in range(2):
            assert torch.equal(cuda_operators._linear(x, *operands, None), ops.reference_linear(x, *operands, None))
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1
    assert "torch reference, several times slower: apache-tvm is not installed" in said[0]


def test_inputs_elsewhere_than_the_weights_are_named(gpu: Gpu) -> None:
    operands = weight(24, 32)
    with pytest.raises(InputError, match=r"the input is on meta and the weight on cpu; move both to one device"):
        cuda_operators._linear(torch.empty(3, 32, dtype=BF16, device="meta"), *operands, None)
    with pytest.raises(InputError, match=r"the bias is on meta"):
        cuda_operators._linear(torch.empty(3, 32, dtype=BF16), *operands, torch.empty(24, device="meta"))
    with pytest.raises(InputError, match=r"the input is on meta"):
        cuda_operators._embedding(torch.zeros(3, dtype=torch.long, device="meta"), *operands, BF16)


def test_an_old_gpu_runs_the_reference(machine: Stub, caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    """A model that was compiled for another target and moved there still runs."""
    machine.device(0, "Tesla T4", 7, 5)
    real = cuda_operators.kernels_on
    assert isinstance(real(0), str)
    monkeypatch.setattr(cuda_operators, "kernels_on", lambda index: real(0))
    x, operands = torch.randn(3, 32).to(BF16), weight(24, 32)
    with caplog.at_level(logging.WARNING, logger="ggpass"):
        assert torch.equal(cuda_operators._linear(x, *operands, None), ops.reference_linear(x, *operands, None))
    assert "Tesla T4 (sm_75)" in caplog.text


def test_the_operators_are_registered_for_cuda_and_traced_without_a_gpu() -> None:
    for name in ("linear", "embedding", "dequantize"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ggpass::{name}", "CUDA")
    with FakeTensorMode():
        codes = torch.empty(24, 32, dtype=torch.uint8, device="cuda")
        scale, codebook = torch.empty(24, device="cuda"), torch.empty(256, device="cuda")
        x = torch.empty(2, 5, 32, dtype=BF16, device="cuda")
        y = torch.ops.ggpass.linear(x, codes, scale, codebook, None)
        assert (y.device.type, y.dtype, tuple(y.shape)) == ("cuda", BF16, (2, 5, 24))
        rows = torch.ops.ggpass.embedding(torch.zeros(3, dtype=torch.long, device="cuda"), codes, scale, codebook, BF16)
        assert (rows.device.type, tuple(rows.shape)) == ("cuda", (3, 32))


def test_under_torch_compile_codes_and_codebook_are_where_the_weight_is(machine: Stub) -> None:
    """On a graph of fake tensors on a GPU, as Dynamo gives it; the codebook itself is moved when there is one."""
    mode = FakeTensorMode()
    with mode:
        x = torch.empty(3, 32, dtype=BF16, device="cuda")
        made = [nn.Parameter(torch.empty(24, 32, dtype=BF16, device="cuda"), requires_grad=False) for _ in range(2)]
        graph = make_fx(lambda x, a, b: nn.functional.linear(x, a) + nn.functional.linear(x, b))(x, *made)
    moved = []

    class Moving:
        def to(self, device: torch.device) -> torch.Tensor:
            moved.append(device)
            with mode:
                return torch.empty(256, device=device)

    stand_in = dataclasses.replace(FORMATS["rf8"])
    object.__setattr__(stand_in, "codebook", Moving())
    program = CallProgram(graph, [x, *made])
    LowerWeights(Lowering(format=stand_in, check=TARGETS["cuda"].check_tensor))(program)
    MergeLinears(floats=False)(program)
    nodes = [n for n in program.graph.nodes if n.op == "placeholder" and str(n.target).startswith("ggpass_")]
    assert len(nodes) >= 5
    assert {n.meta["val"].device for n in nodes} == {torch.device("cuda:0")}
    assert moved == [torch.device("cuda:0")]


def test_under_torch_compile_a_model_on_the_cpu_is_refused(machine: Stub) -> None:
    torch._dynamo.reset()
    fast = torch.compile(nn.Linear(32, 32), backend="ggpass", options={"target": "rf8-cuda", "inner": "eager"})
    with torch.no_grad(), pytest.raises(Exception, match=r"'weight' is on cpu; call model\.to\('cuda'\) first"):
        fast(torch.ones(1, 32))
    torch._dynamo.reset()


def test_tuning_asks_for_a_model_on_a_gpu(ahead: NameCompiler) -> None:
    model = ggpass.compile(nn.Linear(64, 64).to(BF16), target="rf8-cuda", arch="sm_90")
    with pytest.raises(InputError, match="there is nothing to tune: it is on cpu; compile the model on a GPU"):
        cuda.tune(model)


def test_tuning_times_each_shape_once(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU stand for tensors on the GPU."""
    asked: list[tuple[int, tuple[int, ...]]] = []
    timed = lambda m, codes, *rest: asked.append((m, tuple(codes.shape))) or {"kernel": 1.0}  # noqa: E731
    monkeypatch.setattr(gpu.kernels, "tune", timed)
    monkeypatch.setattr(cuda, "kernels_on", lambda index: gpu.kernels)
    on_gpu = type("On", (), {"type": "cuda", "index": 0})()
    layers = [nn.Linear(64, 48), nn.Linear(64, 48), nn.Linear(48, 16)]
    model = ggpass.compile(nn.Sequential(*layers).to(BF16), target="rf8-reference")
    uses = list(cuda._uses(model))
    moved = [(n, type("T", (), {"device": on_gpu, "shape": c.shape})(), b) for n, c, b in uses]
    monkeypatch.setattr(cuda, "_uses", lambda model: moved)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(shape))
    assert set(cuda.tune(model, (1, 16))) == {"1 × 48 × 64", "16 × 48 × 64", "1 × 16 × 48", "16 × 16 × 48"}
    assert asked == [(1, (48, 64)), (16, (48, 64)), (1, (16, 48)), (16, (16, 48))]


def test_describe_names_what_spills(ahead: NameCompiler) -> None:
    art = ggpass.compile(nn.Linear(64, 64).to(BF16), (torch.ones(1, 64, dtype=BF16),), target="rf8-cuda", arch="sm_90")
    from dataclasses import replace

    spilling = replace(art.kernels[0], log="8 bytes spill stores, 4 bytes spill loads")
    assert cuda.describe([spilling]).endswith(f"registers spilled in {spilling.name} (12 bytes)")
