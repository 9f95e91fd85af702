"""The passes: each is a frozen dataclass that edits a Program and reports. A new one is a file here."""

from ggpass.passes.backslash import BackSlash
from ggpass.passes.clean_up import CleanUp
from ggpass.passes.deepshape import DeepShape
from ggpass.passes.deepshape.deepshape_pull import DeepShapePull
from ggpass.passes.fold_batch_norm import FoldBatchNorm
from ggpass.passes.gg_init import GGInit
from ggpass.passes.lower_weights import LowerWeights
from ggpass.passes.merge_linears import MergeLinears

__all__ = [
    "BackSlash",
    "CleanUp",
    "DeepShape",
    "DeepShapePull",
    "FoldBatchNorm",
    "GGInit",
    "LowerWeights",
    "MergeLinears",
]
