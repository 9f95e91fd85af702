"""What GGInit reads off a graph: the gain of what follows a weight, the fan of its operator; and what they are for."""

import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import quad
from torch import Tensor, nn

import ggpass
from ggpass import Program
from ggpass.passes.gg_init.candidate import Use
from ggpass.passes.gg_init.gain import gain_of, points
from ggpass.passes.gg_init.read_graph import read_graph


class Function(nn.Module):
    """A module around a function of (module, x), so that a test reads as its formula."""

    def __init__(self, function: Callable[..., Tensor], **members: object) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def uses_of(function: Callable[..., Tensor], x: Tensor, **members: object) -> dict[str, Use]:
    """The deciding use of each weight of a function, by name."""
    program = Program.trace(Function(function, **members).eval(), (x,))
    return {reading.name: reading.decide() for reading in read_graph(program) if reading.uses}


def power_after(function: Callable[[Tensor], Tensor], gain: float) -> float:
    """E[f(√ξ·z)²] by adaptive quadrature, one point at a time: nothing in common with the library's own sum."""

    def integrand(u: float) -> float:
        value = function(torch.tensor([u * math.sqrt(gain)], dtype=torch.float64)).item()
        return value**2 * math.exp(-(u**2) / 2) / math.sqrt(2 * math.pi)

    return sum(quad(integrand, low, low + 2)[0] for low in range(-10, 10, 2))


def gelu_new(z: Tensor) -> Tensor:
    return 0.5 * z * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * torch.pow(z, 3.0))))


CURVED = {
    "gelu": F.gelu,
    "gelu of eight operators": gelu_new,
    "quick gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "selu": F.selu,
    "softplus": F.softplus,
    "relu6": F.relu6,
    "relu squared": lambda z: torch.relu(z) ** 2,
    "where": lambda z: torch.where(z > 0, z, torch.exp(z) - 1),
    "LeCun's tanh": lambda z: F.hardtanh(z, -1.7159, 1.7159),
}


@functools.cache
def uses_before(table: str) -> dict[str, Use]:
    """The use of a linear in front of each function of a table, all in one graph."""
    functions = {key: entry[0] if isinstance(entry, tuple) else entry for key, entry in globals()[table].items()}
    linears = nn.ModuleList(nn.Linear(4, 4) for _ in functions)
    found = uses_of(
        lambda m, x: [function(layer(x)) for function, layer in zip(functions.values(), m.layers)],
        torch.randn(2, 4),
        layers=linears,
    )
    return {key: found[f"layers.{i}.weight"] for i, key in enumerate(functions)}


@pytest.mark.parametrize("name", CURVED)
def test_the_gain_keeps_the_power_through_weight_and_activation(name: str) -> None:
    """E[f(√ξ·z)²] = 1, and 2 % more or less of ξ would be seen."""
    gain = uses_before("CURVED")[name].gain
    assert power_after(CURVED[name], gain) == pytest.approx(1, abs=1e-5)
    assert power_after(CURVED[name], 1.02 * gain) > 1 + 1e-3
    assert power_after(CURVED[name], gain / 1.02) < 1 - 1e-3


PUBLISHED = {
    "linear": (lambda z: z, 1.0),
    "relu": (torch.relu, 2.0),
    "leaky": (lambda z: F.leaky_relu(z, 0.2), 2 / 1.04),
    "in place": (lambda z: F.leaky_relu_(z + 0, 0.3), 2 / 1.09),
    "abs": (torch.abs, 1.0),
    "sigmoid": (torch.sigmoid, 1.0),
    "tanh": (torch.tanh, 1.0),
    "sine": (torch.sin, 1.0),
    "softmax": (lambda z: torch.softmax(z, -1), 1.0),
    "scaled": (lambda z: z * 0.125, 1.0),
    "scaled relu": (lambda z: torch.relu(z) * 0.125, 2.0),
    "scaled gelu": (lambda z: F.gelu(z) / 3, None),
    "gated": (lambda z: F.glu(z), 1.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_gains(name: str) -> None:
    """ξ = 1 linear, sigmoid, tanh, softmax; 2 ReLU; 2/(1 + k²) LeakyReLU; a constant factor is not undone."""
    gain = PUBLISHED[name][1] or gain_of(F.gelu(points()))
    assert uses_before("PUBLISHED")[name].gain == pytest.approx(gain, rel=1e-9)


THROUGH = {
    "bias, view, dropout": lambda m, x: torch.relu(F.dropout((x @ m.w + m.b).view(2, 2, 4, 5), 0.5).transpose(1, 2)),
    "layer norm": lambda m, x: torch.relu(F.layer_norm(x @ m.w, (10,))),
    "split": lambda m, x: torch.cat([torch.relu(part) for part in (x @ m.w).chunk(2, -1)]),
    "pooling": lambda m, x: torch.relu(F.max_pool1d(x @ m.w, 2)),
    "mean": lambda m, x: torch.relu((x @ m.w).mean(1)),
    "in-place relu, read twice": lambda m, x: (lambda z: torch.relu_(z) + z)(x @ m.w),
}
STOPS = {
    "residual": (lambda m, x: torch.relu(x @ m.w + x), "a residual add"),
    "gate": (lambda m, x: torch.relu((x @ m.w) * x), "a product"),
    "attention": (
        lambda m, x: torch.relu(F.scaled_dot_product_attention(x @ m.w, x, x)),
        "scaled_dot_product_attention",
    ),
    "matmul": (lambda m, x: torch.relu((x @ m.w) @ x.mT), "matmul"),
    "norm made of parts": (
        lambda m, x: (lambda z: z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True)))(x @ m.w),
        "a product",
    ),
    "output": (lambda m, x: x @ m.w, "the output"),
}


