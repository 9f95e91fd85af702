"""WeightView: the `.weight` of a quantized layer. It decodes when it is computed with, and no write into it is lost."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

from ggpass.errors import WeightError
from ggpass.lowering.operators import Operators

#: Getters and methods that ask about a tensor and not for its values.
QUESTIONS = {
    *("device", "dtype", "element_size", "dim", "get_device", "grad", "is_complex", "is_contiguous", "is_cpu"),
    *(
        "is_cuda",
        "is_floating_point",
        "is_leaf",
        "is_meta",
        "is_quantized",
        "is_sparse",
        "itemsize",
        "layout",
        "nbytes",
    ),
    *("ndim", "ndimension", "nelement", "numel", "requires_grad", "shape", "size", "stride"),
}


#: Views of a tensor: a write into one is a write into the tensor.
VIEWS = {
    *("T", "mT", "t", "transpose", "permute", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("narrow", "select", "expand", "__getitem__"),
}

#: Views that swap the two dimensions of a matrix.
TRANSPOSES = {"T", "mT", "t", "transpose"}


class QuantizedWeight:
    """w = codebook[codes] · scale: the attributes of a LoweredWeight, and the operators on them."""

    title: str
    codes: Tensor
    scale: Tensor
    codebook: Tensor
    operators: Operators
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool

    @property
    def matrix(self) -> "tuple[QuantizedWeight, bool] | None":
        """Return the codes, and whether the weight is their matrix transposed; None if it is no matrix."""
        return (self, self.transposed) if len(self.shape) == 2 else None

    def decode(self) -> Tensor:
        """Return the float weight, formed anew: `shape`, `dtype`."""
        flat = self.operators.dequantize(self.codes, self.scale, self.codebook, self.dtype)
        return flat.t().reshape(self.shape) if self.transposed else flat.view(self.shape)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x · Wᵀ + bias, W being the (N, K) matrix of the codes."""
        return self.operators.linear(x, self.codes, self.scale, self.codebook, bias)

    def embedding(self, ids: Tensor) -> Tensor:
        """Return row `ids` of the weight."""
        return self.operators.embedding(ids, self.codes, self.scale, self.codebook, self.dtype)

    def member(self, index: int | Tensor) -> "Member":
        """Return one matrix of a stack of them, as codes."""
        codes, scale = self.codes.view(self.shape)[index], self.scale
        if scale.numel() > 1:
            scale = scale.view(self.shape[0], -1)[index]
        return Member(self.title, codes, scale, self.codebook, self.operators, self.shape[1:], self.dtype)

    def view(self) -> "WeightView":
        """Return the weight as one that decodes when it is computed with."""
        return WeightView.of(self, tuple(self.shape), self.dtype, self.codes.device)


@dataclass(frozen=True)
class Member(QuantizedWeight):
    """One matrix of a stack, as the weights of one expert."""

    title: str
    codes: Tensor
    scale: Tensor
    codebook: Tensor
    operators: Operators
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False


@dataclass(frozen=True)
class Part:
    """A view of a weight.

    Attributes:
        whole, take: the weight, and what makes the view of it.
        matrix: as that of QuantizedWeight.
    """

    whole: "QuantizedWeight | Part"
    take: Callable[[Tensor], Tensor]
    matrix: tuple[QuantizedWeight, bool] | None

    @property
    def title(self) -> str:
        """Return the name of the whole weight."""
        return self.whole.title

    @property
    def codes(self) -> Tensor:
        """Return the codes of the whole weight."""
        return self.whole.codes

    def decode(self) -> Tensor:
        """Return the part of the float weight."""
        return self.take(self.whole.decode())


def refuse_write(title: str, action: str) -> NoReturn:
    """Raise WeightError: a write into a quantized layer would change a decoded copy, and be lost."""
    raise WeightError(
        f"{action} {title or 'the weight of this layer'}, which is quantized: its codes would not change. Write into "
        "the float model and compile it afterwards (merge adapters, fold, resize and tie first), or get a float model "
        "back with ggpass.dequantize(model)"
    )


