"""state_of: what a file holds of a model, each tensor once: codes of lowered weights, floats, and all names of both."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ggpass.errors import FormatError
from ggpass.formats import Format, Quantized
from ggpass.lowering.modules import Lowered, LoweredWeight, child_of
from ggpass.packed.dtypes import name_of


@dataclass(frozen=True)
class CodedWeight:
    """A weight that is saved as codes.

    Attributes:
        quantized: codes and scale.
        format: of the codes.
        dtype, shape: of the weight they stand for, by safetensors' name.
        transposed: whether the codes are those of the transposed matrix.
    """

    quantized: Quantized
    format: Format
    dtype: str
    shape: tuple[int, ...]
    transposed: bool = False


Value = Tensor | CodedWeight


def lowered_weights(model: nn.Module) -> Iterator[tuple[str, LoweredWeight]]:
    """Yield each lowered weight of a model under all its names."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Lowered) and isinstance(module, nn.Module):
            for leaf, held in module.lowered_weights().items():
                yield f"{path}.{leaf}" if path else leaf, held


def state_of(model: nn.Module) -> tuple[dict[str, Value], dict[str, str]]:
    """Return what a file holds of a model by name, and the names that share another one's tensor.

    Raises:
        FormatError: a part of the state is no tensor.
    """
    values: dict[str, Value] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}

    def add(name: str, key: Any, value: Value) -> None:
        if key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            values[name] = value

    codes: set[str] = set()  # the manifest holds codes, scale and format in its own way
    for name, held in lowered_weights(model):
        path, dot, leaf = name.rpartition(".")
        codes.add(f"{path}{dot}{child_of(leaf)}")
        dtype = name_of(torch.empty(0, dtype=held.dtype))
        quantized = Quantized(held.codes, held.scale)
        add(name, id(held), CodedWeight(quantized, held.format, dtype, tuple(held.shape), held.transposed))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.rpartition(".")[0] in codes:
            continue
        if not isinstance(tensor, Tensor):
            raise FormatError(f"{name} is {type(tensor).__name__}, not a tensor, and such a file holds tensors only")
        add(name, _identity(tensor), tensor)
    return values, aliases


def buffers_beside(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that the state_dict leaves out, by their names; a module's codebook is its format's."""
    for path, module in model.named_modules():
        for leaf in () if isinstance(module, LoweredWeight) else sorted(module._non_persistent_buffers_set):
            tensor = module._buffers.get(leaf)
            if tensor is not None:
                yield f"{path}.{leaf}" if path else leaf, tensor


def _identity(tensor: Tensor) -> Any:
    if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.device.type == "meta" or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
