"""The weights of a module without a graph: the operator by the class that holds each, and ξ = 1."""

from torch import Tensor, nn

from ggpass.graph.weights import is_hugging_face_conv1d, weights_of_module
from ggpass.passes.gg_init import operators
from ggpass.passes.gg_init.candidate import Candidate, Use


def read_modules(model: nn.Module) -> list[Candidate]:
    """Return the float Parameters of a model, one Candidate for each tensor, in the order they are met."""
    found = []
    for weight in weights_of_module(model):
        if weight.tensor.is_floating_point():
            known = [_use(use.place.module, use.place.leaf, weight.tensor) for use in weight.uses]
            uses = tuple(use for use in known if isinstance(use, Use))
            reasons = [reason for reason in known if isinstance(reason, str)]
            found.append(Candidate(weight, uses, "" if uses else reasons[-1]))
    return found


def _use(module: nn.Module, leaf: str, weight: Tensor) -> Use | str:
    """What a module does with one of its Parameters, or why that is not known."""
    shape = tuple(weight.shape)
    if weight.dim() < 2:
        return f"{weight.dim()}-D (bias, norm): stays as it is"
    if isinstance(module, nn.MultiheadAttention) and leaf.endswith("proj_weight"):
        return operators.linear(shape)
    if leaf != "weight":
        return f"{leaf} of {type(module).__name__}, whose operator only a graph shows: give example inputs"
    if is_hugging_face_conv1d(module):
        return operators.matmul(shape, "addmm")
    if isinstance(module, nn.Linear):
        return operators.linear(shape)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        name = "embedding_bag" if isinstance(module, nn.EmbeddingBag) else "embedding"
        return operators.embedding(shape, module.padding_idx, name)
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return operators.transposed_convolution(shape, module.stride, module.groups)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return operators.convolution(shape)
    return f"held by {type(module).__name__}, whose operator only a graph shows: give example inputs"
