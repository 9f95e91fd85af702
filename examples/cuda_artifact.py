"""Build GPU kernels on a machine without a GPU: what they take, the file that carries them, and how it runs elsewhere.

    python examples/cuda_artifact.py [sm_90]

Needs a CUDA compiler, nvcc or nvrtc (pip install nvidia-cuda-nvrtc), and no GPU. Where there is one the same file is
loaded and run there, and compared with the reference.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import ggpass
from ggpass.targets import TARGETS


class Model(nn.Module):
    """Tokens through a gated feed-forward block to logits."""

    def __init__(self, width: int = 512, tokens: int = 1000) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(tokens, width), nn.LayerNorm(width)
        self.up, self.gate = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)
        self.down, self.head = nn.Linear(4 * width, width), nn.Linear(width, tokens)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        y = self.norm(x)
        return self.head(x + self.down(nn.functional.silu(self.gate(y)) * self.up(y)))


def make_model(seed: int) -> Model:
    torch.manual_seed(seed)
    return Model().to(torch.bfloat16).eval()


def main() -> None:
    """Compile for a GPU that is elsewhere, save, and run the file where there is one."""
    console, arch = Console(), sys.argv[1] if len(sys.argv) > 1 else "sm_90"
    ids = torch.randint(0, 1000, (2, 16))
    start = time.perf_counter()
    try:
        artifact = ggpass.compile(make_model(0), args=(ids,), target="rf8-cuda", arch=arch)
    except ggpass.TargetError as error:
        if "no CUDA compiler" not in str(error):
            raise
        console.print(f"nothing can be built here: {error}", highlight=False)
        return
    console.print(artifact.report)

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for title in ("kernel", "for", "registers", "bytes spilled", "cubin"):
        table.add_column(title, justify="left" if title in ("kernel", "for") else "right", overflow="fold")
    for kernel in artifact.kernels:
        size = f"{len(kernel.image) / 1e3:.0f} kB"
        table.add_row(kernel.name, kernel.arch, str(kernel.registers), str(kernel.spills), size)
    console.print(table)
    console.print(f"compiled in {time.perf_counter() - start:.1f} s (kernels are kept on disk: again at once)")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        artifact.save(path)
        console.print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB, codes and kernels")
        reason = TARGETS["cuda"].unavailable()
        if reason:
            console.print(f"not run here: {reason}", highlight=False)
            return
        # Elsewhere: the same model is traced, whatever its weights, and filled from the file. TVM is not needed.
        there = ggpass.compile(make_model(1).to("cuda"), args=(ids.to("cuda"),), target="rf8-cuda")
        ggpass.load(path, into=there)
        reference = ggpass.compile(make_model(0), args=(ids,), target="rf8-reference")
        got, want = there(ids.to("cuda")).cpu().double(), reference(ids).double()
        console.print(f"on the GPU: relative error to the reference {float((got - want).norm() / want.norm()):.4f}")


if __name__ == "__main__":
    main()
