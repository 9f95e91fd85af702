"""The weights of a model: all names of each, what computes with it, and the reason to leave one alone.

Every front end asks here, whether it has a graph, a module or a file: the same weight is chosen everywhere, under any
of its names, and a reason has one sentence.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from ggpass.errors import WeightError
from ggpass.graph.report import Report, Skip

aten = torch.ops.aten

#: The dtypes of weights; others are indices, masks or codes.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: The least elements of a row of codes in a stack of matrices: with a scale of four bytes each, 1/16 more bytes.
LEAST_ROW = 64


def bytes_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def dtype_name(tensor: Tensor) -> str:
    """Return the name of a tensor's dtype, as `float32`."""
    return str(tensor.dtype).removeprefix("torch.")


def as_patterns(value: str | Iterable[str]) -> tuple[str, ...]:
    """Return one pattern or several as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)


def matches(name: str, pattern: str) -> bool:
    """Return True if a pattern selects a weight: a shell pattern on its full name, or the name of a module above it."""
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.") or fnmatchcase(name, f"{pattern}.*")


def check_patterns(names: Iterable[str], **options: Iterable[str]) -> None:
    """Raise WeightError if a pattern selects no weight: a typo would go unseen.

    Args:
        names: all names of all weights.
        options: the patterns of each option, by the option's name.
    """
    known = list(names)
    for option, patterns in options.items():
        for pattern in patterns:
            if not any(matches(name, pattern) for name in known):
                some = ", ".join(known[:5]) + (", …" if len(known) > 5 else "")
                raise WeightError(f"{option}={pattern!r} matches no weight of the model; its weights are {some}")


@dataclass(frozen=True)
class Selection:
    """The weights that match a pattern of `only`, or all if there is none, less those that match one of `skip`.

    A pattern is a shell pattern on a weight's full name, or the name of a module above it. Any name of a tied weight
    selects it.

    Attributes:
        only, skip: patterns; one may be given as a string.
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "only", as_patterns(self.only))
        object.__setattr__(self, "skip", as_patterns(self.skip))

    def check(self, names: Iterable[str]) -> None:
        """Raise WeightError if a pattern selects none of these names."""
        check_patterns(names, only=self.only, skip=self.skip)

    def reason(self, names: Iterable[str]) -> str:
        """Return the reason to skip the weight of these names, or ''."""
        names = tuple(names)
        for pattern in self.skip:
            if any(matches(name, pattern) for name in names):
                return f"matches skip={pattern!r}"
        if self.only and not any(matches(name, pattern) for name in names for pattern in self.only):
            return "matches none of only=" + ", ".join(map(repr, self.only))
        return ""

    def choose(self, weights: Iterable["Weight"], report: Report | None = None) -> list["Weight"]:
        """Return the float matrices among these weights that are Parameters and selected.

        Args:
            weights: of a graph, a module or a file.
            report: gets a Skip with the reason for each other weight.

        Raises:
            WeightError: a weight on the meta device.
        """
        chosen = []
        for weight in weights:
            reason = weight.reason_of_kind() or self.reason(weight.names)
            if not reason and not (weight.lazy or isinstance(weight.tensor, nn.Parameter)):
                reason = "a buffer, not a parameter"
            if not reason:
                chosen.append(weight)
            elif report is not None:
                report.skips.append(Skip(weight.name, reason, weight.nbytes, matrix=weight.is_matrix))
        return chosen


class Kind(Enum):
    """The operators in which codes can stand in for a weight."""

    LINEAR = "linear"  # y = x · Wᵀ (+ b), W (N, K)
    MATMUL = "matmul"  # y = x · W (+ b), W (K, N): Hugging Face's Conv1D, or a parameter that the code multiplies by
    EMBEDDING = "embedding"  # y = W[ids], W (N, K)
    CONV = "conv"  # y = x ∗ W (+ b), W (N, C/groups, …)
    OTHER = "other"  # anything that a module computes with an attribute of its own


