"""What a file holds of a module or of an Artifact, each tensor once: codes of lowered weights, floats, and all names.

The graph of an Artifact does not travel. `torch.export.load` falls back to pickle, so a graph from a stranger could run
code; tracing the model again is safe, takes seconds, and finds the same names. Passes may have merged or folded
weights, so the file holds the tensors of the graph, not those of the model, and fits an Artifact that was compiled in
the same way.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ggpass.errors import FormatError
from ggpass.formats import Format, Quantized, get_format
from ggpass.lowering.modules import Lowered, LoweredWeight, child_of
from ggpass.packed.dtypes import name_of
from ggpass.packed.reader import PackedFile
from ggpass.targets.artifact import Artifact

#: How the tensors of a lowered node end in the graph of an Artifact.
CODES, SCALE = "_codes", "_scale"


@dataclass(frozen=True)
class CodesOfWeight:
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


Value = Tensor | CodesOfWeight


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
        add(name, id(held), CodesOfWeight(quantized, held.format, dtype, tuple(held.shape), held.transposed))
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


def coded_names(artifact: Artifact) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (codes, scale) for each pair of tensors that a lowered node of the graph reads."""
    tensors = dict(artifact.program.graph_module.state_dict(keep_vars=True))
    found = {}
    for name, tensor in tensors.items():
        base = name.removesuffix(CODES)
        if base != name and tensor.dtype is torch.uint8 and tensor.dim() == 2 and f"{base}{SCALE}" in tensors:
            found[base] = (tensor, tensors[f"{base}{SCALE}"])
    return found


def state_of_artifact(artifact: Artifact) -> tuple[dict[str, Value], dict[str, str]]:
    """Return what a file holds of an Artifact by name, and no aliases; the codebook is the format's, not saved."""
    fmt, pairs = get_format(artifact.target.partition("-")[0]), coded_names(artifact)
    values: dict[str, Value] = {
        name: CodesOfWeight(Quantized(codes, scale), fmt, "F32", tuple(codes.shape))
        for name, (codes, scale) in pairs.items()
    }
    left_out = {f"{name}{suffix}" for name in pairs for suffix in (CODES, SCALE)} | {f"{fmt.name}_codebook"}
    for name, tensor in artifact.program.graph_module.state_dict(keep_vars=True).items():
        if name not in left_out:
            values[name] = tensor
    return values, {}


def fill_artifact(artifact: Artifact, path: str | Path, threads: int) -> None:
    """Fill an Artifact's tensors from a file that one like it was saved to, or leave it as it was.

    Raises:
        FormatError: a damaged file, or an Artifact whose tensors have other names, shapes or formats.
    """
    (values, _), pairs = state_of_artifact(artifact), coded_names(artifact)
    with PackedFile(path) as file, torch.no_grad():
        if set(values) != set(file.names):
            odd = sorted(set(values) ^ set(file.names))[0]
            raise FormatError(
                f"{path} and the artifact do not hold the same tensors ({odd}); compile the same model for the same "
                "target, inputs and passes, and load into that"
            )
        for name, value in values.items():
            stored, wanted = file.stored(name), value.format.name if isinstance(value, CodesOfWeight) else ""
            if stored.format != wanted or stored.shape != tuple(value.shape) or stored.transposed:
                raise FormatError(
                    f"{name} is {stored.format or 'float'} {list(stored.shape)} in the file and {wanted or 'float'} "
                    f"{list(value.shape)} in the artifact; compile for the target that was saved"
                )
        decoded = file.all_codes(dict.fromkeys(pairs), threads=threads)
        writes = [
            (value, file.read(name, threads=threads)) for name, value in values.items() if isinstance(value, Tensor)
        ]
        for name, (codes, scale) in pairs.items():
            if decoded[name].scale.shape != scale.shape:
                raise FormatError(
                    f"{name} has {decoded[name].scale.numel()} scales in the file and {scale.numel()} in the artifact; "
                    "compile with the scheme that was saved"
                )
            writes += [(codes, decoded[name].codes), (scale, decoded[name].scale)]
        for tensor, new in writes:
            tensor.copy_(new)
