"""WordNet's glosses as a data set: tell from the definition of a word which of 41 lexicographer files it is from."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

from .fetch import DataError, Package, read

WORDNET = Package(
    name="wordnet-base",
    version="1:3.0-37",
    folder="usr/share/wordnet",
    checksums={
        "data.noun": "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
        "data.verb": "adcf43e35b581e8036d8b5a52d63d9cd3d3b4870b2720d3c03c799df44777bc2",
    },
)

# lexnames(5WN): the nouns' files are numbers 3 to 28, the verbs' 29 to 43.
FIRST_FILE = 3
# fmt: off
CLASSES = (
    "noun.Tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute", "noun.body", "noun.cognition",
    "noun.communication", "noun.event", "noun.feeling", "noun.food", "noun.group", "noun.location", "noun.motive",
    "noun.object", "noun.person", "noun.phenomenon", "noun.plant", "noun.possession", "noun.process",
    "noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time",
    "verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition", "verb.consumption",
    "verb.contact", "verb.creation", "verb.emotion", "verb.motion", "verb.perception", "verb.possession",
    "verb.social", "verb.stative", "verb.weather",
)
# fmt: on

Gloss = tuple[str, int]

# The first example in quotes, with the mark before it. A quotation inside the definition follows none of these marks.
_EXAMPLES = re.compile(r'\s*[;:,]\s*"')


@dataclass(frozen=True)
class GlossParts:
    """Glosses to train on, to tune on, and to test on; no sentence is in two of them, or twice in one."""

    train: list[Gloss]
    held_out: list[Gloss]
    test: list[Gloss]


def glosses(data: Path | str | None = None) -> list[Gloss]:
    """The 95,882 (definition, class) pairs of all nouns and verbs, in the order of the files; CLASSES names a class.

    The examples in quotes that follow a definition are dropped: they use the word instead of explaining it, and only
    one gloss in five has some.

    Args:
        data: a folder that holds the files of `wordnet-base`; see `fetch.read`.

    Raises:
        DataError: the files cannot be had, or are not what they should be.
    """
    return [pair for name, content in read(WORDNET, data).items() for pair in parse(content, name)]


def parse(content: bytes, name: str) -> list[Gloss]:
    """The (definition, class) of each line of a WordNet data file; see wndb(5WN).

    Raises:
        DataError: a line is not as the format says.
    """
    found = []
    for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
        if line.startswith("  "):
            continue  # the licence
        fields, bar, gloss = line.partition(" | ")
        file_number = fields[9:11]  # after the offset of 8 digits
        sentence = _EXAMPLES.split(gloss, maxsplit=1)[0].strip()
        known = file_number.isdecimal() and 0 <= int(file_number) - FIRST_FILE < len(CLASSES)
        if not (bar and sentence and known):
            raise DataError(f"line {number} of {name} is no synset with a noun or verb class and a gloss; get it anew")
        found.append((sentence, int(file_number) - FIRST_FILE))
    return found


def sample_glosses(train: int, held_out: int, test: int, seed: int = 0, data: Path | str | None = None) -> GlossParts:
    """Disjoint random parts of the glosses, each of the size asked for.

    A sentence that stands in several glosses counts once, and not at all where their classes differ. The test part is
    drawn first, then the held-out part: both stay the same when more or fewer training glosses are asked for.

    Raises:
        ValueError: there are fewer glosses than asked for.
        DataError: as `glosses`.
    """
    return draw(glosses(data), train, held_out, test, seed)


def draw(pairs: list[Gloss], train: int, held_out: int, test: int, seed: int) -> GlossParts:
    """`sample_glosses` on any pairs."""
    classes: dict[str, set[int]] = {}
    for sentence, label in pairs:
        classes.setdefault(sentence, set()).add(label)
    clear = [(sentence, labels.pop()) for sentence, labels in classes.items() if len(labels) == 1]
    if min(train, held_out, test) < 0 or train + held_out + test > len(clear):
        raise ValueError(
            f"there are {len(clear)} different glosses; {train} to train on, {held_out} held out and {test} to test on "
            "cannot be drawn from them; ask for fewer"
        )
    random.Random(seed).shuffle(clear)
    rest = clear[test:]
    return GlossParts(rest[held_out : held_out + train], rest[:held_out], clear[:test])
