"""all-MiniLM-L6-v2 as it comes, no fine-tuning: bits, and the mean cosine of sentence embeddings to the float model."""

from __future__ import annotations

from typing import Any

import torch
from minilm import batches, embed, model_folder, sentences
from torch import Tensor, nn

from ggpass.ggd import fit_moments
from ggpass.training import entropy_bits

from .ways import CONTROL, OWN, OWN_ALL, PUBLISHED, PUBLISHED_ALL, Way, mean_over, weights_of

WAYS = (CONTROL, PUBLISHED, PUBLISHED_ALL, OWN, OWN_ALL)

#: Δ of the published figures.
STEP = 2.0**-13

Row = dict[str, Any]


def measure(way: Way, count: int = 400) -> Row:
    """One remap: ν, entropy a weight at 2^-13 and at σ/8 (each matrix with its own table), cosines there.

    Args:
        way: what is done to the weights.
        count: sentences.
    """
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(model_folder(), local_files_only=True, add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)
    inputs = batches(tokenizer, sentences(count), 32)
    exact = [embed(model, batch) for batch in inputs]
    before, after = way.apply(model)
    row = {"way": way.name, "shape": [before, after]}
    row["cosine"] = cosine(model, inputs, exact)
    row["bits"] = mean_over(model, lambda weight: entropy_bits(weight, STEP))
    row["coarse_bits"] = mean_over(model, lambda weight: entropy_bits(weight, eighth(weight)))
    with torch.no_grad():
        for weight in weights_of(model):
            step = eighth(weight)
            weight.copy_((weight / step).round_().mul_(step))
    row["coarse_cosine"] = cosine(model, inputs, exact)
    return row


def eighth(weight: Tensor) -> float:
    """σ/8 of a weight as it is now."""
    return fit_moments(weight.detach()).std / 8


def cosine(model: nn.Module, inputs: list[dict[str, Tensor]], exact: list[Tensor]) -> float:
    """Mean cosine to the float model's embeddings."""
    return float(torch.cat([(embed(model, batch) * e).sum(1) for batch, e in zip(inputs, exact)]).mean())
