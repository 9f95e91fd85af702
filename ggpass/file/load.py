"""load: a packed file into a model; weights that are stored as codes stay codes, whatever can be is lowered."""

import os
from collections import Counter
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ggpass.errors import FormatError
from ggpass.file.artifact import fill_artifact
from ggpass.file.kernels import take_kernels
from ggpass.file.save import items_of
from ggpass.formats import Quantized
from ggpass.graph.program import owner_of
from ggpass.graph.report import Change, Report
from ggpass.graph.weights import Weight, weights_of_module
from ggpass.lowering.decide import Lowering
from ggpass.lowering.lower_module import refuse_save_pretrained
from ggpass.lowering.modules import Lowered, LoweredWeight
from ggpass.lowering.modules import replace as replace_in_module
from ggpass.packed.layout import elements
from ggpass.packed.reader import PackedFile
from ggpass.targets import REFERENCE_TARGET, TARGETS, resolve
from ggpass.targets.artifact import Artifact, Sizes, bytes_of_module

Filled = TypeVar("Filled", nn.Module, Artifact)


def load(
    path: str | Path,
    into: Filled | None = None,
    *,
    device: str | torch.device | None = None,
    threads: int = 0,
    kernels: bool = True,
) -> Filled:
    """Fill a model from a packed file.

    1. A weight that is stored as codes stays codes: its module becomes a lowered one, as `ggpass.compile` makes them,
       and no float copy is formed. Where that cannot be, the decoded values fill the float weight.
    2. Every other tensor is decoded into the model's own, in the model's dtype.
    3. The model's tensors must all be in the file; what the file holds beyond them is in the report.
    4. GPU kernels that the file carries serve this process from then on, so that they need not be built here. They are
       machine code for the GPU: take them only from where you would take a program.

    Args:
        path: what `ggpass.save` or `ggpass pack` wrote.
        into: a model of the same architecture; its values do not matter, and it may be on the meta device. It is
            changed, and is what comes back unless it is a single layer itself. Or an Artifact, compiled like the one
            that was saved.
        device: where the model goes afterwards, and so which target's operators it gets; `reference` leaves it where it
            is and computes in plain torch. If left out: where it is, and the CPU where it is on the meta device.
        threads: how many; all of the machine's if 0.
        kernels: whether to use the kernels that the file carries.

    Raises:
        FormatError: a damaged file, one that lacks a tensor of the model, or another shape; the message names it.
    """
    if into is None:
        raise FormatError(
            f"{path} holds tensors and no graph; pass a model of the same architecture: ggpass.load(path, into=model)"
        )
    threads = threads or os.cpu_count() or 1
    if isinstance(into, Artifact):
        fill_artifact(into, path, threads)
        if kernels:
            take_kernels(path, into, into.report)
        return into
    loaded = _load_module(path, into, device or _place_of(into), threads)
    if kernels:
        take_kernels(path, loaded, loaded.__dict__["ggpass_report"])
    return loaded


def _place_of(model: nn.Module) -> str | None:
    """The GPU that a model is on; None where it is elsewhere."""
    return next((str(p.device) for p in model.parameters() if p.device.type == "cuda"), None)


def _load_module(path: str | Path, into: nn.Module, device: str | torch.device | None, threads: int) -> nn.Module:
    with PackedFile(path) as file:
        report = Report(f"load {Path(path).name}")
        report.notes += _check_names(file, into)
        before = bytes_of_module(into)
        if any(isinstance(module, Lowered) for module in into.modules()):
            _fill_lowered(file, into, threads)
        elif formats := Counter(stored.format for stored in file.manifest.tensors.values() if stored.format):
            # A model is lowered to one format; weights in a rarer one are decoded.
            ((name, _),) = formats.most_common(1)
            report.changes += _replace_by_codes(file, into, _lowering(name, device), threads)
        _fill_floats(file, into, threads)
    into.__dict__["ggpass_report"] = report
    into.__dict__["ggpass_sizes"] = Sizes(before, bytes_of_module(into))
    return into if str(device) in ("None", REFERENCE_TARGET.name) else into.to(device)


