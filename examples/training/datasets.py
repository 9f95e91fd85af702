"""The data of the training examples; run as a module, it fetches all of it and says what is there.

cd examples && python -m training.datasets
"""

from __future__ import annotations

from .fetch import DataError, DataUnavailable
from .glosses import CLASSES, Gloss, GlossParts, glosses, sample_glosses
from .images import Images, fashion_mnist
from .novels import NOVELS, TextParts, austen, split_text

__all__ = [
    "CLASSES",
    "NOVELS",
    "DataError",
    "DataUnavailable",
    "Gloss",
    "GlossParts",
    "Images",
    "TextParts",
    "austen",
    "fashion_mnist",
    "glosses",
    "sample_glosses",
    "split_text",
]