@pytest.mark.parametrize("function", THROUGH.values(), ids=THROUGH.keys())
def test_what_is_seen_through(function: Callable[..., Tensor]) -> None:
    members = {"w": nn.Parameter(torch.randn(10, 10)), "b": nn.Parameter(torch.randn(10))}
    use = uses_of(function, torch.randn(2, 4, 10), **members)["w"]
    assert (use.gain, use.why) == (2.0, "relu after it")


@pytest.mark.parametrize(("function", "end"), STOPS.values(), ids=STOPS.keys())
def test_where_an_activation_no_longer_belongs_to_the_weight(function: Callable[..., Tensor], end: str) -> None:
    use = uses_of(function, torch.randn(2, 4, 10), w=nn.Parameter(torch.randn(10, 10)))["w"]
    assert (use.gain, use.why) == (1.0, f"linear into {end}")


def test_batch_norm_in_between_is_seen_through() -> None:
    use = uses_of(
        lambda m, x: torch.relu(m.n(m.c(x))), torch.randn(1, 2, 5, 5), c=nn.Conv2d(2, 4, 3), n=nn.BatchNorm2d(4)
    )
    assert use["c.weight"].gain == 2


def test_several_readers_take_the_least_gain_and_say_so() -> None:
    use = uses_of(lambda m, x: F.silu(m.l(x)[:, :4]) * m.l(x)[:, 4:], torch.randn(2, 4), l=nn.Linear(4, 8))["l.weight"]
    assert use.gain == 1
    assert "the least of" in use.why
    tied = uses_of(lambda m, x: F.relu(x @ m.w) @ m.w.t(), torch.randn(2, 4), w=nn.Parameter(torch.randn(4, 64)))["w"]
    assert (tied.gain, tied.fan) == (1, 64)


FANS = {
    "linear": (nn.Linear(6, 10), (2, 6), 6),
    "conv1d": (nn.Conv1d(4, 8, 5), (1, 4, 9), 20),
    "conv2d, grouped": (nn.Conv2d(8, 8, 3, groups=4), (1, 8, 7, 7), 18),
    "conv2d, depthwise, dilated": (nn.Conv2d(8, 16, 3, groups=8, dilation=2, stride=2), (1, 8, 9, 9), 9),
    "conv3d, padding by name": (nn.Conv3d(2, 4, (1, 2, 3), padding="valid"), (1, 2, 4, 4, 4), 12),
    "transposed": (nn.ConvTranspose1d(6, 4, 5), (1, 6, 9), 30),
    "transposed, stride 2": (nn.ConvTranspose2d(6, 4, 4, stride=2), (1, 6, 5, 5), 24),
    "transposed, stride 2, kernel 3, groups": (nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2), (1, 6, 5, 5), 3 * 2.25),
    "transposed, kernel smaller than stride": (nn.ConvTranspose3d(6, 4, 1, stride=2), (1, 6, 3, 3, 3), 6),
}


@pytest.mark.parametrize(("module", "shape", "fan"), FANS.values(), ids=FANS.keys())
def test_fans_are_those_of_the_operator_with_and_without_a_graph(module: nn.Module, shape: tuple, fan: float) -> None:
    """Var(w) = 1/n, for the module and for its graph."""
    use = uses_of(lambda m, x: m.f(x), torch.randn(shape), f=module)["f.weight"]
    assert use.fan == pytest.approx(fan)
    report = ggpass.init_(module)
    assert f"n = {fan:g}," in report.changes[0].what
    assert f"σ {0:.0f}"[:2] in report.changes[0].what
    assert f"→ {fan**-0.5:.2g}" in report.changes[0].what


