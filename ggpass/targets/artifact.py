"""Artifact: what a target builds from a Program; callable, and it knows its report and its sizes."""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from ggpass.errors import InputError
from ggpass.graph.program import Program
from ggpass.graph.report import Report


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's tensors, each storage counted once.

    Attributes:
        before: of the traced or given model.
        after: of the result: codes, scales, codebooks, and everything that stayed.
    """

    before: int
    after: int

    @property
    def ratio(self) -> float:
        """after / before; 1.0 for a model without tensors."""
        return self.after / self.before if self.before else 1.0


def bytes_of_module(module: torch.nn.Module) -> int:
    """Return bytes of a module's parameters and buffers; tied and shared tensors once."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def describe(value: object) -> str:
    """Return an input as messages show it: `int64 (any, 7)`, any being a size that is open."""
    if isinstance(value, Tensor):
        shape = ", ".join("any" if s is None else str(s) for s in map(_static, value.shape))
        return f"{str(value.dtype).removeprefix('torch.')} ({shape})"
    return repr(value)


class Artifact:
    """A built program: call it as the model was called, with the inputs' structure of the trace.

    Attributes:
        target: the target string it was compiled for.
        program: the lowered Program.
        report: what each pass changed and skipped.
        sizes: bytes of the tensors before and after.
        writer: writes an artifact to a path; set by `ggpass.api`, since files stand above this room.
    """

    writer: ClassVar[Callable[["Artifact", Path], None] | None] = None

    def __init__(self, program: Program, target: str, report: Report, sizes: Sizes) -> None:
        self.program = program
        self.target = target
        self.report = report
        self.sizes = sizes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program.

        Raises:
            InputError: another structure, dtype, rank or static size than was traced; the message names the input.
        """
        self._check_inputs(args, kwargs)
        with torch.no_grad():
            return self.program(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Artifact(target={self.target!r}, {self.sizes.after / 1e6:.1f} MB of {self.sizes.before / 1e6:.1f} MB)"

    def __copy__(self) -> "Artifact":
        return self._with(self.__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Artifact":
        return self._with(copy.deepcopy(self.__dict__, memo))

    def _with(self, attributes: dict[str, Any]) -> "Artifact":
        twin = object.__new__(type(self))
        twin.__dict__.update(attributes)
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise InputError(
            "an Artifact holds a graph of this process and does not pickle; move it as a file: artifact.save(path), "
            "and there ggpass.load(path, into=ggpass.compile(model, args, target=…)). What compile returns without "
            "example inputs does pickle"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """As `ggpass.save(self, path)`."""
        if self.writer is None:
            raise InputError("nothing here writes files; import ggpass, whose rooms above this one do")
        self.writer(Path(path))

    def _check_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs, spec = self.program.inputs(), self.program.in_spec
        names = spec.children()[1].context or []
        if set(names) == set(kwargs):
            kwargs = {name: kwargs[name] for name in names}
        leaves, given = pytree.tree_flatten((args, kwargs))
        if given != spec:
            raise InputError(
                f"this artifact was traced with {len(spec.children()[0].children())} positional inputs and the "
                f"keywords {sorted(names)}, and was called with {len(args)} and {sorted(kwargs)}; call it as it was "
                "traced, or compile it again with inputs like these"
            )
        for node, leaf in zip(inputs, leaves):
            expected = node.meta.get("val")
            if not isinstance(expected, FakeTensor):
                if (
                    not isinstance(expected, torch.SymInt | torch.SymFloat)
                    and leaf is not expected
                    and leaf != expected
                ):
                    raise InputError(
                        f"input {node.target!r} is {describe(leaf)}, and {expected!r} was traced into the graph; pass "
                        "that, or compile again with this input"
                    )
                continue
            if not isinstance(leaf, Tensor) or leaf.dtype != expected.dtype or not _fits(leaf, expected):
                raise InputError(
                    f"input {node.target!r} is {describe(leaf)}, and was traced as {describe(expected)}; pass a "
                    "tensor like that, or compile again with this input (dynamic_shapes= leaves sizes open)"
                )


def _fits(leaf: Tensor, expected: Tensor) -> bool:
    return leaf.dim() == expected.dim() and all(
        want is None or want == have for want, have in zip(map(_static, expected.shape), leaf.shape)
    )


def _static(size: int | torch.SymInt) -> int | None:
    """Return a size, or None if it is open; a symbol that torch.export has given one value is that value."""
    return size if isinstance(size, int) else size.node.maybe_as_int()
