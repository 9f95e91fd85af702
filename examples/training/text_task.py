"""A byte-level transformer on Jane Austen's novels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .novels import austen, split_text
from .task import Quality, Split, Task

CONTEXT = 64
BATCH = 32
BATCHES = 200

#: Bytes of the training part that are used, spread over all novels: little, so that a model can learn them by heart.
TRAIN_BYTES = 30_000


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); causal."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ByteLM(nn.Module):
    """Logits of the next byte, (B, T) int64 -> (B, T, 256); the head is the embedding."""

    def __init__(self, width: int = 64, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.position = nn.Parameter(torch.zeros(CONTEXT, width))
        self.scale = width**0.5
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        self.head.weight = self.embed.weight
        # Tables as large as the other weights, so that one grid suits all of them; x has variance 1 all the same.
        nn.init.normal_(self.embed.weight, std=1 / self.scale)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.scale * (self.embed(tokens) + self.position[: tokens.shape[1]])
        return self.head(self.norm(self.blocks(x)))


def build(seed: int) -> nn.Module:
    """Three layers 64 wide."""
    torch.manual_seed(seed)
    return ByteLM()


def text_task(data: Path | str | None = None) -> Task:
    """Next byte of Austen's prose; the score is −NLL in nats a byte, and equal means within 1 %.

    Raises:
        DataError: the novels cannot be had.
    """
    parts = split_text(austen(data))
    train = _pieces(_bytes(parts.train), TRAIN_BYTES)
    splits: dict[Split, Tensor] = {"held_out": _windows(parts.held_out), "test": _windows(parts.test)}

    def epoch(generator: Generator) -> Iterator[Tensor]:
        for _ in range(BATCHES):
            starts = torch.randint(len(train) - CONTEXT, (BATCH, 1), generator=generator)
            yield train[starts + torch.arange(CONTEXT + 1)]

    @torch.no_grad()
    def quality(model: nn.Module, split: Split) -> Quality:
        parts = splits[split].split(64)
        nll = sum(_loss(model, part).double().item() * len(part) for part in parts) / len(splits[split])
        return Quality(-nll, nll)

    return Task("byte-lm", build, epoch, _loss, quality, 5, BATCHES, 1e-2, 0.3, "−NLL", 0.01)


def _loss(model: nn.Module, windows: Tensor) -> Tensor:
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def _pieces(tokens: Tensor, count: int, pieces: int = 30) -> Tensor:
    """`count` tokens in equal pieces spread over a text."""
    starts = torch.linspace(0, len(tokens) - count // pieces, pieces).long()
    return torch.cat([tokens[start : start + count // pieces] for start in starts.tolist()])


def _windows(text: bytes, count: int = 512) -> Tensor:
    """`count` windows spread over a text, (count, CONTEXT + 1), none overlapping."""
    tokens = _bytes(text)
    starts = torch.linspace(0, len(tokens) - CONTEXT - 1, count).long()
    return tokens[starts[:, None] + torch.arange(CONTEXT + 1)]
