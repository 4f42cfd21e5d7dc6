"""Grouped-query attention over tensor-parallel heads, with an optional key-value cache.

B batch, S new positions, T cached positions, H query heads and K kv heads on this rank, E head dim, D width
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from src.models.cache import Cache, Group
from src.models.config import ModelConfig
from src.models.rope import apply_rope
from src.parallel import ColumnParallelLinear, RowParallelLinear, tensor_parallel_rank, tensor_parallel_size

# What each position may attend to: None = those before it in its row, itself included; a tensor [B, 1, S, T] of
# booleans; or, for one row of samples laid end to end, the samples' lengths: those before it in its own sample.
Visible = Tensor | tuple[int, ...] | None


def attend(queries: Tensor, keys: Tensor, values: Tensor, visible: Visible) -> Tensor:
    """Scaled dot-product attention. [B, H, S, E], [B, K, T, E], [B, K, T, E] -> [B, H, S, E]."""
    grouped = queries.shape[1] != keys.shape[1]
    if not isinstance(visible, tuple):
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=visible, is_causal=visible is None, enable_gqa=grouped
        )
    if queries.is_cuda and queries.dtype in (torch.bfloat16, torch.float16):
        return _attend_in_samples(queries, keys, values, visible)
    parts = (heads.split(visible, dim=2) for heads in (queries, keys, values))
    return torch.cat([attend(*part, None) for part in zip(*parts, strict=True)], dim=2)


def _attend_in_samples(queries: Tensor, keys: Tensor, values: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """attend() within samples laid end to end, in one call of the GPU's flash kernel (half precision only)."""
    ends = torch.tensor((0, *itertools.accumulate(lengths)), dtype=torch.int32, device=queries.device)
    rows = [heads[0].transpose(0, 1) for heads in (queries, keys, values)]  # [S, H or K, E]
    grouped, longest = queries.shape[1] != keys.shape[1], max(lengths)
    mixed = varlen_attn(*rows, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=grouped)
    return mixed.transpose(0, 1)[None]


class Attention(nn.Module):
    """Multi-head attention with grouped key-value heads (Ainslie et al. 2023) and rotary positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        heads, kv_heads = config.heads_on(tensor_parallel_size(), tensor_parallel_rank())
        self.n_heads, self.n_kv_heads, self.head_dim = len(heads), len(kv_heads), config.head_dim
        queries, keys = config.rows_of(heads), config.rows_of(kv_heads)
        all_queries, all_keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        replicated = config.n_kv_heads < tensor_parallel_size()
        self.wq = ColumnParallelLinear(config.dim, all_queries, queries)
        self.wk = ColumnParallelLinear(config.dim, all_keys, keys, replicated=replicated)
        self.wv = ColumnParallelLinear(config.dim, all_keys, keys, replicated=replicated)
        self.wo = RowParallelLinear(all_queries, config.dim, queries)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], visible: Visible, cache: Cache | None
    ) -> Tensor:
        """x [B, S, D] -> [B, S, D]. A cache takes the new keys and values and says itself what is visible."""
        B, S, _ = x.shape
        queries = apply_rope(self.wq(x).view(B, S, self.n_heads, self.head_dim), rotation)  # [B, S, H, E]
        keys = apply_rope(self.wk(x).view(B, S, self.n_kv_heads, self.head_dim), rotation)  # [B, S, K, E]
        values = self.wv(x).view(B, S, self.n_kv_heads, self.head_dim)
        queries, keys, values = (heads.transpose(1, 2) for heads in (queries, keys, values))
        if cache is None:
            mixed = attend(queries, keys, values, visible)
        else:
            mixed = _attend_to_groups(queries, cache.write(self.layer, keys, values))
        return self.wo(mixed.transpose(1, 2).reshape(B, S, -1))


def _attend_to_groups(queries: Tensor, groups: list[Group]) -> Tensor:
    """attend(), each group of rows to what the cache holds of it. [B, H, S, E] -> [B, H, S, E]."""
    return torch.cat(
        [attend(queries[group.rows], group.keys, group.values, group.visible) for group in groups]
    )
