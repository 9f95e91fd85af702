"""w ~ GGD(ν, α, 0), from a generator that the seed and the weight's name alone determine."""

import hashlib

import torch
from torch import Tensor

from ggpass.ggd.density import GGD


def generator_of(seed: int, name: str) -> torch.Generator:
    """A CPU generator seeded by SHA-256 of seed and name: module order and other weights do not matter."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw(shape: torch.Size, std: float, nu: float, seed: int, name: str) -> Tensor:
    """w ~ GGD(ν, α = σ·√(Γ(1/ν)/Γ(3/ν))): float32 on the CPU, the same on every machine whatever the weight is on."""
    return GGD.of_std(nu, std).sample(shape, generator=generator_of(seed, name))


def rms(tensor: Tensor) -> float:
    """√(mean of squares), accumulated in float64; 0 for an empty tensor."""
    if tensor.numel() == 0:
        return 0.0
    norm = torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64)
    return float(norm) / tensor.numel() ** 0.5
