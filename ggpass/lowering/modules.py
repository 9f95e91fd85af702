"""Modules whose weight is codes: what `compile` without example inputs makes of float ones.

A lowered module is the float module itself, of a class made from its own (`isinstance` holds): hooks, attributes and
references to it stay, and its `.weight` decodes on access. The codes live in a child, `lowered`, which tied modules
share as they shared the Parameter.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ggpass.errors import FormatError
from ggpass.formats.base import Format
from ggpass.formats.scheme import Quantized
from ggpass.graph.weights import Kind, Weight
from ggpass.lowering.decide import Lowering
from ggpass.lowering.operators import DISPATCHED, Operators
from ggpass.lowering.weight_view import WeightView, refuse_write


class LoweredWeight(nn.Module):
    """w = codebook[codes] · scale, reshaped to the weight it stands for.

    Attributes:
        codes: (N, K) uint8 buffer, canonical.
        scale: (N,) or (1,) float32 buffer; it keeps its dtype when the model is cast.
        codebook: (256,) float32 buffer, not in the state_dict: the format is part of the module.
        shape, dtype: of the float weight; `.to(dtype)` on the model changes the latter.
        transposed: whether the output channels are the weight's second dimension.
        title: all names of the weight in its model, for errors.
    """

    title: str = ""  # of modules that were pickled before it existed
    codes: Tensor
    scale: Tensor
    codebook: Tensor

    def __init__(
        self,
        quantized: Quantized,
        fmt: Format,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        transposed: bool = False,
        operators: Operators = DISPATCHED,
        title: str = "",
    ) -> None:
        super().__init__()
        self.title = title
        self.format = fmt
        self.shape = shape
        self.dtype = dtype
        self.transposed = transposed
        self.operators = operators
        self.register_buffer("codes", quantized.codes)
        self.register_buffer("scale", quantized.scale)
        self.register_buffer("codebook", fmt.codebook.to(quantized.codes.device), persistent=False)
        # In the state_dict, so that codes of one format are never read as another's.
        self.register_buffer("format_name", torch.tensor(list(fmt.name.encode()), dtype=torch.uint8))

    def decode(self) -> Tensor:
        """The float weight, formed anew: `shape`, `dtype`."""
        flat = self.operators.dequantize(self.codes, self.scale, self.codebook, self.dtype)
        return flat.t().reshape(self.shape) if self.transposed else flat.view(self.shape)

    def view(self) -> WeightView:
        """Return the weight as one that decodes when it is computed with; the same object while it is held."""
        view = self.__dict__.get("_view", lambda: None)()
        if view is None or view.dtype is not self.dtype or view.device != self.codes.device:
            view = WeightView.of(self, tuple(self.shape), self.dtype, self.codes.device)
            self.__dict__["_view"] = weakref.ref(view)
        return view

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_view"}

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x · Wᵀ + bias, W being the (N, K) matrix of the codes."""
        return self.operators.linear(x, self.codes, self.scale, self.codebook, bias)

    def embedding(self, ids: Tensor) -> Tensor:
        """Row `ids` of the weight."""
        return self.operators.embedding(ids, self.codes, self.scale, self.codebook, self.dtype)

    def extra_repr(self) -> str:
        return f"{self.format.name}, {tuple(self.shape)}, stands for {str(self.dtype).removeprefix('torch.')}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoweredWeight":
        # .half(), .bfloat16() and .to(dtype) are about the weight that the codes stand for: they change the dtype it
        # decodes to. Scale and codebook follow the device only; in fewer bits they would change the weight.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype is not scale.dtype:
            self.scale = scale.to(self.scale.device)
        self._restore_codebook()
        return self

    def _restore_codebook(self) -> None:
        # A constant of the format: whatever was done to the module's tensors (to_empty, a cast, assign=True on the meta
        # device), it is the format's.
        self.codebook = self.format.codebook.to(self.codes.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        codes, scale, name = (state_dict.get(prefix + key) for key in ("codes", "scale", "format_name"))
        if isinstance(name, Tensor) and bytes(name.tolist()).decode("ascii", "replace") != self.format.name:
            stored = bytes(name.tolist()).decode("ascii", "replace")
            raise FormatError(
                f"{prefix}codes are {stored}, and this model was compiled for {self.format.name}; compile the float "
                f"model for {stored} and load them into that"
            )
        if isinstance(codes, Tensor):
            if codes.dtype is not torch.uint8:
                raise FormatError(f"{prefix}codes are {codes.dtype}, and codes are uint8; save the state_dict again")
            # Codes from outside may hold aliases that kernels need not know, or codes that mean no number.
            state_dict = {**state_dict, f"{prefix}codes": self.format.canonicalize(codes)}
        if isinstance(scale, Tensor) and not torch.isfinite(scale).all():
            raise FormatError(f"{prefix}scale holds NaN or infinity; the state_dict is damaged")
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._restore_codebook()


class Lowered:
    """The mixin of every lowered module class."""

    lowered: LoweredWeight
    _made_of: tuple[type["Lowered"], type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_lowered, self._made_of, self.__dict__

    @property
    def weight(self) -> Tensor:
        """Return the float weight as a WeightView: decoded when it is computed with; a write into it raises."""
        return self.lowered.decode() if torch.compiler.is_compiling() else self.lowered.view()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            if not isinstance(value, WeightView):
                refuse_write(self.lowered.title, "weight= would replace")
            self.lowered = value.held  # type: ignore[assignment]
            return
        super().__setattr__(name, value)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Refuse to train the weight; other Parameters of the module (a bias) train by their own `requires_grad`."""
        if requires_grad:
            refuse_write(self.lowered.title, "requires_grad_() would train")
        return super().requires_grad_(requires_grad)  # type: ignore[misc]


def first_lowered(model: nn.Module) -> str | None:
    """Return the name of a model's first lowered module, or None."""
    return next((name for name, module in model.named_modules() if isinstance(module, Lowered)), None)


class LoweredLinear(Lowered):
    """y = x · Wᵀ + b."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return self.lowered.linear(input, self.bias)


class LoweredEmbedding(Lowered):
    """y = W[ids]."""

    def forward(self, input: Tensor) -> Tensor:
        return self.lowered.embedding(input)


class LoweredConv(Lowered):
    """y = x ∗ W + b, by the float module's own convolution on the decoded weight."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        convolve: Callable[..., Tensor] = self._conv_forward  # type: ignore[attr-defined]
        return convolve(input, self.lowered.decode(), self.bias)


#: The mixin for each kind of use.
MIXINS: dict[Kind, type[Lowered]] = {
    Kind.LINEAR: LoweredLinear,
    Kind.MATMUL: LoweredLinear,
    Kind.EMBEDDING: LoweredEmbedding,
    Kind.CONV: LoweredConv,
}


_classes: dict[tuple[type, type], type[nn.Module]] = {}


def _lowered_class(mixin: type[Lowered], base: type[nn.Module]) -> type[nn.Module]:
    """One class for each pair, so that equal modules stay of equal class."""
    if (mixin, base) not in _classes:
        members = {"__module__": __name__, "__doc__": mixin.__doc__, "_made_of": (mixin, base)}
        _classes[mixin, base] = type(f"Lowered{base.__name__}", (mixin, base), members)
    return _classes[mixin, base]


def _new_lowered(mixin: type[Lowered], base: type[nn.Module]) -> nn.Module:
    """An empty module of a lowered class, for copies and pickles: they cannot find a class made at run time."""
    cls = _lowered_class(mixin, base)
    return cls.__new__(cls)


def replace(model: nn.Module, weight: Weight, quantized: Quantized, lowering: Lowering) -> None:
    """w → codebook[codes] · scale in every module of a model that holds a weight; tied modules share the codes.

    The modules stay the same objects: their hooks, attributes and every reference to them stay.

    Args:
        model: changed in place; the one of `weight`, or a copy of it.
        weight: as `weights_of_module` lists it; its values are not read.
        quantized: its codes and scales.
        lowering: the format of the codes, and the operators to compute with.
    """
    shape, dtype = tuple(weight.tensor.shape), weight.tensor.dtype
    held = LoweredWeight(quantized, lowering.format, shape, dtype, weight.transposed, lowering.operators, weight.title)
    for use in weight.uses:
        module = model.get_submodule(use.place.path)
        if not isinstance(module, Lowered):  # else one module under several names, lowered under the first
            del module._parameters["weight"]
            module.__class__ = _lowered_class(MIXINS[use.kind], type(module))  # type: ignore[index]
            module.lowered = held


def dequantize(model: nn.Module) -> nn.Module:
    """w = codebook[codes] · scale as a float Parameter again, in every quantized layer of a model, in place.

    The modules stay the same objects and take their float class back; tied layers share one Parameter. Values are those
    that the codes stand for.

    Args:
        model: as `ggpass.compile` returned it without example inputs.

    Returns:
        The model. Its weights train again.
    """
    parameters: dict[LoweredWeight, nn.Parameter] = {}
    for module in list(model.modules()):
        if isinstance(module, Lowered):
            held = module.lowered
            if held not in parameters:
                parameters[held] = nn.Parameter(held.decode().contiguous())
            del module._modules["lowered"]
            float_class: type[nn.Module] = module._made_of[1]
            module.__class__ = float_class  # type: ignore[assignment]
            module.register_parameter("weight", parameters[held])
        for name in ("save_pretrained", "ggpass_report", "ggpass_sizes"):
            module.__dict__.pop(name, None)
    return model
