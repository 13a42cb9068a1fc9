"""Inputs for the tests: unit Gaussian vectors, and vectors shaped like those of real models."""

from __future__ import annotations

import torch
from torch import Tensor

# Measured per head on SmolLM2-135M over 1,500 tokens of a book: s_ii from 0.0 to 146 nats, lse spreads of up to 139
# nats within a head, the first tokens as outliers, norms that ramp by 60x, row entropies from 1.0 to 7.3 nats.
LARGEST_DIAGONAL = 150.0
SMALLEST_DIAGONAL = 0.04  # sqrt(150 / 0.04) = 61: the ramp of the norms
OUTLIER_TOKENS = 4
PROFILES = ("ramp", "outlier", "saturated", "flat")


def gaussian(batch: int, heads: int, tokens: int, head_dim: int, *, seed: int = 0, device="cpu") -> Tensor:
    """Float64 [batch, heads, tokens, head_dim] of unit variance."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, tokens, head_dim, dtype=torch.float64, generator=generator).to(device)


def _directions(tokens: int, head_dim: int, shared: float, generator: torch.Generator) -> Tensor:
    """Unit vectors that share one direction with weight `shared` and change slowly from token to token."""
    noise = torch.randn(tokens, head_dim, dtype=torch.float64, generator=generator)
    walk = torch.empty_like(noise)
    state = noise[0] if tokens else noise.sum(0)
    for token in range(tokens):
        state = 0.7 * state + 0.51**0.5 * noise[token]
        walk[token] = state
    common = torch.nn.functional.normalize(torch.randn(head_dim, dtype=torch.float64, generator=generator), dim=0)
    walk = torch.nn.functional.normalize(walk, dim=-1)
    return torch.nn.functional.normalize(shared**0.5 * common + (1.0 - shared) ** 0.5 * walk, dim=-1)


def _head(profile: str, tokens: int, head_dim: int, generator: torch.Generator) -> Tensor:
    """One head [tokens, head_dim]; `diagonal` is s_ii = |x_i|^2 / sqrt(D) in nats, from which the norms follow."""
    position = torch.linspace(0.0, 1.0, tokens, dtype=torch.float64)
    if profile == "ramp":
        diagonal = SMALLEST_DIAGONAL * (LARGEST_DIAGONAL / SMALLEST_DIAGONAL) ** position
        directions = _directions(tokens, head_dim, 0.3, generator)
    elif profile == "outlier":
        diagonal = 4.0 + 4.0 * torch.rand(tokens, dtype=torch.float64, generator=generator)
        diagonal[:OUTLIER_TOKENS] = LARGEST_DIAGONAL
        directions = _directions(tokens, head_dim, 0.2, generator)
    elif profile == "saturated":
        diagonal = 20.0 + 40.0 * torch.rand(tokens, dtype=torch.float64, generator=generator)
        directions = _directions(tokens, head_dim, 0.1, generator)
    else:
        diagonal = 1.0 + 9.0 * torch.rand(tokens, dtype=torch.float64, generator=generator)
        directions = _directions(tokens, head_dim, 0.9, generator)
    return directions * (diagonal * head_dim**0.5).sqrt()[:, None]


def realistic(batch: int, heads: int, tokens: int, head_dim: int, *, seed: int = 0, device="cpu") -> Tensor:
    """Float64 [batch, heads, tokens, head_dim]; head h has the profile PROFILES[h % 4]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.empty(batch, heads, tokens, head_dim, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            x[b, h] = _head(PROFILES[h % len(PROFILES)], tokens, head_dim, generator)
    return x.to(device)


def perturbed(teacher: Tensor, eps: float, *, seed: int = 1, multiplicative: bool = False) -> Tensor:
    """Teacher + eps noise, or teacher (1 + eps noise): a student at distance eps from its teacher."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(teacher.shape, dtype=torch.float64, generator=generator).to(teacher.device)
    return teacher * (1.0 + eps * noise) if multiplicative else teacher + eps * noise


GENERATORS = {"gaussian": gaussian, "realistic": realistic}
