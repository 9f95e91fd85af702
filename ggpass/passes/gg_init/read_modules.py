"""The weights of a module without a graph: the operator by the class that holds each, and ξ = 1."""

from torch import Tensor, nn

from ggpass.passes.gg_init import operators
from ggpass.passes.gg_init.reading import Reading, Use


def read_modules(model: nn.Module) -> list[Reading]:
    """The float Parameters of a model, one Reading for each tensor, in the order they are met."""
    names: dict[int, list[str]] = {}
    uses: dict[int, list[Use]] = {}
    reasons: dict[int, str] = {}
    tensors: dict[int, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if not parameter.is_floating_point():
                continue
            key = id(parameter)
            tensors[key] = parameter
            names.setdefault(key, []).append(f"{path}.{leaf}" if path else leaf)
            found = _use(module, leaf, parameter)
            if isinstance(found, Use):
                uses.setdefault(key, []).append(found)
            else:
                reasons[key] = found
    return [
        Reading(tuple(sorted(names[key])), tensor, tuple(uses.get(key, ())), "" if key in uses else reasons[key])
        for key, tensor in tensors.items()
    ]


def _use(module: nn.Module, leaf: str, weight: Tensor) -> Use | str:
    """What a module does with one of its Parameters, or why that is not known."""
    shape = tuple(weight.shape)
    if weight.dim() < 2:
        return f"{weight.dim()}-D (bias, norm): stays as it is"
    if isinstance(module, nn.MultiheadAttention) and leaf.endswith("proj_weight"):
        return operators.linear(shape)
    if leaf != "weight":
        return f"{leaf} of {type(module).__name__}, whose operator only a graph shows: give example inputs"
    # Hugging Face's Conv1D is a linear with a (K, N) weight; known by name, so that nothing imports transformers.
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
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
