"""A traced Artifact's tensors in a packed file, and back into an Artifact of the same model, target and inputs.

The graph does not travel. `torch.export.load` falls back to pickle, so a graph from a stranger could run code; tracing
the model again is safe, takes seconds, and finds the same names. Passes may have merged or folded weights, so the file
holds the tensors of the graph, not those of the model, and fits an Artifact that was compiled in the same way.
"""

from pathlib import Path

import torch
from torch import Tensor

from ggpass.errors import FormatError
from ggpass.file.state import CodedWeight, Value
from ggpass.formats import Format, Quantized, get_format
from ggpass.packed.reader import PackedFile
from ggpass.targets.artifact import Artifact

CODES, SCALE = "_codes", "_scale"


def coded_names(artifact: Artifact) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (codes, scale) for each pair of tensors that a lowered node of the graph reads."""
    tensors = dict(artifact.program.graph_module.state_dict(keep_vars=True))
    found = {}
    for name, tensor in tensors.items():
        base = name.removesuffix(CODES)
        if base != name and tensor.dtype is torch.uint8 and tensor.dim() == 2 and f"{base}{SCALE}" in tensors:
            found[base] = (tensor, tensors[f"{base}{SCALE}"])
    return found


def format_of(artifact: Artifact) -> Format:
    """The format that its target string names."""
    return get_format(artifact.target.partition("-")[0])


def state_of_artifact(artifact: Artifact) -> tuple[dict[str, Value], dict[str, str]]:
    """Return what a file holds of an Artifact by name, and no aliases; the codebook is the format's, not saved."""
    fmt, pairs = format_of(artifact), coded_names(artifact)
    values: dict[str, Value] = {
        name: CodedWeight(Quantized(codes, scale), fmt, "F32", tuple(codes.shape))
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
            stored, wanted = file.stored(name), value.format.name if isinstance(value, CodedWeight) else ""
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
