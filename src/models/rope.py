"""Rotary position embedding in Meta's interleaved layout: dimensions 2i and 2i+1 of a head form pair i.

B batch, S sequence, H heads, E head dim, R dimensions of a head that rotate
"""

import math

import torch
from torch import Tensor

from src.models.config import ModelConfig

Rotation = tuple[Tensor, Tensor]  # cos and sin of every pair's angle, [B, S, 1, R / 2] float32 each


def layer_rotations(config: ModelConfig, positions: Tensor) -> list[Rotation | None]:
    """How each layer rotates queries and keys at these positions [B, S] int64; None: it does not."""
    device = positions.device
    rotation = rope_rotation(positions, rope_frequencies(config, device), attention_factor(config))
    windowed = rotation
    if config.window_rope_theta:
        windowed = rope_rotation(positions, _plain_frequencies(config, config.window_rope_theta, device))
    return [None if layer in config.nope_layers else windowed if config.window_of(layer) else rotation
            for layer in range(config.n_layers)]


def _plain_frequencies(config: ModelConfig, theta: float, device: torch.device) -> Tensor:
    """Angle per position of each pair, unstretched (Su et al. 2021, section 3.2.2). -> [R / 2] float32, radians."""
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=device) / config.rotary_dim
    return theta**-exponents


def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Angle per position of each pair of layers without a base of their own. -> [R / 2] float32, radians."""
    frequencies = _plain_frequencies(config, config.rope_theta, device)
    if config.rope_type == "linear":  # position interpolation (Chen et al. 2023)
        return frequencies / config.rope_factor
    if config.rope_type == "wavelength":
        return _stretch_long_waves(frequencies, config)
    if config.rope_type == "yarn":
        return _stretch_by_pair(frequencies, config)
    if config.rope_type == "longrope":  # Ding et al. 2024
        return frequencies / torch.tensor(config.rope_short_factors, device=device)
    return frequencies


def attention_factor(config: ModelConfig) -> float:
    """What rotated queries and keys are multiplied by: stated, or as YaRN (section 3.4) or LongRoPE have it."""
    if config.rope_attention_factor or config.rope_type not in ("yarn", "longrope"):
        return config.rope_attention_factor or 1.0
    growth = math.log(max(config.rope_factor, 1.0))
    if config.rope_type == "yarn":
        return 0.1 * growth + 1.0
    return math.sqrt(1 + growth / math.log(config.rope_original_max_seq_len))


def _stretch_long_waves(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Divide by rope_factor what turns seldom within the original context, keep what turns often, blend between.

    [R / 2] -> [R / 2], radians. This is `apply_scaling` of Meta's reference model.
    """
    turns = config.rope_original_max_seq_len * frequencies / (2 * math.pi)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / config.rope_factor)


def _stretch_by_pair(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """_stretch_long_waves(), blended evenly from pair to pair (YaRN, Peng et al. 2023, section 3.2).

    [R / 2] -> [R / 2], radians. The first and the last pair are whole numbers, as in transformers.
    """

    def pair_that_turns(often: float) -> float:
        """The place of the pair that turns so often within the original context."""
        wavelength = config.rope_original_max_seq_len / often
        return config.rotary_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rope_theta))

    first = max(math.floor(pair_that_turns(config.rope_high_freq_factor)), 0)
    last = min(math.ceil(pair_that_turns(config.rope_low_freq_factor)), config.rotary_dim - 1)
    pairs = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
    stretched = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequencies * (1 - stretched + stretched / config.rope_factor)


def rope_rotation(positions: Tensor, frequencies: Tensor, factor: float = 1.0) -> Rotation:
    """cos and sin of every pair's angle, times `factor`. positions [B, S] int64 -> two [B, S, 1, R / 2] float32."""
    # in float32: at position 4,096 bfloat16 would be off by several radians
    angles = positions[..., None, None].float() * frequencies  # [B, S, 1, R / 2]
    return (angles.cos(), angles.sin()) if factor == 1 else (angles.cos() * factor, angles.sin() * factor)


def apply_rope(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Rotate the first pairs of x [B, S, H, E] by its position's angles, in float32; dtype of x is kept."""
    if rotation is None:
        return x
    cos, sin = rotation
    R = 2 * cos.shape[-1]
    if R < x.shape[-1]:
        return torch.cat((apply_rope(x[..., :R], rotation), x[..., R:]), -1)
    pairs = x.float().unflatten(-1, (-1, 2))  # [B, S, H, R / 2, 2]
    # one pass for eight; compilers join the eight, and know no complex numbers
    if x.is_cpu and not torch.compiler.is_compiling():
        return (torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin)).flatten(-2).type_as(x))
    even, odd = pairs.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)
