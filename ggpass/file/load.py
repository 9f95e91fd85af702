"""load: a packed file into a model; weights that are stored as codes stay codes, whatever can be is lowered."""

import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ggpass.errors import FormatError
from ggpass.file.kernels import read_kernels, take_kernels
from ggpass.file.state import buffers_beside, fill_artifact, lowered_weights, state_of
from ggpass.formats import FORMATS, Format, Quantized
from ggpass.graph.report import Report
from ggpass.graph.weights import Weight, weights_of_module
from ggpass.lowering.decide import Allocate, Lowering
from ggpass.lowering.lower_module import refuse_save_pretrained
from ggpass.lowering.modules import LoweredWeight, first_lowered
from ggpass.lowering.modules import replace as replace_weight
from ggpass.packed.codec.threads import after_fork
from ggpass.packed.reader import PackedFile
from ggpass.targets.artifact import Artifact, Sizes, bytes_of_module
from ggpass.targets.base import Target

Filled = TypeVar("Filled", nn.Module, Artifact)

#: A change of the model that cannot be refused any more.
Write = Callable[[], object]


@after_fork()
def load(
    path: str | Path,
    into: Filled | None,
    target: Target,
    fmt: Format | None = None,
    device: torch.device | None = None,
    *,
    threads: int = 0,
    kernels: bool = True,
) -> Filled:
    """Fill a model from a packed file, or leave it as it was.

    1. A weight that is stored as codes stays codes: its module becomes a lowered one, as `ggpass.compile` makes them,
       and no float copy is formed. If that cannot be, the decoded values fill the float weight.
    2. Every other tensor is decoded into the model's own, in the model's dtype.
    3. The model's tensors must all be in the file; the report names what the file holds beyond them.
    4. On the meta device every buffer gets its values, those outside the state_dict too, or the load is refused.
    5. Names, shapes, formats and checksums are checked, and codes are decoded, before the first write.
    6. GPU kernels that the file carries serve this process from then on, so that they need not be built here. They are
       machine code for the GPU: take them only from where you would take a program.

    Args:
        path: what `ggpass.save` or `ggpass pack` wrote: a file, a directory of packed shards, or its index.
        into: a model of the same architecture; its values do not matter, and it may be on the meta device. It is
            changed, and is what comes back unless it is a single layer itself. Or an Artifact, compiled like the one
            that was saved.
        target: computes with the codes.
        fmt: the format whose codes stay codes; None: the one that most weights of the file have.
        device: where the model goes afterwards; None: it stays, and goes to the CPU if it is on the meta device.
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
    brought = read_kernels(path) if kernels else ()
    if isinstance(into, Artifact):
        fill_artifact(into, path, threads)
        take_kernels(brought, into, into.report)
        return into
    before = bytes_of_module(into)
    report = into.__dict__["ggpass_report"] = _fill_module(path, into, target, fmt, threads)
    into.__dict__["ggpass_sizes"] = Sizes(before, bytes_of_module(into))
    take_kernels(brought, into, report)
    return into if device is None else into.to(device)


def _fill_module(path: str | Path, model: nn.Module, target: Target, fmt: Format | None, threads: int) -> Report:
    report = Report(f"load {Path(path).name}")
    with PackedFile(path) as file, torch.inference_mode(False), torch.no_grad():
        fill = _Fill(file, model, threads)
        writes: list[Write] = [*fill.codes(target, fmt, report), *fill.floats(report), *fill.buffers()]
        while writes:
            writes.pop()()
    return report


class _Fill:
    """Finds for each tensor of a model its place in the file, and decodes it; what it yields writes to the model."""

    def __init__(self, file: PackedFile, model: nn.Module, threads: int) -> None:
        self.file, self.model, self.threads = file, model, threads
        self.known = set(file.names)
        self.places: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for module in model.modules():
            for tensors in (module._parameters, module._buffers, module.__dict__):  # type: dict[str, Any]
                for leaf, tensor in tensors.items():
                    if isinstance(tensor, Tensor):
                        self.places.setdefault(id(tensor), []).append((tensors, leaf))
        self.as_codes: set[str] = set()

    def codes(self, target: Target, fmt: Format | None, report: Report) -> list[Write]:
        """Return what puts codes in the place of weights, or into weights that are lowered already."""
        if first_lowered(self.model) is not None:
            return self._codes_of_lowered()
        counts = Counter(stored.format for stored in self.file.manifest.tensors.values() if stored.format)
        if fmt is None:
            if not counts:
                return []
            # A model is lowered to one format; weights in a rarer one are decoded.
            fmt = FORMATS[counts.most_common(1)[0][0]]
        elif counts and fmt.name not in counts:
            raise FormatError(
                f"{self.file.path} holds codes of {', '.join(counts)} and none of {fmt.name}; load it for those"
            )
        report.notes += target.prepare(fmt)
        lowering = Lowering(fmt, operators=target.operators, allocate=target.allocate)
        chosen = self._weights_to_lower(fmt.name)
        decoded = self._decode(dict.fromkeys(chosen, lowering.allocate))
        report.changes += [lowering.change(weight) for weight in chosen.values()]
        writes: list[Write] = [functools.partial(refuse_save_pretrained, self.model)]
        for name, weight in chosen.items():
            self.as_codes.update(weight.names)
            writes.append(functools.partial(replace_weight, self.model, weight, decoded[name], lowering))
        return writes

    def _weights_to_lower(self, fmt: str) -> dict[str, Weight]:
        """Return the weights that can stay codes, by their names in the file."""
        chosen = {}
        for weight in weights_of_module(self.model):
            held = [name for name in weight.names if name in self.known and self.file.stored(name).format == fmt]
            if held and not weight.reason_of_uses():
                self._check_shape(held[0], tuple(weight.tensor.shape))
                # Packing a file cannot know of a matrix used transposed: scales must belong to the rows of this use.
                if self.file.stored(held[0]).transposed == weight.transposed:
                    chosen[held[0]] = weight
        return chosen

    def _codes_of_lowered(self) -> list[Write]:
        held = {id(weight): (name, weight) for name, weight in reversed([*lowered_weights(self.model)])}
        for name, weight in held.values():
            if name not in self.known or self.file.stored(name).format != weight.format.name:
                raise FormatError(
                    f"{name} is {weight.format.name} codes in the model and not in {self.file.path}; load into a float "
                    "model"
                )
            self._check_shape(name, tuple(weight.shape))
            stored = self.file.stored(name)
            if (stored.transposed, stored.rows) != (weight.transposed, weight.codes.shape[0]):
                raise FormatError(
                    f"the scales of {name} belong to other rows in the file than in the model; load into a float model"
                )
        decoded = self._decode(dict.fromkeys((name for name, _ in held.values()), None))
        self.as_codes.update(name for name, _ in lowered_weights(self.model))
        return [functools.partial(_set_codes, weight, decoded[name]) for name, weight in held.values()]

    def _decode(self, names: dict[str, Allocate | None]) -> dict[str, Quantized]:
        """Decode codes into memory that a target likes; chunks of many weights together keep the threads busy."""
        room = {}
        for name, allocate in names.items():
            stored = self.file.stored(name)
            shape = (stored.rows, math.prod(stored.shape) // max(1, stored.rows))
            room[name] = allocate(shape, torch.uint8) if allocate else None
        return self.file.all_codes(room, threads=self.threads)

    def floats(self, report: Report) -> Iterator[Write]:
        """Yield what fills every tensor of the state that does not become codes.

        Raises:
            FormatError: the file lacks one, or holds another shape.
        """
        values, aliases = state_of(self.model)
        names = {name: [name] for name in values}
        for alias, name in aliases.items():
            names[name].append(alias)
        missing = [name for name, all_names in names.items() if not self.known.intersection(all_names)]
        if missing:
            raise FormatError(
                f"{self.file.path} lacks {len(missing)} of the model's {len(values)} tensors "
                f"({', '.join(missing[:3])}, …); its own are named like {', '.join(self.file.names[:3])}: load it into "
                "a model of the same architecture"
            )
        surplus = sorted(set(self.file.state_names) - set(values) - set(aliases))
        if surplus:
            report.notes.append(f"the file also holds {', '.join(surplus)}, which the model has no place for")
        for name, value in values.items():
            if isinstance(value, Tensor) and name not in self.as_codes:
                yield self._write(next(n for n in names[name] if n in self.known), value)

    def buffers(self) -> Iterator[Write]:
        """Yield what fills the buffers outside the state_dict that are on the meta device.

        Raises:
            FormatError: the file does not hold one; the message names all.
        """
        empty, filled = [], set()
        for name, tensor in buffers_beside(self.model):
            if tensor.device.type == "meta" and name in self.known:
                yield self._write(name, tensor)
                filled.add(id(tensor))
            elif tensor.device.type == "meta":
                empty.append(name)
        for path, module in self.model.named_modules():
            # weight_norm, spectral_norm and prune compute theirs ahead of each forward.
            hooks = module._forward_pre_hooks.values()
            known = {getattr(hook, "name", getattr(hook, "_tensor_name", "")) for hook in hooks}
            for leaf, value in module.__dict__.items():
                if leaf in known or not isinstance(value, Tensor):
                    continue
                if value.device.type == "meta" and id(value) not in filled:
                    empty.append(f"{path}.{leaf}" if path else leaf)
        if empty:
            raise FormatError(
                f"{', '.join(empty)}: on the meta device, and {self.file.path} does not hold their values, which a "
                "model computes when it is built; build it with its buffers (accelerate.init_empty_weights() does)"
            )

    def _write(self, name: str, tensor: Tensor) -> Write:
        """Return what writes a tensor of the file into one of the model, or into its place on the meta device."""
        self._check_shape(name, tuple(tensor.shape))
        if tensor.device.type != "meta" and self.file.stored(name).kind == "plain":
            self.file.payload(name)  # checks its checksum; a copy of all floats is not kept in memory
            return lambda: tensor.copy_(self.file.read(name))
        value = self.file.read(name, threads=self.threads).to(tensor.dtype)
        if tensor.device.type != "meta":
            return lambda: tensor.copy_(value)
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=tensor.requires_grad)
        return lambda: [tensors.update({leaf: value}) for tensors, leaf in self.places[id(tensor)]]

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        stored = self.file.stored(name).shape
        if stored != shape:
            raise FormatError(
                f"{name} is {list(stored)} in the file and {list(shape)} in the model; load it into a model of the "
                "same configuration"
            )


def _set_codes(held: LoweredWeight, quantized: Quantized) -> None:
    if held.codes.device.type == "meta":
        fresh = LoweredWeight(quantized, held.format, held.shape, held.dtype, held.transposed, held.operators)
        held._buffers.update(fresh._buffers)
    else:
        held.codes.copy_(quantized.codes)
        held.scale = quantized.scale.to(held.scale.device)
