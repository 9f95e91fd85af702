"""What the rate costs: a training step of a transformer with BackSlash attached, over the same step without it.

Both loops run side by side, step by step in turns, so that what else the machine does meets both alike; the table gives
medians and their ratio. `python benchmarks/backslash_cost.py --help` lists the sizes.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ggpass.passes.backslash import BackSlash

#: What is attached, by the name in the table.
KINDS: dict[str, dict[str, Any]] = {
    "strength, ν fitted": {"strength": 1e-4},
    "strength, ν = 1": {"strength": 1e-4, "shape": 1.0},
    "target": {"target_bits": 2.0, "total_steps": 2000},
}


class Transformer(nn.Module):
    """A byte-level decoder."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        layer = nn.TransformerEncoderLayer(width, max(1, width // 64), 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(width, 256)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        hidden: torch.Tensor = self.layers(self.embedding(ids), mask=mask, is_causal=True)
        return self.head(hidden)  # type: ignore[no-any-return]


def stepper(options: argparse.Namespace, settings: dict[str, Any] | None) -> Callable[[], float]:
    """A function that trains for one step and returns its seconds."""
    torch.manual_seed(0)
    model = Transformer(options.width, options.layers).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if settings is not None:
        BackSlash(**settings).attach(model, optimizer)
    ids = torch.randint(0, 256, (options.batch, options.length), device=options.device)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="of 20 steps each: every round holds one fit")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print(f"{'attached':22} {'without, ms':>12} {'with, ms':>10} {'ratio':>7} {'mean ratio':>11}")
    for name, settings in KINDS.items():
        plain, rated = stepper(options, None), stepper(options, settings)
        plain(), rated()
        times = [(plain(), rated()) for _ in range(20 * options.rounds)]
        without, with_rate = (1e3 * statistics.median(column) for column in zip(*times))
        # The median sees no fit, one step in twenty; the mean does.
        mean = sum(t[1] for t in times) / sum(t[0] for t in times)
        print(f"{name:22} {without:12.1f} {with_rate:10.1f} {with_rate / without:7.3f} {mean:11.3f}", flush=True)


if __name__ == "__main__":
    main()