@dataclass(frozen=True)
class Use:
    """One place that computes with a weight.

    Attributes:
        place: the graph's node, or the module that holds it (a Holder); it has a `name`.
        kind: the operator there; None if codes cannot stand in, and then `reason` says why.
        transposed: whether the output channels are the weight's second dimension.
        reason: the reason why codes cannot stand in, or ''.
    """

    place: Any
    kind: Kind | None
    transposed: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Weight:
    """One tensor of a model, with all its names and all its uses: tied weights are one weight.

    Attributes:
        names: every name of it; reports use the first.
        tensor: the tensor itself. Of a file it may be on the meta device, if `lazy`.
        uses: every place that computes with it.
        lazy: whether the values are read later, when they are encoded.
    """

    names: tuple[str, ...]
    tensor: Tensor
    uses: tuple[Use, ...] = ()
    lazy: bool = field(default=False, kw_only=True)

    least_row: ClassVar[int] = LEAST_ROW

    @property
    def name(self) -> str:
        """Return the first name."""
        return self.names[0]

    @property
    def title(self) -> str:
        """Return all names as reports print them: `embed.weight = head.weight`."""
        return " = ".join(self.names)

    @property
    def is_matrix(self) -> bool:
        """Return True if it has two dimensions or more."""
        return self.tensor.dim() >= 2

    @property
    def transposed(self) -> bool:
        """Return True if the output channels are the second dimension at the first use."""
        return any(use.transposed for use in self.uses)

    @property
    def leading(self) -> int:
        """Return how many dimensions count the rows of the codes, one scale each; the others are a row's elements.

        One, as a rule. In a stack of matrices (the weights of experts) more, if a row keeps `least_row` elements.
        """
        if not self.uses or any(use.kind is not Kind.OTHER for use in self.uses):
            return 1
        shape = self.tensor.shape
        return next((n for n in range(len(shape) - 1, 1, -1) if math.prod(shape[n:]) >= self.least_row), 1)

    @property
    def nbytes(self) -> int:
        """Return the bytes of its elements."""
        return bytes_of(self.tensor)

    def reason_of_kind(self) -> str:
        """Return the reason why this is no weight to compute new values for (a vector, no floats, empty), or ''.

        Raises:
            WeightError: it is on the meta device, so that it has no values.
        """
        tensor = self.tensor
        if tensor.dim() < 2:
            return f"{tensor.dim()}-D (bias, norm): stays as it is"
        if tensor.device.type == "meta" and not self.lazy:
            raise WeightError(f"weight {self.name!r} is on the meta device and has no values; load the model first")
        if tensor.dtype not in FLOATS:
            return f"is {dtype_name(tensor)}, not a float weight"
        layout = "" if hasattr(tensor, "device_mesh") else self.reason_of_layout()  # of a DTensor each rank's is dense
        return layout or ("" if tensor.numel() else "is empty")

    def reason_of_layout(self) -> str:
        """Return the reason why its elements are no dense array (sparse, or quantized by another library), or ''."""
        tensor, cls = self.tensor, type(self.tensor)
        if tensor.layout is not torch.strided:
            return f"is a {str(tensor.layout).removeprefix('torch.')} tensor, not a dense one"
        wrapped = cls.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not isinstance(tensor, FakeTensor)
        return f"is a {cls.__name__}, not a plain tensor" if wrapped else ""

    def reason_of_values(self) -> str:
        """Return the reason why its values are no learned numbers, or ''; only of a file nobody knows that before."""
        return ""

    def reason_frozen(self) -> str:
        """Return the reason why no training changes it, or ''."""
        return "" if self.tensor.requires_grad else "is frozen (requires_grad is False)"

    def reason_of_uses(self) -> str:
        """Return the reason why codes cannot stand in for it at all its uses, or ''."""
        for use in self.uses:
            if use.kind is None:
                place = f"{'as' if isinstance(use.place, Holder) else 'node'} {use.place.name}"
                return use.reason if len(self.uses) == 1 else f"{use.reason} ({place})"
        if len({use.transposed for use in self.uses if use.kind is not Kind.OTHER}) > 1:
            return "used in both orientations, and a scale belongs to one"
        return ""


