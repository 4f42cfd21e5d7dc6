"""Grouped-query attention over tensor-parallel heads, with an optional key-value cache.

B batch, S new positions, T cached positions, H query heads and K kv heads on this rank, E head dim, D width
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from src.models.config import ModelConfig
from src.models.rope import apply_rope
from src.parallel import ColumnParallelLinear, RowParallelLinear, tensor_parallel_rank, tensor_parallel_size


class LayerCache:
    """Keys and values of one layer: row b's position t lies at [b, :, t], whatever the row's neighbours hold.

    Grows in blocks with the longest row in use. A row's stale tail (padding of a longer neighbour) is never
    read: every reader masks positions beyond the row's own.
    """

    BLOCK = 64  # positions per growth step: few reallocations, little slack

    def __init__(self) -> None:
        self.keys: Tensor | None = None  # [B, K, T, E]
        self.values: Tensor | None = None

    def write(self, keys: Tensor, values: Tensor, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, K, S, E] at positions [B, S]; return both up to `length`."""
        if self.keys is None or self.values is None:
            self.keys, self.values = keys[:, :, :0], values[:, :, :0]
        if length > self.keys.shape[2]:
            more = -(-length // self.BLOCK) * self.BLOCK - self.keys.shape[2]
            self.keys, self.values = F.pad(self.keys, (0, 0, 0, more)), F.pad(self.values, (0, 0, 0, more))
        rows = torch.arange(len(keys), device=keys.device)[:, None]
        self.keys[rows, :, positions] = keys.transpose(1, 2)
        self.values[rows, :, positions] = values.transpose(1, 2)
        return self.keys[:, :, :length], self.values[:, :, :length]


class KVCache:
    """The key-value cache of a decoder, one LayerCache a layer, for a batch whose rows come and go."""

    def __init__(self, n_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(n_layers)]

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows, in this order. rows [B'] int64."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]

    def extend(self, other: "KVCache") -> None:
        """Append the rows of another cache behind ours."""
        for mine, new in zip(self.layers, other.layers, strict=True):
            longest = max(mine.keys.shape[2], new.keys.shape[2])
            mine.keys = _stack_rows(mine.keys, new.keys, longest)
            mine.values = _stack_rows(mine.values, new.values, longest)


def _stack_rows(first: Tensor, second: Tensor, length: int) -> Tensor:
    """Concatenate two [B, K, T, E] tensors by rows, both padded to `length` positions."""
    return torch.cat([F.pad(x, (0, 0, 0, length - x.shape[2])) for x in (first, second)])


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

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
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
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        visible: Visible,
        cache: LayerCache | None,
        positions: Tensor,
        length: int,
    ) -> Tensor:
        """x [B, S, D] -> [B, S, D]."""
        B, S, _ = x.shape
        queries = apply_rope(self.wq(x).view(B, S, self.n_heads, self.head_dim), rotation)  # [B, S, H, E]
        keys = apply_rope(self.wk(x).view(B, S, self.n_kv_heads, self.head_dim), rotation)  # [B, S, K, E]
        values = self.wv(x).view(B, S, self.n_kv_heads, self.head_dim)
        queries, keys, values = (heads.transpose(1, 2) for heads in (queries, keys, values))
        if cache is not None:
            keys, values = cache.write(keys, values, positions, length)
        mixed = attend(queries, keys, values, visible)
        return self.wo(mixed.transpose(1, 2).reshape(B, S, -1))
