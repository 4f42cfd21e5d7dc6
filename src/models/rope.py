"""Rotary position embedding in Meta's interleaved layout: dimensions 2i and 2i+1 of a head form pair i."""

import math

import torch
from torch import Tensor

from src.models.config import ModelConfig


def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Angle per position of each pair (Su et al. 2021, section 3.2.2). -> [head_dim / 2] float32, radians."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if config.rope_type == "linear":  # position interpolation (Chen et al. 2023)
        return frequencies / config.rope_factor
    if config.rope_type == "wavelength":
        return _stretch_long_waves(frequencies, config)
    return frequencies


def _stretch_long_waves(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Divide by rope_factor what turns seldom within the original context, keep what turns often, blend between.

    [E / 2] -> [E / 2], radians. This is `apply_scaling` of Meta's reference model.
    """
    turns = config.rope_original_max_seq_len * frequencies / (2 * math.pi)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / config.rope_factor)


def rope_rotation(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every pair's angle. positions [B, S] int64 -> two [B, S, 1, head_dim / 2] float32."""
    angles = positions[..., None, None].float() * frequencies
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair of x [B, S, H, E] by its position's angle, in float32; dtype of x is kept."""
    cos, sin = rotation
    pairs = x.float().unflatten(-1, (-1, 2))  # [B, S, H, E/2, 2]
    # one pass for eight; compilers join the eight, and know no complex numbers
    if x.is_cpu and not torch.compiler.is_compiling():
        return (
            torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin)).flatten(-2).type_as(x)
        )
    even, odd = pairs.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)
