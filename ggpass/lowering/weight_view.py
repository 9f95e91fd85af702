"""WeightView: the `.weight` of a quantized layer. It decodes when it is computed with, and no write into it is lost."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ggpass.errors import WeightError

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


class Held(Protocol):
    """Codes that stand for a weight."""

    @property
    def title(self) -> str:
        """Return the weight's names in its model."""
        ...

    @property
    def codes(self) -> Tensor:
        """Return its codes."""
        ...

    def decode(self) -> Tensor:
        """Return the float weight."""
        ...


@dataclass(frozen=True)
class Part:
    """A view of a held weight."""

    whole: Held
    take: Callable[[Tensor], Tensor]

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

    held: Held

    @staticmethod
    def of(held: Held, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> "WeightView":
        """Return the view of codes that stand for a weight of this shape, dtype and device."""
        view: WeightView = Tensor._make_wrapper_subclass(WeightView, shape, dtype=dtype, device=device)
        view.held = held
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
        if name in VIEWS and isinstance(args[0], WeightView) and not _has_tensors(args[1:]):
            held, (take, rest) = args[0].held, (func, args[1:])
            with torch._C.DisableTorchFunctionSubclass():
                like = take(torch.empty(args[0].shape, dtype=args[0].dtype, device="meta"), *rest, **kwargs)
            return cls.of(
                Part(held, lambda whole: take(whole, *rest, **kwargs)), tuple(like.shape), like.dtype, args[0].device
            )
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


def _has_tensors(values: Any) -> bool:
    """Return True if there is a tensor among values: indexing by one copies."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(values))


def _freezes(name: str, args: tuple[Any, ...]) -> bool:
    """Return True for `w.requires_grad = False` and `w.requires_grad_(False)`: it does not train anyway."""
    return name in ("requires_grad", "requires_grad_") and len(args) > 1 and args[1] is False


def _writes(name: str, kind: str) -> bool:
    """Return True if an operation writes into its first argument: `add_`, `__iadd__`, `__setitem__`, `w.data = …`."""
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))
    return kind == "__set__" or name.endswith("_")