def _lowering(format_name: str, device: str | torch.device | None) -> Lowering:
    kind = str(device or "cpu").partition(":")[0]
    usable = kind in TARGETS and TARGETS[kind].unavailable() is None
    fmt, target = resolve(f"{format_name}-{kind if usable else REFERENCE_TARGET.name}")
    target.prepare(fmt)
    return Lowering(fmt, operators=target.operators, allocate=target.allocate)


def _replace_by_codes(file: PackedFile, model: nn.Module, lowering: Lowering, threads: int) -> list[Change]:
    """w → codebook[codes] · scale for each weight of a model that a file holds as codes of the lowering's format."""
    chosen: dict[str, Weight] = {}
    for weight in weights_of_module(model):
        name = next((n for n in weight.names if n in file.names and file.stored(n).format == lowering.format.name), "")
        if name and not weight.reason_of_uses():
            _check_shape(name, file.stored(name).shape, weight.tensor)
            # Packing a file cannot know of a matrix used transposed: the scales must belong to the rows of this use.
            if file.stored(name).transposed == weight.transposed:
                chosen[name] = weight

    def room(name: str) -> Tensor | None:
        stored = file.stored(name)
        shape = (stored.rows, elements(stored.shape) // stored.rows)
        return lowering.allocate(shape, torch.uint8) if lowering.allocate else None

    # Chunks of many weights together keep the threads busy.
    decoded = file.all_codes({name: room(name) for name in sorted(chosen)}, threads=threads)
    changes = []
    for name, weight in chosen.items():
        changes.append(lowering.change(weight))
        replace_in_module(model, weight, decoded.pop(name), lowering)
    refuse_save_pretrained(model)
    return changes


def _check_shape(name: str, stored: tuple[int, ...], weight: Tensor) -> None:
    if stored != tuple(weight.shape):
        raise FormatError(
            f"{name} is {list(stored)} in the file and {list(weight.shape)} in the model; load it into a model of the "
            "same configuration"
        )


def _check_names(file: PackedFile, model: nn.Module) -> list[str]:
    """Raise where the file lacks a tensor of the model; notes on what the model lacks."""
    items, aliases = items_of(model)
    known = set(file.names)
    # One name of a tied tensor is enough.
    also: dict[str, list[str]] = {}
    for alias, name in aliases.items():
        also.setdefault(name, []).append(alias)
    missing = [name for name in items if not known.intersection((name, *also.get(name, ())))]
    if missing:
        raise FormatError(
            f"{file.path} lacks {len(missing)} of the model's {len(items)} tensors ({', '.join(missing[:3])}, …); its "
            f"own are named like {', '.join(file.names[:3])}: load it into a model of the same architecture"
        )
    surplus = sorted(known - set(items) - set(aliases))
    return [f"the file also holds {', '.join(surplus)}, which the model has no place for"] if surplus else []


def _fill_lowered(file: PackedFile, model: nn.Module, threads: int) -> None:
    """Fill the codes of modules that are lowered already."""
    for path, module in model.named_modules():
        if not isinstance(module, Lowered):
            continue
        name, held = f"{path}.weight" if path else "weight", module.lowered
        if name not in file.names or file.stored(name).format != held.format.name:
            raise FormatError(
                f"{name} is {held.format.name} codes in the model and not in {file.path}; load into a float model"
            )
        quantized = file.codes(name, threads=threads)
        if quantized.codes.shape != held.codes.shape:
            _check_shape(name, tuple(quantized.codes.shape), held.codes)
        _set_codes(held, quantized)


def _set_codes(held: LoweredWeight, quantized: Quantized) -> None:
    held.codes.copy_(quantized.codes)
    held.scale = quantized.scale.to(held.scale.device)


def _fill_floats(file: PackedFile, model: nn.Module, threads: int) -> None:
    """Decode every tensor that is not in a lowered module."""
    for name, tensor in list(model.state_dict(keep_vars=True).items()):
        if name not in file.names:
            continue  # codes of a lowered module, or another name of a tied tensor
        stored = file.stored(name)
        _check_shape(name, stored.shape, tensor)
        value = file.read(name, threads=threads)
        if tensor.device.type != "meta":
            with torch.no_grad():
                tensor.copy_(value)
            continue
        module, leaf = owner_of(model, name)
        value = value.to(tensor.dtype)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=tensor.requires_grad)
        else:
            module._buffers[leaf] = value
