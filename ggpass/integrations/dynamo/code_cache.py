"""Tensors derived at call time from weights that arrive as arguments, and kept while those weights live unchanged.

Under torch.compile one compiled graph serves every module of a class, and `load_state_dict` changes weights behind it:
codes must follow the tensors of each call. They are kept by the identity and `_version` of the tensors they were made
from, so that a call costs a look-up.
"""

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

from ggpass.errors import InputError

#: An argument of the compiled graph: the position of a Dynamo argument, a constant, or an output of a Derived.
Feed = Union[int, Tensor, tuple["Derived", int]]  # noqa: UP007 (Derived is defined below)

#: Of a Derived; None for one that it does not have.
Outputs = tuple[Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class Derived:
    """(outputs) = function(sources).

    Attributes:
        function: with a `key` that holds what decides the result beside the sources.
        sources: the operands; None for a missing one.
    """

    function: Callable[..., Outputs]
    sources: tuple[Feed | None, ...]

    @functools.cached_property
    def positions(self) -> tuple[int, ...]:
        """Return the Dynamo arguments that it is made from."""
        nested = ((s,) if isinstance(s, int) else s[0].positions for s in self.sources if isinstance(s, int | tuple))
        return tuple(dict.fromkeys(itertools.chain.from_iterable(nested)))

    @functools.cached_property
    def key(self) -> tuple[object, ...]:
        """Return what decides the result beside the arguments of a call, and which argument stands where."""
        place = {position: i for i, position in enumerate(self.positions)}
        parts = tuple(
            (s[0].key, s[1]) if isinstance(s, tuple) else place[s] if isinstance(s, int) else None for s in self.sources
        )
        return self.function.key, parts  # type: ignore[attr-defined]

    def make(self, args: Sequence[Any]) -> Outputs:
        """Return the outputs for the arguments of a call."""
        return self.function(*_values(self.sources, args, lambda derived: derived.make(args)))


def _values(feeds: Iterable[Feed | None], args: Sequence[Any], make: Callable[[Derived], Outputs]) -> list[Any]:
    """Return the value of each feed in a call; each Derived is made once."""
    make = functools.cache(make)
    return [make(f[0])[f[1]] if isinstance(f, tuple) else args[f] if isinstance(f, int) else f for f in feeds]


class CallTimeCache:
    """Derived and source tensors → its outputs, as long as every source is the same object at the same version."""

    def __init__(self) -> None:
        self._entries: dict[
            tuple[object, ...], tuple[list[weakref.ref[Tensor]], tuple[tuple[int, int], ...], Outputs]
        ] = {}

    def get(self, derived: Derived, args: Sequence[Any]) -> Outputs:
        """Return the outputs for these arguments, made anew if they are not there or out of date.

        Raises:
            InputError: a source was made under inference_mode and has no version to tell a change by.
        """
        sources = [args[i] for i in derived.positions]
        if any(t.is_inference() for t in sources):
            raise InputError(
                "a weight was created under torch.inference_mode(), so a change of it would go unseen; load the model "
                "outside inference_mode (running it inside is fine)"
            )
        full_key = (derived.key, *map(id, sources))
        # `weight.data = …` leaves the version as it is, and moves the data.
        versions = tuple((t._version, t.data_ptr()) for t in sources)
        entry = self._entries.get(full_key)
        if entry is not None and entry[1] == versions and all(r() is t for r, t in zip(entry[0], sources)):
            return entry[2]
        # A call under inference_mode must not leave tensors behind that autograd refuses at a later one.
        with torch.inference_mode(False), torch.no_grad():
            made = derived.make(args)

        def drop(reference: object) -> None:
            # A new tensor may have taken the dead one's id: drop the entry only if it is still the dead one's.
            entry = self._entries.get(full_key)
            if entry is not None and any(r is reference for r in entry[0]):
                del self._entries[full_key]

        self._entries[full_key] = ([weakref.ref(t, drop) for t in sources], versions, made)
        return made

    def __len__(self) -> int:
        return len(self._entries)


#: Shared by all compiled graphs of the process: recompiling for another shape must not encode the weights again.
CACHE = CallTimeCache()


@dataclass(frozen=True)
class Runner:
    """Calls the compiled graph with Dynamo's arguments, and with the tensors that are derived from them.

    Attributes:
        compiled: the graph.
        feeds: its arguments.
    """

    compiled: Callable[..., Any]
    feeds: Sequence[Feed]

    def __call__(self, *args: Any) -> Any:
        return self.compiled(*_values(self.feeds, args, lambda derived: CACHE.get(derived, args)))
