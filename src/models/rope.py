"""Rotary position embedding in Meta's interleaved layout: dimensions 2i and 2i+1 of a head form pair i."""

import torch
from torch import Tensor


def rope_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Angle per position of each pair (Su et al. 2021, section 3.2.2). -> [head_dim / 2] float32, radians."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return theta**-exponents


def rope_rotation(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every pair's angle. positions [B, S] int64 -> two [B, S, 1, head_dim / 2] float32."""
    angles = positions[..., None, None].float() * frequencies
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair of x [B, S, H, E] by its position's angle, in float32; dtype of x is kept."""
    cos, sin = rotation
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [B, S, H, E/2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)
