"""file: a model as one safe file, every weight at its entropy; and that file back as tensors or as a model."""

from ggpass.file.convert import Packed, PackReport
from ggpass.file.directory import pack, unpack
from ggpass.file.load import load
from ggpass.file.methods import Codes, Grid, Lossless, Method, parse_method
from ggpass.file.reader import PackedFile
from ggpass.file.save import save

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