class WeightView(Tensor):
    """w = codebook[codes] · scale, decoded anew when it is computed with.

    1. Shape, dtype and device are known without decoding.
    2. An operation gets the decoded weight, and gives plain tensors.
    3. An operation that would write into it raises WeightError: the decoded weight is a copy.
    """

    held: QuantizedWeight | Part
    place: Tensor

    @staticmethod
    def of(
        held: QuantizedWeight | Part, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> "WeightView":
        """Return the view of codes that stand for a weight of this shape, dtype and device."""
        # To torch's core it is on the meta device: code that takes its memory past Python fails, and cannot crash.
        view: WeightView = Tensor._make_wrapper_subclass(WeightView, shape, dtype=dtype, device=torch.device("meta"))
        view.held, view.place = held, torch.empty(0, device=device)
        return view

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name, kind = _name_of(func)
        if name in QUESTIONS and kind != "__set__":
            if name in ("device", "get_device", "is_cpu", "is_cuda", "is_meta"):
                return func(args[0].place, *args[1:], **kwargs)
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if (name in ("data", "detach") and kind != "__set__") or _freezes(name, args):
            return args[0]  # a write into it is no less lost
        if name == "data_ptr":
            return args[0].held.codes.data_ptr()  # where it lies, as long as it lives
        first = args[0] if args else next(iter(kwargs.values()), None)  # nn.init passes its tensor by name
        written = first if _writes(name, kind) else kwargs.get("out")
        for tensor in written if isinstance(written, list | tuple) else [written]:
            if isinstance(tensor, WeightView):
                refuse_write(tensor.held.title, f"{name}{'=' if kind == '__set__' else '()'} would write into")
        if isinstance(args[0], WeightView) and name in VIEWS:
            view = _view_of(args[0], func, name, args[1:], kwargs)
            if view is not None:
                return view
        if len(args) > 1 and isinstance(args[1], WeightView) and not isinstance(args[0], WeightView):
            result = _computed(func, name, args, kwargs)
            if result is not None:
                return result
        plain = pytree.tree_map(lambda x: x.held.decode() if isinstance(x, WeightView) else x, (args, kwargs))
        return func(*plain[0], **plain[1])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Decode for what comes past `__torch_function__`: operators called inside a wrapper of them."""
        plain = pytree.tree_map(lambda x: x.held.decode() if isinstance(x, WeightView) else x, (args, kwargs or {}))
        return func(*plain[0], **plain[1])

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.held.decode()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.decode().__reduce_ex__(protocol)


def _name_of(func: Callable[..., Any]) -> tuple[str, str]:
    """Return an operation's name, and `__get__` or `__set__` for an attribute: Tensor.data.__set__ → data, __set__."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return getattr(getattr(func, "__self__", None), "__name__", ""), name
    return name, ""


def _view_of(view: WeightView, func: Callable[..., Any], name: str, rest: Any, kwargs: Any) -> WeightView | None:
    """Return the view of a view, or None if a tensor among the indices makes it a copy."""
    held = view.held
    if name == "__getitem__" and isinstance(held, QuantizedWeight) and view.dim() == 3 and _is_integer(rest[0]):
        return held.member(rest[0]).view()
    if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(rest)):
        return None
    with torch._C.DisableTorchFunctionSubclass():
        like = func(torch.empty(view.shape, dtype=view.dtype, device="meta"), *rest, **kwargs)
    matrix = None
    if (
        held.matrix
        and name in TRANSPOSES
        and view.dim() == 2
        and not kwargs
        and {d % 2 for d in rest} in (set(), {0, 1})
    ):
        matrix = held.matrix[0], not held.matrix[1]
    part = Part(held, lambda whole: func(whole, *rest, **kwargs), matrix)
    return WeightView.of(part, tuple(like.shape), like.dtype, view.device)


def _is_integer(index: Any) -> bool:
    """Return True for an integer or a tensor of one, which selects and does not copy."""
    if isinstance(index, Tensor):
        return index.dim() == 0 and index.dtype in (torch.int64, torch.int32)
    return isinstance(index, int) and not isinstance(index, bool)


def _computed(func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return what an operator that works on codes gives, or None if there is none for this call."""
    matrix = args[1].held.matrix
    if matrix is None:
        return None
    coded, transposed = matrix
    if func is functional.embedding and not transposed and kwargs.get("max_norm") is None and len(args) < 4:
        return coded.embedding(args[0])
    if (name == "linear" and not transposed) or (name in ("matmul", "__matmul__", "mm") and transposed):
        return coded.linear(args[0], args[2] if len(args) > 2 else kwargs.get("bias"))
    return None


def _freezes(name: str, args: tuple[Any, ...]) -> bool:
    """Return True for `w.requires_grad = False` and `w.requires_grad_(False)`: it does not train anyway."""
    return name in ("requires_grad", "requires_grad_") and len(args) > 1 and args[1] is False


def _writes(name: str, kind: str) -> bool:
    """Return True if an operation writes into its first argument: `add_`, `__iadd__`, `__setitem__`, `w.data = …`."""
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))
    return kind == "__set__" or name.endswith("_")
