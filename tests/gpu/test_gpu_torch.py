"""The CUDA kernels within torch: streams, graphs, `torch.compile`, embeddings, a whole model."""

import copy

import pytest
import torch
from support.cuda_cases import Linear, random_codes, random_linear
from torch import nn

import ggpass
from ggpass.formats.rf8 import RF8
from ggpass.lowering.operators import reference_dequantize, reference_embedding


def on(gpu: torch.device, case: Linear) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.to(gpu) for tensor in (case.x, case.codes, case.scale, RF8.codebook))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 96)
        self.up, self.down = nn.Linear(96, 250), nn.Linear(250, 96, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.embed(ids))))


def float64_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The lowered model in float64: each weight dequantized exactly, nothing rounded in between."""
    reference = ggpass.compile(copy.deepcopy(model).float().cpu(), target="rf8-reference")
    lowered = [module for module in reference.modules() if hasattr(module, "codes")]
    embed, up, down = (reference_dequantize(m.codes, m.scale, m.codebook, torch.float32).double() for m in lowered)
    bias = model.up.bias.detach().double().cpu()
    return torch.relu(embed[ids.cpu()] @ up.T + bias) @ down.T


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (3, 70)])
def test_a_model_computes_its_lowered_weights(gpu: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Three roundings of activations, each of relative size u, in float32 sums: compared in norm."""
    model = Model().to(gpu, dtype)
    fast = ggpass.compile(model, target="rf8-cuda")
    ids = torch.randint(100, shape, device=gpu)
    with torch.inference_mode():
        y = fast(ids).double().cpu()
    expected = float64_of(model, ids)
    error = (y - expected).norm() / expected.norm()
    assert error < 4 * torch.finfo(dtype).eps
    for wrong in (y * 1.1, torch.zeros_like(y), y.roll(1, -1)):
        assert (wrong - expected).norm() / expected.norm() > 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("m", [1, 20, 200])
def test_kernels_run_on_the_current_stream(gpu: torch.device, m: int) -> None:
    """x is written late, by the same stream; on any other the product would be that of zeros."""
    case = random_linear(RF8, torch.bfloat16, m, 100, 272, bias=False, canonical=True)
    late, codes, scale, codebook = on(gpu, case)
    x = torch.zeros_like(late)
    torch.ops.ggpass.linear(x, codes, scale, codebook, None)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.copy_(late)
        y = torch.ops.ggpass.linear(x, codes, scale, codebook, None)
    stream.synchronize()
    case.check(y.cpu(), chopped=True)


@pytest.mark.parametrize("m", [1, 20, 200])
def test_a_call_waits_for_nothing(gpu: torch.device, m: int) -> None:
    case = random_linear(RF8, torch.bfloat16, m, 100, 272, bias=False, canonical=True)
    tensors = on(gpu, case)
    torch.ops.ggpass.linear(*tensors, None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = torch.ops.ggpass.linear(*tensors, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    case.check(y.cpu(), chopped=True)


@pytest.mark.parametrize("m", [1, 20, 200])
def test_a_captured_graph_computes_with_new_inputs(gpu: torch.device, m: int) -> None:
    first, second = (random_linear(RF8, torch.bfloat16, m, 100, 272, bias=False, canonical=True) for _ in range(2))
    x, codes, scale, codebook = on(gpu, first)
    torch.ops.ggpass.linear(x, codes, scale, codebook, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.ggpass.linear(x, codes, scale, codebook, None)
    graph.replay()
    first.check(y.cpu(), chopped=True)
    x.copy_(second.x)
    graph.replay()
    Linear(RF8, second.x, first.codes, first.scale, None).check(y.cpu(), chopped=True)


def test_a_model_is_one_graph_for_torch_compile(gpu: torch.device) -> None:
    model = Model().to(gpu, torch.bfloat16)
    fast = ggpass.compile(model, target="rf8-cuda")
    ids = torch.randint(100, (2, 9), device=gpu)
    with torch.inference_mode():
        eager = fast(ids)
        compiled = torch.compile(fast, fullgraph=True)(ids)
    # The same kernels; what is fused between them keeps more digits than bfloat16.
    assert (compiled.double() - eager.double()).norm() <= 4 * torch.finfo(torch.bfloat16).eps * eager.double().norm()


@pytest.mark.parametrize("k", [7, 64, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_the_references(gpu: torch.device, dtype: torch.dtype, k: int) -> None:
    codes, scale = random_codes(RF8, 100, k, canonical=True), torch.rand(100) + 0.5
    ids = torch.randint(100, (3, 50))
    there = [tensor.to(gpu) for tensor in (codes, scale, RF8.codebook)]
    rows = torch.ops.ggpass.embedding(ids.to(gpu), *there, dtype).cpu()
    assert torch.equal(rows, reference_embedding(ids, codes, scale, RF8.codebook, dtype))
    every = torch.ops.ggpass.dequantize(*there, dtype).cpu()
    assert torch.equal(every, reference_dequantize(codes, scale, RF8.codebook, dtype))
