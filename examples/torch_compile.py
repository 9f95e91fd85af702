"""torch.compile with the ggpass backend: codes follow the parameters, so weights loaded later are honoured.

python examples/torch_compile.py
"""

import torch
from rich.console import Console
from torch import nn

import ggpass


class Block(nn.Module):
    """A gated feed-forward block: `up` and `gate` read one input, and become one linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.gate = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """‖got − want‖ / ‖want‖."""
    return float((got - want).norm() / want.norm())


def main() -> None:
    """Compile, run at several lengths, load other weights, run again."""
    torch.manual_seed(0)
    console = Console()
    model, other = Block(256).eval(), Block(256).eval()
    fast = torch.compile(
        model,
        backend="ggpass",
        options={"target": "rf8-cpu", "inner": "eager", "report": console.print},
    )
    with torch.no_grad():
        for length in (5, 6, 7):
            x = torch.randn(2, length, 256)
            console.print(f"length {length}: error to float32 {relative_error(fast(x), model(x)):.4f}")
        model.load_state_dict(other.state_dict())
        console.print(f"other weights loaded: error to float32 {relative_error(fast(x), other(x)):.4f}")

    # The other way round keeps no float weights: lower first, then compile what came back.
    lowered = torch.compile(ggpass.compile(model, target="rf8-cpu"), backend="ggpass", options={"inner": "eager"})
    with torch.no_grad():
        console.print(f"lowered first: error to float32 {relative_error(lowered(x), other(x)):.4f}")


if __name__ == "__main__":
    main()
