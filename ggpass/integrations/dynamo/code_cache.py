"""Codes made at call time from weights that arrive as arguments, and kept while those weights live unchanged.

Under torch.compile one compiled graph serves every module of a class, and `load_state_dict` changes weights behind it:
codes must follow the tensors of each call. They are kept by the identity and `_version` of the tensors they were made
from, so that a call costs a look-up.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ggpass.errors import InputError
from ggpass.lowering.lowering import Allocate, Lowering
from ggpass.passes.merge_linears import concatenate


@dataclass(frozen=True)
class FloatPart:
    """A float weight to be lowered: its argument position, its name for errors, its orientation."""

    position: int
    name: str
    transposed: bool


@dataclass(frozen=True)
class CodedPart:
    """Codes and scale that arrive as arguments, from a module that was lowered before it was compiled."""

    codes: int
    scale: int


@dataclass(frozen=True)
class CodesOf:
    """(codes, scale) of one weight, or of several below each other: two arguments of the compiled graph."""

    parts: tuple[FloatPart | CodedPart, ...]
    lowering: Lowering

    @property
    def positions(self) -> tuple[int, ...]:
        """The arguments it is made from."""
        return tuple(i for p in self.parts for i in ((p.position,) if isinstance(p, FloatPart) else (p.codes, p.scale)))

    @property
    def key(self) -> tuple[object, ...]:
        """What besides the source tensors decides the result."""
        parts = tuple(p.transposed if isinstance(p, FloatPart) else None for p in self.parts)
        return ("codes", self.lowering.format.name, self.lowering.scheme, parts)

    def make(self, args: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors, from the arguments of a call."""
        pairs = []
        for part in self.parts:
            if isinstance(part, FloatPart):
                made = self.lowering.lower(part.name, args[part.position], part.transposed)
                pairs.append((made.codes, made.scale))
            else:
                pairs.append((args[part.codes], args[part.scale]))
        if len(pairs) == 1:
            return pairs[0]
        allocate: Allocate | None = self.lowering.allocate
        rows = [codes.shape[0] for codes, _ in pairs]
        codes = concatenate([c for c, _ in pairs], rows, allocate)
        scale = concatenate([s for _, s in pairs], rows)
        return tuple(t for t in (codes, scale) if t is not None)


@dataclass(frozen=True)
class BiasOf:
    """The biases of merged linears below each other: one argument of the compiled graph."""

    sources: tuple[int | None, ...]
    rows: tuple[int, ...]

    @property
    def positions(self) -> tuple[int, ...]:
        """The arguments it is made from."""
        return tuple(i for i in self.sources if i is not None)

    @property
    def key(self) -> tuple[object, ...]:
        """What besides the source tensors decides the result."""
        return ("bias", self.rows, tuple(i is None for i in self.sources))

    def make(self, args: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensor, from the arguments of a call."""
        bias = concatenate([None if i is None else args[i].detach() for i in self.sources], list(self.rows))
        return () if bias is None else (bias,)


Recipe = CodesOf | BiasOf


class CallTimeCache:
    """Recipe and source tensors → made tensors, as long as every source is the same object at the same version."""

    def __init__(self) -> None:
        self._entries: dict[
            tuple[object, ...], tuple[list[weakref.ref[Tensor]], tuple[tuple[int, int], ...], tuple[Tensor, ...]]
        ] = {}

    def get(self, key: object, recipe: Recipe, args: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors of `recipe` for these arguments, made where they are not there or out of date.

        Args:
            key: `recipe.key`, which callers keep so that a call does not build it again.

        Raises:
            InputError: a source was made under inference_mode and has no version to tell a change by.
        """
        sources = [args[i] for i in recipe.positions]
        if any(t.is_inference() for t in sources):
            raise InputError(
                "a weight was created under torch.inference_mode(), so a change of it would go unseen; load the model "
                "outside inference_mode (running it inside is fine)"
            )
        full_key = (key, *map(id, sources))
        # `weight.data = …` leaves the version as it is, and moves the data.
        versions = tuple((t._version, t.data_ptr()) for t in sources)
        entry = self._entries.get(full_key)
        if entry is not None and entry[1] == versions and all(r() is t for r, t in zip(entry[0], sources)):
            return entry[2]
        # A call under inference_mode must not leave tensors behind that autograd refuses at a later one.
        with torch.inference_mode(False), torch.no_grad():
            made = recipe.make(args)
        drop = self._dropper(full_key)
        self._entries[full_key] = ([weakref.ref(t, drop) for t in sources], versions, made)
        return made

    def _dropper(self, key: tuple[object, ...]) -> Callable[[object], None]:
        entries = weakref.ref(self)

        def drop(reference: object) -> None:
            cache = entries()
            entry = cache._entries.get(key) if cache is not None else None
            # A new tensor may have taken the dead one's id: drop the entry only if it is still the dead one's.
            if cache is not None and entry is not None and any(r is reference for r in entry[0]):
                del cache._entries[key]

        return drop

    def __len__(self) -> int:
        return len(self._entries)


#: Shared by all compiled graphs of the process: recompiling for another shape must not encode the weights again.
CACHE = CallTimeCache()
