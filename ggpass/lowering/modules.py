"""Modules whose weight is codes: what `compile` without example inputs makes of float ones.

A lowered module is the float module itself, of a class made from its own (`isinstance` holds): hooks, attributes and
references to it stay, and its `.weight` decodes on access. The codes live in a child, `lowered`, which tied modules
share as they shared the Parameter. So it is with any other matrix: `in_proj_weight` lives in `lowered_in_proj_weight`.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ggpass.errors import FormatError
from ggpass.formats.base import Format
from ggpass.formats.scheme import Quantized
from ggpass.graph.weights import MODULES, Kind, Weight, kind_of_module
from ggpass.lowering.decide import Lowering
from ggpass.lowering.operators import DISPATCHED, Operators
from ggpass.lowering.weight_view import QuantizedWeight, WeightView, refuse_write


class LoweredWeight(QuantizedWeight, nn.Module):
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

    def view(self) -> WeightView:
        """Return the weight as one that decodes when it is computed with; the same object while it is held."""
        view = self.__dict__.get("_view", lambda: None)()
        if view is None or view.dtype is not self.dtype or view.device != self.codes.device:
            view = super().view()
            self.__dict__["_view"] = weakref.ref(view)
        return view

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_view"}

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


def child_of(leaf: str) -> str:
    """Return the name of the child that holds the codes of an attribute: `lowered` of `weight`."""
    return "lowered" if leaf == "weight" else f"lowered_{leaf}"


class Lowered:
    """The mixin of every lowered module class; by itself it leaves the forward as it is, which reads views."""

    _made_of: tuple[type["Lowered"], type[nn.Module], tuple[str, ...]]

    def lowered_weights(self) -> dict[str, LoweredWeight]:
        """Return the codes of each attribute that is lowered."""
        return {leaf: getattr(self, child_of(leaf)) for leaf in self._made_of[2]}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_lowered, self._made_of, self.__getstate__()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._made_of[2]:
            if not isinstance(value, WeightView):
                refuse_write(getattr(self, child_of(name)).title, f"{name}= would replace")
            name, value = child_of(name), value.held
        super().__setattr__(name, value)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Refuse to train the weight; other Parameters of the module (a bias) train by their own `requires_grad`."""
        if requires_grad:
            refuse_write(next(iter(self.lowered_weights().values())).title, "requires_grad_() would train")
        return super().requires_grad_(requires_grad)  # type: ignore[misc]


def first_lowered(model: nn.Module) -> str | None:
    """Return the name of a model's first lowered module, or None."""
    return next((name for name, module in model.named_modules() if isinstance(module, Lowered)), None)


class LoweredLinear(Lowered):
    """y = x · Wᵀ + b."""

    lowered: LoweredWeight
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return self.lowered.linear(input, self.bias)


class LoweredEmbedding(Lowered):
    """y = W[ids]."""

    lowered: LoweredWeight

    def forward(self, input: Tensor) -> Tensor:
        return self.lowered.embedding(input)


class LoweredConv(Lowered):
    """y = x ∗ W + b, by the float module's own convolution on the decoded weight."""

    lowered: LoweredWeight
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        convolve: Callable[..., Tensor] = self._conv_forward  # type: ignore[attr-defined]
        return convolve(input, self.lowered.decode(), self.bias)


class LoweredRecurrent(Lowered):
    """LSTM, GRU, RNN: torch's own recurrence, on a list of weights that is made anew when it is read."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: object) -> None: ...

    def _update_flat_weights(self) -> None: ...

    def flatten_parameters(self) -> None:
        """Do nothing: the weights are decoded at each call, and lie nowhere."""


#: The mixin for a module that computes as this kind.
MIXINS: dict[Kind | None, type[Lowered]] = {
    Kind.LINEAR: LoweredLinear,
    Kind.MATMUL: LoweredLinear,
    Kind.EMBEDDING: LoweredEmbedding,
    Kind.CONV: LoweredConv,
}


_classes: dict[tuple[type, type, tuple[str, ...]], type[nn.Module]] = {}


def _lowered_class(mixin: type[Lowered], base: type[nn.Module], leaves: tuple[str, ...]) -> type[nn.Module]:
    """Return the one class of a triple, so that equal modules stay of equal class.

    A forward of the module's own that ends in `super().forward` ends in the mixin's.
    """
    key = mixin, base, leaves
    if key not in _classes:
        root = next((r for r, kind in MODULES.items() if MIXINS[kind] is mixin and issubclass(base, r)), base)
        own = base.forward is not root.forward
        bases = (base, _lowered_class(mixin, root, leaves)) if own else (mixin, base)
        members = {"__module__": __name__, "__doc__": mixin.__doc__, "_made_of": key}
        _classes[key] = type(f"Lowered{base.__name__}", bases, {**members, **{leaf: _reader(leaf) for leaf in leaves}})
    return _classes[key]


def _reader(leaf: str) -> property:
    """Return the attribute as a WeightView: decoded when it is computed with; a write into it raises."""
    child = child_of(leaf)

    def read(module: nn.Module) -> Tensor:
        held = getattr(module, child)
        return held.decode() if torch.compiler.is_compiling() else held.view()

    return property(read)


def _new_lowered(mixin: type[Lowered], base: type[nn.Module], leaves: tuple[str, ...] = ("weight",)) -> nn.Module:
    """Return an empty module of a lowered class, for copies and pickles: they cannot find a class made at run time."""
    cls = _lowered_class(mixin, base, leaves)
    return cls.__new__(cls)


def _lower_leaf(module: nn.Module, leaf: str, held: LoweredWeight) -> None:
    """Let an attribute of a module be read from codes."""
    _, base, leaves = module._made_of if isinstance(module, Lowered) else (None, type(module), ())
    leaves = (*leaves, leaf)
    del module._parameters[leaf]
    module.__dict__.pop("_flat_weights", None)
    mixin = MIXINS.get(kind_of_module(module) if "weight" in leaves else None, Lowered)
    mixin = LoweredRecurrent if isinstance(module, nn.RNNBase) else mixin
    module.__class__ = _lowered_class(mixin, base, leaves)
    setattr(module, child_of(leaf), held)


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
        if use.place.leaf in module._parameters:  # else one module under several names, lowered under the first
            _lower_leaf(module, use.place.leaf, held)


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
            lowered, base = module.lowered_weights(), module._made_of[1]
            module.__class__ = base  # type: ignore[assignment]
            for leaf, held in lowered.items():
                if held not in parameters:
                    parameters[held] = nn.Parameter(held.decode().contiguous())
                del module._modules[child_of(leaf)]
                module.register_parameter(leaf, parameters[held])
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
        for name in ("save_pretrained", "ggpass_report", "ggpass_sizes"):
            module.__dict__.pop(name, None)
    return model