# In a graph.

#: (operator, argument that holds the weight) -> its kind there.
OPERATORS: dict[Any, tuple[int, Kind]] = {
    aten.linear.default: (1, Kind.LINEAR),
    aten.matmul.default: (1, Kind.MATMUL),
    aten.mm.default: (1, Kind.MATMUL),
    aten.addmm.default: (2, Kind.MATMUL),
    aten.embedding.default: (0, Kind.EMBEDDING),
    aten.conv1d.default: (1, Kind.CONV),
    aten.conv1d.padding: (1, Kind.CONV),
    aten.conv2d.default: (1, Kind.CONV),
    aten.conv2d.padding: (1, Kind.CONV),
    aten.convolution.default: (1, Kind.CONV),
}

TRANSPOSES = (aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default)


def _is_matrix_transpose(node: fx.Node) -> bool:
    """Return True if a node swaps the two dimensions of a matrix and does nothing else."""
    if node.target not in TRANSPOSES:
        return False
    if node.target is aten.transpose.int:
        return {d % 2 for d in node.args[1:]} == {0, 1}  # type: ignore[operator]
    if node.target is aten.permute.default:
        return [d % 2 for d in node.args[1]] == [1, 0]  # type: ignore[operator, union-attr]
    return True


def _classify(node: fx.Node, source: fx.Node, weight: Tensor, transposed: bool) -> Use:
    if node.op == "output":
        return Use(node, None, reason="the model returns it")
    entry = OPERATORS.get(node.target)
    if entry is None:
        return Use(node, None, reason=f"used by {node.target}, which has no lowering")
    position, kind = entry
    if [a for a in node.all_input_nodes if a is source] != [source] or node.args[position] is not source:
        return Use(node, None, reason=f"used by {node.target} as something other than its weight")
    if kind is Kind.CONV:
        if transposed or (node.target is aten.convolution.default and node.args[6]):
            return Use(node, None, reason="a transposed convolution has no lowering")
        return Use(node, kind)
    if weight.dim() != 2:
        return Use(node, None, reason=f"used by {node.target} with {weight.dim()} dimensions, not 2")
    if kind is Kind.EMBEDDING and transposed:
        return Use(node, None, reason="an embedding of a transposed weight has no lowering")
    if node.target is aten.addmm.default and not _adds_a_bias(node, weight.shape[0 if transposed else 1]):
        return Use(node, None, reason="addmm with alpha, beta or more than a bias to add has no lowering")
    # linear multiplies by Wᵀ, matmul by W: one more transpose turns one into the other.
    return Use(node, kind, transposed=transposed ^ (kind is Kind.MATMUL))


def _adds_a_bias(addmm: fx.Node, channels: int) -> bool:
    """Return True if an addmm is x · W + b with one b for each output channel and no factors."""
    added = addmm.args[0]
    value = added.meta.get("val") if isinstance(added, fx.Node) else None
    return (
        isinstance(value, Tensor)
        and tuple(value.shape) == (channels,)
        and all(addmm.kwargs.get(factor, 1) == 1 for factor in ("alpha", "beta"))
    )


def _uses_of(source: fx.Node, weight: Tensor) -> list[Use]:
    """Return every use of the weight that `source` yields, seen through transposes."""
    found = []
    work = [(source, False)]
    while work:
        node, transposed = work.pop()
        for user in node.users:
            if weight.dim() == 2 and _is_matrix_transpose(user):
                work.append((user, not transposed))
            else:
                found.append(_classify(user, node, weight, transposed))
    return found


