"""Tensors derived at call time from weights that arrive as arguments, and kept while those weights live unchanged.

Under torch.compile one compiled graph serves every module of a class, and `load_state_dict` changes weights behind it:
codes must follow the tensors of each call. They are kept by the identity and `_version` of the tensors they were made
from, so that a call costs a look-up.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

from ggpass.errors import InputError

#: An argument of the compiled graph: the position of a Dynamo argument, a constant, or an output of a Derived.
Feed = Union[int, Tensor, tuple["Derived", int]]  # noqa: UP007 (Derived is defined below)


@dataclass(frozen=True, eq=False)
class Derived:
    """(outputs) = function(sources).

    Attributes:
        function: with a `key` that holds what decides the result beside the sources.
        sources: the operands; None for a missing one.
    """

    function: Callable[..., tuple[Tensor | None, ...]]
    sources: tuple[Feed | None, ...]

    @property
    def positions(self) -> tuple[int, ...]:
        """Return the Dynamo arguments that it is made from."""
        found: list[int] = []
        for source in self.sources:
            if isinstance(source, int):
                found.append(source)
            elif isinstance(source, tuple):
                found += source[0].positions
        return tuple(dict.fromkeys(found))

    @property
    def key(self) -> tuple[object, ...]:
        """Return what decides the result beside the arguments of a call, and which argument stands where."""
        place = {position: i for i, position in enumerate(self.positions)}
        parts = tuple(
            (s[0].key, s[1]) if isinstance(s, tuple) else place[s] if isinstance(s, int) else None for s in self.sources
        )
        return self.function.key, parts  # type: ignore[attr-defined]

    def make(self, args: Sequence[Any]) -> tuple[Tensor | None, ...]:
        """Return the outputs for the arguments of a call; each inner Derived is made once."""
        made = {s[0]: None for s in self.sources if isinstance(s, tuple)}
        inner = {derived: derived.make(args) for derived in made}
        return self.function(
            *(inner[s[0]][s[1]] if isinstance(s, tuple) else args[s] if isinstance(s, int) else s for s in self.sources)
        )


class CallTimeCache:
    """Derived and source tensors → its outputs, as long as every source is the same object at the same version."""

    def __init__(self) -> None:
        self._entries: dict[
            tuple[object, ...],
            tuple[list[weakref.ref[Tensor]], tuple[tuple[int, int], ...], tuple[Tensor | None, ...]],
        ] = {}

    def get(
        self, key: object, derived: Derived, positions: Sequence[int], args: Sequence[Any]
    ) -> tuple[Tensor | None, ...]:
        """Return the outputs for these arguments, made anew if they are not there or out of date.

        Args:
            key, positions: the derived's own, which callers keep so that a call does not build them again.

        Raises:
            InputError: a source was made under inference_mode and has no version to tell a change by.
        """
        sources = [args[i] for i in positions]
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
            made = derived.make(args)
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


class Runner:
    """Calls the compiled graph with Dynamo's arguments, and with the tensors that are derived from them.

    Attributes:
        compiled: the graph.
        feeds: its arguments.
    """

    def __init__(self, compiled: Callable[..., Any], feeds: Sequence[Feed]) -> None:
        self.compiled = compiled
        self.derived = list(dict.fromkeys(feed[0] for feed in feeds if isinstance(feed, tuple)))
        self._known = [(d.key, d, d.positions) for d in self.derived]
        self.feeds = [(self.derived.index(f[0]), f[1]) if isinstance(f, tuple) else f for f in feeds]

    def __call__(self, *args: Any) -> Any:
        made = [CACHE.get(*known, args) for known in self._known]
        values = []
        for feed in self.feeds:
            if isinstance(feed, tuple):
                values.append(made[feed[0]][feed[1]])
            else:
                values.append(args[feed] if isinstance(feed, int) else feed)
        return self.compiled(*values)
