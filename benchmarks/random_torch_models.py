"""Torch modules made by hand for `random_models.py`: recurrences, attention, convolutions, experts, tables."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations


class Recurrent(nn.Module):
    """A language model around a recurrence."""

    def __init__(self, kind: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.inner = kind(64, 64, batch_first=True, **options)
        self.head = nn.Linear(128 if options.get("bidirectional") else options.get("proj_size", 64), 100)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(ids))[0])


class Cells(nn.Module):
    def __init__(self, cell: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cell = cell(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        state = self.cell(x[:, 0])
        for step in x.unbind(1)[1:]:
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(64, 4, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]


class Seq2Seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Transformer(64, 4, 2, 2, 96, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x)


class VisionTransformer(nn.Module):
    """As torchvision's and timm's: a convolution for patches, a class token, positions, an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 8, 8)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, 64)), nn.Parameter(torch.randn(1, 17, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.encoder(torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions)[:, 0])


class Experts(nn.Module):
    """A mixture of experts as einsum, as a loop, or as one batched product."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.router = how, nn.Parameter(torch.randn(4, 64))
        self.up, self.down = nn.Parameter(torch.randn(4, 96, 64) / 8), nn.Parameter(torch.randn(4, 64, 96) / 8)

    def forward(self, x: Tensor) -> Tensor:
        share = functional.linear(x, self.router).softmax(-1)
        if self.how == "einsum":
            each = torch.einsum("bseh,edh->bsed", torch.einsum("bsd,ehd->bseh", x, self.up).relu(), self.down)
        elif self.how == "bmm":
            flat = x.flatten(0, 1).expand(4, -1, -1)
            each = torch.bmm(torch.bmm(flat, self.up.mT).relu(), self.down.mT).transpose(0, 1).unflatten(0, x.shape[:2])
        else:
            each = torch.stack(
                [functional.linear(functional.linear(x, u).relu(), d) for u, d in zip(self.up, self.down)], 2
            )
        return (each * share.unsqueeze(-1)).sum(2)


class Standardized(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / self.weight.std((1, 2, 3), keepdim=True)
        return functional.conv2d(input, weight, self.bias, self.stride, self.padding)


class Same(nn.Conv2d):
    """A convolution that pads as TensorFlow does."""

    def forward(self, input: Tensor) -> Tensor:
        half = (self.kernel_size[0] - 1) // 2
        return functional.conv2d(functional.pad(input, [half] * 4), self.weight, self.bias, groups=self.groups)


class Product(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 8.0


class Block(nn.Module):
    """A residual block: depthwise, pointwise, batch norm, a scale for each layer."""

    def __init__(self, width: int, convolution: type[nn.Conv2d] = nn.Conv2d) -> None:
        super().__init__()
        self.depth = convolution(width, width, 3, padding=0 if convolution is Same else 1, groups=width)
        self.norm, self.up = nn.BatchNorm2d(width), nn.Conv2d(width, 2 * width, 1)
        self.down, self.gamma = nn.Conv2d(2 * width, width, 1), nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.down(functional.gelu(self.up(self.norm(self.depth(x)))))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.channels = nn.Linear(16, 16), nn.Linear(64, 64)
        self.table = nn.Parameter(torch.randn(16, 64))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table
        return x + self.channels(self.tokens(x.mT).mT)


class Spectral(nn.Module):
    """Positions by index, a bilinear form, a list and a dict of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(31, 64))
        self.list = nn.ParameterList([torch.randn(64, 64) / 8 for _ in range(2)])
        self.dict = nn.ParameterDict({"a": torch.randn(64, 64) / 8})
        self.register_buffer("index", torch.arange(16) + 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.bias[self.index]
        for matrix in (*self.list, self.dict["a"]):
            x = x @ matrix
        return x


def stem(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 64))


def ids() -> Tensor:
    return torch.randint(0, 100, (2, 16))


def tokens() -> Tensor:
    return torch.randn(2, 16, 64)


def image() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def normed(layer: Callable[[], nn.Module], norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(norm(layer()), nn.ReLU())


#: name -> what builds it, and what makes each of its inputs.
TORCH_MODELS: dict[str, tuple[Any, ...]] = {
    "torch: LSTM model": (functools.partial(Recurrent, nn.LSTM, num_layers=2), ids),
    "torch: LSTM proj": (functools.partial(Recurrent, nn.LSTM, proj_size=32), ids),
    "torch: GRU model": (functools.partial(Recurrent, nn.GRU), ids),
    "torch: GRU both ways": (functools.partial(Recurrent, nn.GRU, bidirectional=True), ids),
    "torch: RNN model": (functools.partial(Recurrent, nn.RNN), ids),
    "torch: LSTMCell": (functools.partial(Cells, nn.LSTMCell), tokens),
    "torch: GRUCell": (functools.partial(Cells, nn.GRUCell), tokens),
    "torch: attention": (Attention, tokens),
    "torch: attention kdim": (functools.partial(Attention, kdim=64, vdim=64, bias=False), tokens),
    "torch: encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 96, batch_first=True), 2),
        tokens,
    ),
    "torch: Transformer": (Seq2Seq, tokens),
    "torch: ViT": (VisionTransformer, image),
    "torch: experts einsum": (functools.partial(Experts, "einsum"), tokens),
    "torch: experts bmm": (functools.partial(Experts, "bmm"), tokens),
    "torch: experts loop": (functools.partial(Experts, "loop"), tokens),
    "torch: ConvNeXt": (lambda: stem(Block(32), Block(32)), image),
    "torch: same padding": (lambda: stem(Block(32, Same)), image),
    "torch: standardized": (lambda: stem(Standardized(32, 32, 3, padding=1), nn.ReLU()), image),
    "torch: ConvTranspose2d": (lambda: stem(nn.ConvTranspose2d(32, 32, 4, 2)), image),
    "torch: Conv3d": (
        lambda: nn.Sequential(nn.Conv3d(1, 16, 3), nn.ReLU(), nn.Conv3d(16, 16, 3)),
        lambda: torch.randn(2, 1, 8, 8, 8),
    ),
    "torch: Conv1d": (lambda: nn.Sequential(nn.Conv1d(16, 32, 5), nn.ReLU(), nn.ConvTranspose1d(32, 16, 4)), tokens),
    "torch: product": (lambda: nn.Sequential(Product(64, 96), nn.ReLU(), Product(96, 64)), tokens),
    "torch: scaled embedding": (lambda: nn.Sequential(Scaled(100, 64), nn.Linear(64, 32)), ids),
    "torch: embedding bag": (lambda: nn.Sequential(nn.EmbeddingBag(100, 64), nn.Linear(64, 32)), ids),
    "torch: mixer": (Mixer, tokens),
    "torch: tables": (Spectral, tokens),
    "torch: weight_norm": (normed(lambda: nn.Conv1d(16, 32, 5), parametrizations.weight_norm), tokens),
    "torch: weight_norm, old": (normed(lambda: nn.Linear(64, 64), nn.utils.weight_norm), tokens),
    "torch: spectral_norm": (normed(lambda: nn.Linear(64, 64), parametrizations.spectral_norm), tokens),
    "torch: orthogonal": (normed(lambda: nn.Linear(64, 64), parametrizations.orthogonal), tokens),
}
