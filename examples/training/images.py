"""Fashion-MNIST as tensors, out of its four idx files."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .fetch import DataError, Package, read

FASHION_MNIST = Package(
    name="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    folder="usr/share/datasets/fashion-mnist",
    checksums={
        "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
        "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
        "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
        "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    },
)


@dataclass(frozen=True)
class Images:
    """Images as (N, H, W) uint8 from 0 to 255, and their classes as (N,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def fashion_mnist(data: Path | str | None = None) -> Images:
    """60,000 training and 10,000 test images of 28 × 28 pixels in 10 classes, in the order of the files.

    Args:
        data: a folder that holds the files of `dataset-fashion-mnist`; see `fetch.read`.

    Raises:
        DataError: the files cannot be had, or are not what they should be.
    """
    contents = read(FASHION_MNIST, data)
    parts = {name.removesuffix("-ubyte.gz"): idx(content, name) for name, content in contents.items()}
    return Images(
        parts["train-images-idx3"],
        parts["train-labels-idx1"].long(),
        parts["t10k-images-idx3"],
        parts["t10k-labels-idx1"].long(),
    )


def idx(content: bytes, name: str) -> Tensor:
    """The uint8 tensor in a gzip-compressed idx file: 0, 0, 8, rank, sizes as big-endian uint32, then the values.

    Raises:
        DataError: it is no such file, or is cut short or too long.
    """
    try:
        raw = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} cannot be unzipped ({error}); get the file anew") from error
    if raw[:3] != b"\x00\x00\x08" or len(raw) < 4:
        raise DataError(f"{name} begins with {raw[:3].hex()}, not with 000008 as an idx file of bytes; get it anew")
    start = 4 + 4 * raw[3]
    sizes = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    if len(raw) != start + math.prod(sizes):
        raise DataError(f"{name} holds {len(raw) - start} values, not {sizes} as its head says; get the file anew")
    return torch.from_numpy(np.frombuffer(raw, np.uint8)[start:].reshape(sizes).copy())