def test_a_transposed_convolution_keeps_the_power() -> None:
    """White noise in, mean square 1 out, at every phase of the stride, within the deviations of weights and noise."""
    module = nn.ConvTranspose2d(64, 64, 4, stride=2, padding=1, bias=False)
    ggpass.init_(module)
    x = torch.randn(1, 64, 32, 32, generator=torch.Generator().manual_seed(0))
    y = module(x)[..., 2:-2, 2:-2]
    bound = 5 * (math.sqrt(2 / module.weight.numel()) + math.sqrt(4 / x.numel()))
    assert abs(y.square().mean().item() - 1) <= bound
    assert bound < 0.1


@pytest.mark.parametrize("nu", [0.7, 2.0])
def test_power_stays_through_twenty_relu_layers(nu: float) -> None:
    """|ln(q_20/q_0)| within 5 deviations, where a wrong ξ = 1 would give −20 ln 2.

    Each layer adds (E[φ⁴]/E[φ²]² − 1)/n to the variance of ln q, φ = relu(z): E[φ⁴]/E[φ²]² = 2·E[z⁴]/E[z²]², and
    E[z⁴]/E[z²]² = 3 + (κ − 3)·Σx⁴/(Σx²)² = 3 + (κ − 3)·6/n for x from a ReLU. κ(0.7) < 11.
    """
    layers = [m for _ in range(20) for m in (nn.Linear(512, 512, bias=False), nn.ReLU())]
    model, x = nn.Sequential(*layers), torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    ggpass.init_(model, x, shape=nu)
    deviation = math.sqrt(20 * (5 + 12 * (8 if nu < 2 else 0) / 512) / 512)
    growth = math.log(model(x).square().mean().item() / x.square().mean().item())
    assert abs(growth) <= 5 * deviation
    assert 5 * deviation < 20 * math.log(2)


def test_power_stays_through_ten_convolutions() -> None:
    """As above with 64 channels: positions share their weights, so that they count as one at worst."""
    layers = [
        m
        for i in range(10)
        for m in (
            nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular", bias=False, groups=1 + i % 2),
            nn.LeakyReLU(0.1),
        )
    ]
    model, x = nn.Sequential(*layers), torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    ggpass.init_(model, x)
    growth = math.log(model(x).square().mean().item() / x.square().mean().item())
    deviation = math.sqrt(10 * 5 / 64)
    assert abs(growth) <= 5 * deviation
    assert 5 * deviation < 10 * math.log(2)


@pytest.mark.parametrize("same", [True, False], ids=["self", "cross"])
@pytest.mark.parametrize("traced", [True, False], ids=["graph", "module"])
def test_attention_projections(same: bool, traced: bool) -> None:
    """in_proj is three matrices of fan d, not one of 3d; q, k and v have their own fans where their sizes differ."""
    module = nn.MultiheadAttention(32, 4, **({} if same else {"kdim": 8, "vdim": 16}))
    x = torch.randn(5, 1, 32)
    inputs = (x, x, x) if same else (x, torch.randn(6, 1, 8), torch.randn(6, 1, 16))
    report = ggpass.init_(module, inputs if traced else None)
    said = {change.name: change.what for change in report.changes}
    fans = {"in_proj_weight": 32} if same else {"q_proj_weight": 32, "k_proj_weight": 8, "v_proj_weight": 16}
    assert said.keys() == {*fans, "out_proj.weight"}
    for name, fan in {**fans, "out_proj.weight": 32}.items():
        assert "ξ = 1 (" in said[name]
        assert f"n = {fan}," in said[name]


def test_embedding_bags_and_stacked_experts() -> None:
    members = {"bag": nn.EmbeddingBag(30, 8), "w": nn.Parameter(torch.randn(3, 8, 64))}
    uses = uses_of(
        lambda m, x: torch.relu(torch.bmm(m.bag(x).expand(3, -1, -1), m.w)), torch.zeros(2, 3).long(), **members
    )
    assert uses["bag.weight"].operator == "embedding_bag"
    assert (uses["w"].fan, uses["w"].gain) == (8, 2)


def test_a_weight_that_the_inputs_do_not_reach_is_drawn_with_gain_one_and_named() -> None:
    model = Function(lambda m, x: torch.relu(m.a(x)), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    said = {change.name: change.what for change in ggpass.init_(model, torch.randn(1, 8)).changes}
    assert "ξ = 2 (relu after it)" in said["a.weight"]
    assert "ξ = 1 (the graph does not use it)" in said["b.weight"]
