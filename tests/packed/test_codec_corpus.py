"""The fuzz corpus, replayed on every decoder without a sanitizer: an error or symbols, the same from both paths."""

from pathlib import Path

import numpy as np
import pytest

from ggpass import FormatError
from ggpass.packed.codec import exp_golomb
from ggpass.packed.codec.decoder import decode
from ggpass.packed.codec.native import address, library

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*"))


def test_there_is_a_corpus() -> None:
    assert len(CORPUS) >= 20


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name[:8])
def test_corpus_is_refused_or_decoded(path: Path) -> None:
    data = np.frombuffer(path.read_bytes(), np.uint8)
    with pytest.raises(FormatError):
        decode(data)
    for order in (0, 3, 32):
        try:
            numbers, used = exp_golomb.decode(data, min(100, data.size), order)
        except FormatError:
            continue
        assert exp_golomb.encode(numbers, order) == data[:used].tobytes()
    out = np.zeros(500, np.int64)
    assert library().ggp_patch(address(data), data.size, None, 7, address(out), out.size) <= 0
