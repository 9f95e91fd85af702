"""Jane Austen's six novels as one text, and its parts for training, tuning and testing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .fetch import DataError, Package, read
from .r_objects import lazy_data

JANEAUSTENR = Package(
    name="r-cran-janeaustenr",
    version="1.0.0-1",
    folder="usr/lib/R/site-library/janeaustenr/data",
    checksums={
        "Rdata.rdx": "cab8cbe4ce965d3b42b35c03383bafccc0eb78151f70e4748ead45270470c22f",
        "Rdata.rdb": "8fb5198960d0da724b1562f96e4221e5c1b41ff455000280b02c55980c3d8f21",
    },
)

NOVELS = ("sensesensibility", "prideprejudice", "mansfieldpark", "emma", "northangerabbey", "persuasion")


@dataclass(frozen=True)
class TextParts:
    """Bytes to train on, to tune on, and to test on; no byte of the text is in two of them."""

    train: bytes
    held_out: bytes
    test: bytes


def austen(data: Path | str | None = None) -> bytes:
    """The novels in the order of NOVELS (that of publication), as UTF-8; every line ends with a newline.

    Args:
        data: a folder that holds the files of `r-cran-janeaustenr`; see `fetch.read`.

    Raises:
        DataError: the files cannot be had, or are not what they should be.
    """
    contents = read(JANEAUSTENR, data)
    novels = lazy_data(contents["Rdata.rdx"], contents["Rdata.rdb"], "Rdata")
    lines: list[str] = []
    for novel in NOVELS:
        found = novels.get(novel)
        if not isinstance(found, list) or not all(isinstance(line, str) for line in found):
            raise DataError(f"Rdata.rdb of {JANEAUSTENR.name} holds no lines of {novel}; get the file anew")
        lines += found
    return "".join(line + "\n" for line in lines).encode()


def split_text(text: bytes, held_out: float = 0.05, test: float = 0.05, stretches: int = 6) -> TextParts:
    """Cuts `text` into `stretches` of equal length, and each of them into train, held-out and test, in this order.

    So all three parts come from the whole length of the text, and each piece is contiguous: with six stretches of the
    novels, one piece of each part from about every novel. Cuts are moved to the end of the line they fall into.

    Args:
        held_out, test: shares of the text, each more than 0, together less than 1.

    Raises:
        ValueError: the shares are no such numbers, or the text is too short to give each part a line.
    """
    if not (held_out > 0 and test > 0 and held_out + test < 1 and stretches >= 1):
        raise ValueError(
            f"cannot hold out {held_out} and test on {test} of a text in {stretches} stretches; "
            "give shares above 0 whose sum is below 1, and at least one stretch"
        )
    parts: tuple[list[bytes], ...] = ([], [], [])
    start = 0
    for stretch in range(1, stretches + 1):
        for part, left in zip(parts, (held_out + test, test, 0.0)):
            end = _line_end(text, round(len(text) * (stretch - left) / stretches))
            if end <= start:
                raise ValueError(f"{len(text)} bytes of text are too few for these parts; give more, or larger shares")
            part.append(text[start:end])
            start = end
    return TextParts(*(b"".join(part) for part in parts))


def _line_end(text: bytes, position: int) -> int:
    if position >= len(text):
        return len(text)
    newline = text.find(b"\n", max(position - 1, 0))
    return len(text) if newline < 0 else newline + 1
