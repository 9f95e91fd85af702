"""file: a model as one safe file, every weight at its entropy; and that file back as tensors or as a model."""

from ggpass.file.load import load
from ggpass.file.save import save
from ggpass.packed.convert import Packed, PackReport
from ggpass.packed.directory import pack, unpack
from ggpass.packed.methods import Codes, Grid, Lossless, Method, parse_method
from ggpass.packed.reader import PackedFile

__all__ = [
    "Codes",
    "Grid",
    "Lossless",
    "Method",
    "PackReport",
    "Packed",
    "PackedFile",
    "load",
    "pack",
    "parse_method",
    "save",
    "unpack",
]
