"""How far two correct runtimes may differ: |y₁ − y₂| ≤ 2 · max over runs of |y(every operand · (1 ± γ)) − y|.

A computed sum of n products is the exact sum of products whose factors are off by at most γ_n = n·u / (1 − n·u)
(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1), whatever the order of the sum. So the
graph runs a few more times with each operand of each node multiplied by 1 ± γ_n, the signs at random: how that moves
the outputs is how the network itself carries roundings on, layer after layer. Real roundings are mostly far below
their bound, so the largest movement seen, taken over a row of the output, covers one runtime's; two runtimes, twice it.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

#: Runs with random signs; each row of an output has its own largest movement over all of them.
RUNS = 4
#: Rows shorter than this are pooled, since few numbers say little about the largest.
MIN_ROW = 16
#: Elementary functions (exp, erf, tanh) are within 4 units in the last place in every runtime we meet: 8 u.
ELEMENTARY = 8

aten = torch.ops.aten

_CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.convolution.default,
)


def accumulation(target: Any, args: tuple[Any, ...]) -> int:
    """The longest path of roundings from an operand to a result of this node; 0 where nothing is computed."""
    schema = getattr(target, "_schema", None)
    if schema is None or any(a.alias_info is not None for a in schema.arguments):
        return 0  # a view, or getitem
    tensors = [a for a in args if isinstance(a, Tensor) and a.is_floating_point() and a.dim()]
    if not tensors:
        return 0
    if torch.Tag.pointwise in target.tags:
        return ELEMENTARY
    if target in _CONVOLUTIONS:
        return tensors[1][0].numel() + ELEMENTARY
    if target is torch.ops.ggpass.embedding.default or target is torch.ops.ggpass.dequantize.default:
        return 1
    if target is aten.scaled_dot_product_attention.default:
        # Scores sum over the head's width, the result over the sequence.
        return max(tensors[0].shape[-1], tensors[1].shape[-2]) + ELEMENTARY
    return tensors[0].shape[-1] + ELEMENTARY


class Rounded(fx.Interpreter):
    """Runs a graph, every floating operand of every computing node multiplied by 1 ± γ at random.

    Attributes:
        generator: of the signs; None computes the graph as it is.
        kept: the results of the nodes that were asked for, by name; others are freed once they are read.
    """

    def __init__(self, graph_module: fx.GraphModule, names: Collection[str], generator: torch.Generator | None) -> None:
        super().__init__(graph_module)
        self.generator = generator
        self.names = set(names)
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.names and isinstance(result, Tensor):
            self.kept[n.name] = result
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        length = accumulation(target, args) if self.generator is not None else 0
        if length:
            args = tuple(self._rounded(a, length) for a in args)
        return super().call_function(target, args, kwargs)

    def _rounded(self, value: Any, length: int) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        n = length * torch.finfo(torch.float32).eps / 2
        gamma = n / (1 - n)
        if value.dtype is not torch.float32:
            gamma += torch.finfo(value.dtype).eps  # sums are formed in float32, and stored in fewer bits
        signs = torch.randint(0, 2, value.shape, generator=self.generator) * 2 - 1
        return (value.float() * (1 + gamma * signs.to(value.device))).to(value.dtype)


def run(
    graph_module: fx.GraphModule, inputs: list[Tensor], names: Collection[str], seed: int | None
) -> dict[str, Tensor]:
    """The tensors of these nodes in one run, by name; without roundings for seed None."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    interpreter = Rounded(graph_module, names, generator)
    with torch.no_grad():
        interpreter.run(*inputs)
    return interpreter.kept


def expected_and_bounds(
    graph_module: fx.GraphModule, inputs: list[Tensor], names: Collection[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """What these nodes compute, and 2 · max over runs and over each row of |run − that|; the bounds broadcast."""
    expected = run(graph_module, inputs, names, None)
    runs = [run(graph_module, inputs, names, seed) for seed in range(RUNS)]
    found = {}
    for name, want in expected.items():
        moved = torch.stack([(each[name].double() - want.double()).abs().nan_to_num(0.0) for each in runs]).amax(0)
        pooled = moved.dim() == 0 or moved.shape[-1] < MIN_ROW or moved.numel() == 0
        row = (moved.amax() if moved.numel() else moved.sum()) if pooled else moved.amax(-1, keepdim=True)
        found[name] = want, 2 * row + torch.finfo(torch.float32).tiny
    return found