def weights_of_graph(
    reads: Iterable[fx.Node], tensor_of: Callable[[fx.Node], Tensor], names_of: Callable[[Tensor], tuple[str, ...]]
) -> list[Weight]:
    """Return the weights behind `reads`, one for each tensor.

    Args:
        reads: the nodes that yield weights: `get_attr` in a Program, placeholders in a torch.compile backend.
        tensor_of: the tensor that such a node yields.
        names_of: all names that the traced model has for a tensor; () if it is not the model's.
    """
    groups: dict[int, list[fx.Node]] = {}
    for read in reads:
        if read.users:
            groups.setdefault(id(tensor_of(read)), []).append(read)
    weights = []
    for nodes in groups.values():
        tensor = tensor_of(nodes[0])
        names = names_of(tensor) or tuple(dict.fromkeys(str(n.target) for n in nodes))
        weights.append(Weight(names, tensor, tuple(use for n in nodes for use in _uses_of(n, tensor))))
    return weights


# In a module.


@dataclass(frozen=True)
class Holder:
    """One place where a module tree holds a Parameter: `path.leaf`."""

    path: str
    module: nn.Module
    leaf: str

    @property
    def name(self) -> str:
        """Return the Parameter's full name."""
        return f"{self.path}.{self.leaf}" if self.path else self.leaf


#: Module classes whose forward has an operator that computes with the codes of `weight`.
MODULES: dict[type[nn.Module], Kind] = {
    nn.Linear: Kind.LINEAR,
    nn.Embedding: Kind.EMBEDDING,
    nn.Conv1d: Kind.CONV,
    nn.Conv2d: Kind.CONV,
}


def is_hugging_face_conv1d(module: nn.Module) -> bool:
    """Return True for transformers' Conv1D, a linear with a (K, N) weight; by name, so that nothing imports it."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def kind_of_module(module: nn.Module) -> Kind | None:
    """Return what a module, or the class that it derives from, computes with `weight`; None if there is no operator."""
    if is_hugging_face_conv1d(module):
        return Kind.MATMUL
    return next((kind for base, kind in MODULES.items() if isinstance(module, base)), None)


def _use_of_module(holder: Holder, tensor: Tensor) -> Use:
    module, name = holder.module, type(holder.module).__name__
    shape = () if is_lazy(tensor) else tuple(tensor.shape)
    kind, reason = kind_of_module(module) if holder.leaf == "weight" else None, ""
    if getattr(module, "max_norm", None) is not None:
        reason = "Embedding(max_norm=…) rescales its weight at each call"
    elif isinstance(module, torch.jit.ScriptModule):
        reason = "held by a TorchScript module, whose code reads it as it is"
    elif isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) and not hasattr(module, "right_inverse"):
        reason = f"held by {name} itself, whose children are its layers"
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        reason = f"the scale of a {name}: stays as it is"
    elif kind is None and math.prod(shape) == max(shape, default=1):
        reason = f"a vector in the shape {'×'.join(map(str, shape))}: stays as it is"
    if reason:
        return Use(holder, None, reason=reason)
    own = kind is not Kind.MATMUL and not any(type(module).forward is base.forward for base in MODULES)
    if kind is None or own:
        return Use(holder, Kind.OTHER)
    return Use(holder, kind, transposed=kind is Kind.MATMUL)


def weights_of_module(model: nn.Module) -> list[Weight]:
    """Return the Parameters of a model, one Weight for each tensor, in the order in which modules hold them.

    Args:
        model: any module; nothing is traced.
    """
    groups: dict[int, tuple[Tensor, list[Holder]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, tensor in module._parameters.items():
            if tensor is not None:
                groups.setdefault(id(tensor), (tensor, []))[1].append(Holder(path, module, leaf))
    return [
        Weight(tuple(h.name for h in holders), tensor, tuple(_use_of_module(h, tensor) for h in holders))
        for tensor, holders in groups.values()
    ]
