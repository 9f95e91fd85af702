"""all-MiniLM-L6-v2, fine-tuned end to end to tell the class of a WordNet definition."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .glosses import CLASSES, sample_glosses
from .task import Quality, Split, Task, rows

BATCH = 16

Batch = tuple[Tensor, Tensor, Tensor]


class Classifier(nn.Module):
    """The mean of the last hidden states, and a linear layer: (ids, mask), both (B, T) -> logits (B, classes)."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(hidden.dtype)
        return self.head((hidden * weight).sum(1) / weight.sum(1))


def gloss_task(
    folder: Path,
    train: int = 2000,
    epochs: int = 2,
    data: Path | str | None = None,
    held_out: int = 1500,
    test: int = 3000,
) -> Task:
    """41 classes of definitions.

    Args:
        folder: of all-MiniLM-L6-v2: config, safetensors, tokenizer.
        train, held_out, test: how many sentences.
        epochs: of a whole training.
        data: as `fetch.read` takes it.

    Raises:
        DataError: WordNet cannot be had.
    """
    from transformers import AutoModel, AutoTokenizer

    parts = sample_glosses(train, held_out, test, data=data)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows_of = {name: _encoded(tokenizer, getattr(parts, name)) for name in ("train", "held_out", "test")}

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32)
        return Classifier(encoder, encoder.config.hidden_size, len(CLASSES))

    def epoch(generator: Generator) -> Iterator[Batch]:
        # Batches of like lengths, from pools of sixteen: half the padding, and still a random order.
        for pool in rows(train, min(train, 16 * BATCH), generator):
            ordered = sorted(pool.tolist(), key=lambda i: len(rows_of["train"][i][0]))
            starts = torch.randperm(len(ordered) // BATCH, generator=generator) * BATCH
            for start in starts.tolist():
                yield _batch([rows_of["train"][i] for i in ordered[start : start + BATCH]])

    @torch.no_grad()
    def quality(model: nn.Module, split: Split) -> Quality:
        ordered = sorted(rows_of[split], key=lambda row: len(row[0]))
        right = nll = 0.0
        for start in range(0, len(ordered), 128):
            ids, mask, labels = _batch(ordered[start : start + 128])
            logits = model(ids, mask)
            right += (logits.argmax(1) == labels).sum().item()
            nll += F.cross_entropy(logits, labels, reduction="sum").item()
        return Quality(right / len(ordered), nll / len(ordered))

    pools = train // min(train, 16 * BATCH)
    return Task(
        name="minilm-classifier",
        build=build,
        epoch=epoch,
        loss=lambda model, batch: F.cross_entropy(model(batch[0], batch[1]), batch[2]),
        quality=quality,
        epochs=epochs,
        batches=pools * (min(train, 16 * BATCH) // BATCH),
        lr=1e-4,
        weight_decay=0.01,
    )


def _encoded(tokenizer: Any, pairs: list[tuple[str, int]]) -> list[tuple[list[int], int]]:
    ids = tokenizer([sentence for sentence, _ in pairs], truncation=True, max_length=64)["input_ids"]
    return [(row, label) for row, (_, label) in zip(ids, pairs)]


def _batch(chosen: list[tuple[list[int], int]]) -> Batch:
    longest = max(len(ids) for ids, _ in chosen)
    ids = torch.zeros(len(chosen), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (tokens, _) in enumerate(chosen):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids, mask, torch.tensor([label for _, label in chosen])
