"""How far two correct runtimes may differ: |y₁ − y₂| ≤ 2 · max over runs of |y(every operand · (1 ± γ)) − y|.

A computed sum of n products is the exact sum of products whose factors are off by at most γ_n = n·u / (1 − n·u)
(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1), whatever the order of the sum. So the
graph runs a few more times with each operand of each node multiplied by 1 ± γ_n, the signs at random: how that moves
the outputs is how the network itself carries roundings on, layer after layer. Real roundings are mostly far below
their bound, so the largest movement seen, taken over a row of the output, covers one runtime's; two runtimes, twice it.
"""

from collections.abc import Callable, Collection
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

#: Runs with random signs; each row of an output has its own largest movement over all of them.
RUNS = 4
#: Rows shorter than this are pooled, since few numbers say little about the largest.
MIN_ROW = 16
#: Elementary functions (exp, erf, tanh) are within 4 units in the last place in every runtime we meet: 8 u.
ELEMENTARY = 8

aten = torch.ops.aten

_ADD_PRODUCT = (aten.addmm.default, aten.addbmm.default, aten.baddbmm.default, aten.addmv.default)
_DECODES = (torch.ops.ggpass.embedding.default, torch.ops.ggpass.dequantize.default)


def accumulation(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]) -> int:
    """Return the longest path of roundings from an operand to a result of a node; 0 if nothing is computed.

    Args:
        target: the operator.
        args, kwargs: what it is called with.
        run: calls it with them, for operators that tell only by their result's size how much they sum.
    """
    schema = getattr(target, "_schema", None)
    if schema is None or any(a.alias_info is not None for a in schema.arguments):
        return 0  # a view, or getitem
    named = dict(zip([a.name for a in schema.arguments], args)) | kwargs
    tensors = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor) and a.is_floating_point()]
    if not any(tensor.dim() for tensor in tensors) or target in (aten.cat.default, aten.stack.default):
        return 0
    if target in _DECODES:
        return 1
    if torch.Tag.pointwise in target.tags:
        return ELEMENTARY
    return _summed(target, named, tensors, run) + ELEMENTARY


def _summed(target: Any, named: dict[str, Any], tensors: list[Tensor], run: Callable[[], Any]) -> int:
    """Return how many products at most go into one number of the result."""
    weight = named.get("weight")
    if "conv" in target.__name__ and isinstance(weight, Tensor):
        transposed = "transpose" in target.__name__ or named.get("transposed", False)
        return (weight[:, 0] if transposed else weight[0]).numel()
    if target is aten.einsum.default:
        return _contracted(named["equation"], tensors)
    if target is aten.scaled_dot_product_attention.default:
        # Scores sum over the head's width, the result over the sequence.
        return max(tensors[0].shape[-1], tensors[1].shape[-2])
    if target in _ADD_PRODUCT:
        return next(t for t in tensors if t is not named["self"]).shape[-1]
    first = tensors[0]
    if first.dim() == 0:
        return max(tensor.numel() for tensor in tensors)
    dims = named.get("dim", named.get("dims_self"))
    if dims is not None and dims != []:
        dims = [dims] if isinstance(dims, int) else dims
        return prod(first.shape[d] for d in dims if isinstance(d, int))
    if "normalized_shape" in named:
        return prod(first.shape[-len(named["normalized_shape"]) :])
    results = [r for r in pytree.tree_leaves(run()) if isinstance(r, Tensor)]
    ratio = first.numel() // max(1, min((r.numel() for r in results), default=1))
    return max(first.shape[-1], ratio)


def _contracted(equation: str, tensors: list[Tensor]) -> int:
    """Return the product of the sizes that an einsum sums over."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow:
        output = "".join(label for label in inputs if inputs.count(label) == 1)
    sizes: dict[str, int] = {}
    for labels, tensor in zip(inputs.split(","), tensors):
        # A label stands for one dimension; the ellipsis for those between, which are never summed over.
        front, _, back = labels.partition("...")
        sizes |= dict(zip(front, tensor.shape))
        sizes |= dict(zip(reversed(back), reversed(tensor.shape)))
    return prod(size for label, size in sizes.items() if label not in output)


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
        call = super().call_function
        if self.generator is not None:
            length = accumulation(target, args, kwargs, lambda: call(target, args, kwargs))
            if length:
                # Operands may lie in lists, as einsum's do.
                args, kwargs = pytree.tree_map(lambda value: self._rounded(value, length), (args, kwargs))
        return call(target, args, kwargs)

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
    """Return the tensors of these nodes in one run, by name; without roundings for seed None."""
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
