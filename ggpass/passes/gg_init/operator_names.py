"""Sets of operators, by name: those that hand elements on, move them, or compute element by element."""

import torch
from torch import fx

# fmt: off
#: They leave every element in its place.
KEEPERS = frozenset((
    "alias", "clone", "contiguous", "detach", "detach_", "dropout", "dropout_", "feature_dropout",
    "alpha_dropout", "lift_fresh_copy", "to", "type_as", "_to_copy", "_assert_tensor_metadata",
))

#: They move, repeat or select elements.
REARRANGERS = frozenset((
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "transpose", "permute", "t", "movedim",
    "numpy_T", "squeeze", "unsqueeze", "expand", "expand_as", "split", "split_with_sizes", "chunk",
    "tensor_split", "unbind", "select", "slice", "narrow", "index_select", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle",
))

#: They move elements, average them, or bring them to unit power.
MOVERS = REARRANGERS | frozenset((
    "pad", "constant_pad_nd", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "mean", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_bilinear2d", "batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm",
))

#: Element by element, though torch does not tag them so.
POINTWISE = frozenset((
    "hardswish", "hardswish_", "mish_", "prelu", "log_sigmoid", "relu6_", "selu_", "celu_",
))
# fmt: on


def name_of(node: fx.Node) -> str:
    """Return `relu` for a node that calls aten.relu.default; the op, for a node that calls nothing."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.overloadpacket.__name__
    return node.op if node.op != "call_function" else getattr(node.target, "__name__", str(node.target))
