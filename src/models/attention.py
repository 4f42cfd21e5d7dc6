"""Grouped-query attention over tensor-parallel heads, with an optional key-value cache.

B batch, S new positions, T cached positions, P positions of a prefix that all rows share, H query heads and K kv heads
on this rank, E head dim, D width
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src import context_parallel
from src.models.cache import Cache, Group
from src.models.config import ModelConfig
from src.models.layers import ColumnParallelLinear, RMSNorm, RowParallelLinear, SumGradientOverReplicas
from src.models.rope import Rotation, apply_rope
from src.parallel import (
    copy_to_tensor_parallel,
    reduce_from_tensor_parallel,
    tensor_parallel_rank,
    tensor_parallel_size,
    to_device,
)

# What lies in one row of samples laid end to end. Each entry is of samples that begin alike, (shared, rest, rest, ...)
# positions: their common beginning once, then what each of them has of its own. A sample alone is (0, positions).
Segments = tuple[tuple[int, ...], ...]


@functools.cache
def _packed_kernel() -> tuple[Callable[..., Tensor], dict[str, bool]]:
    """The GPU's kernel for samples end to end, and what it is told of grouped heads: torch before 2.12 takes them
    untold. Imported where it is used, since its module brings the whole compiler, half a second of any start."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class Packed:
    """Attention within samples laid end to end in one row: each position sees those before it in its own sample.

    A class and no tuple: compiled code would hold for the lengths in a tuple alone.
    """

    def __init__(self, segments: Segments) -> None:
        self.segments = segments
        self.longest, self.ends = 0, None
        if not any(shared for shared, *_ in segments):  # what a GPU's kernel reads, once for all layers
            samples = [length for _, *rests in segments for length in rests]
            self.longest = max(samples)
            self.ends = to_device(torch.tensor((0, *itertools.accumulate(samples)), dtype=torch.int32))


# What each position may attend to: None = those before it in its row, itself included; a tensor [B, 1, S, T] of
# booleans; or its own sample.
Mask = Tensor | Packed | None


# Half-precision rows of at most so many positions x head dim have their gradient in float32 on a CPU, where torch's
# kernel is slower in bfloat16: with 9 heads of 64 it took 3.9 ms for 128 positions, in float32 1.3. On a Xeon with AMX
# 261 to 321 positions take it 1.2 to 1.3 times as long, 383 as long, and 191 of 16 heads of 128; a length that it meets
# for the first time 8 to 12 ms more.
SHORT = 3 * 2**13
HALF = (torch.bfloat16, torch.float16)

# With fewer query heads to a key head torch's CPU kernel is faster in half precision where it takes them one by one.
# One core of a Xeon with AMX, 64 rows of 300 positions: 2 to each of 8 key heads 6.4 ms, together 9.1; 3 to each of 3
# 2.8 and 3.7; 8 to each of 8 11.3 and 9.9. In float32 together is always faster.
FEW_QUERIES = 7


class Scoring(NamedTuple):
    """How a layer makes attention scores of queries and keys."""

    scale: float
    softcap: float  # scores x become softcap * tanh(x / softcap); 0 = they stay
    window: int  # positions that each one sees, its own included; 0 = all before it


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Mask, scores: Scoring) -> Tensor:
    """Scaled dot-product attention. [B, H, S, E], [B, K, T, E], [B, K, T, E] -> [B, H, S, E]."""
    if isinstance(mask, Packed):
        if torch.compiler.is_compiling():  # a graph of the calls, which are alike for any lengths, would hold for these
            return torch.compiler.disable(_attend_in_samples)(queries, keys, values, mask, scores)
        return _attend_in_samples(queries, keys, values, mask, scores)
    if 0 < scores.window < keys.shape[2]:  # a longer one hides nothing, and without a mask kernels are faster
        mask = _in_window(_causal(queries, keys) if mask is None else mask, scores.window)
    if scores.softcap:
        return _attend_by_parts(queries, keys, values, _causal(queries, keys) if mask is None else mask, scores)
    half = queries.dtype in HALF
    short = queries.is_cpu and half and not torch.compiler.is_compiling() and 0 < keys[0, 0].numel() <= SHORT
    if short and queries.shape[2] and torch.is_grad_enabled():  # see SHORT
        return _AttendInShortRows.apply(queries, keys, values, mask, scores.scale)
    grouped = queries.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scores.scale, enable_gqa=grouped)


class _AttendInShortRows(torch.autograd.Function):
    """Attention by the kernel that torch takes without this, its gradient computed in float32."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, queries: Tensor, keys: Tensor, values: Tensor, mask: Mask,
        scale: float,
    ) -> Tensor:
        """[B, H, S, E], [B, K, T, E], [B, K, T, E], what each position may attend to -> [B, H, S, E]."""
        mask = None if mask is None else mask.to(queries.dtype).log()  # what is added to scores
        mixed, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, is_causal=mask is None, attn_mask=mask, scale=scale)
        ctx.save_for_backward(queries, keys, values, mixed, log_sums, mask)
        ctx.scale = scale
        return mixed

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """[B, H, S, E] -> those of queries, keys and values, in their type."""
        *rows, log_sums, mask = ctx.saved_tensors
        of_rows = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad.float(), *(row.float() for row in rows), log_sums, 0.0, mask is None,
            attn_mask=None if mask is None else mask.float(), scale=ctx.scale)
        return *(of_row.type_as(grad) for of_row in of_rows), None, None


def _causal(queries: Tensor, keys: Tensor) -> Tensor:
    """The last S of T positions each see those before them, themselves included. -> [1, 1, S, T] bool."""
    S, T = queries.shape[2], keys.shape[2]
    return torch.ones(1, 1, S, T, dtype=torch.bool, device=queries.device).tril(T - S)


def _in_window(mask: Tensor, window: int) -> Tensor:
    """The last `window` of the positions that each one sees, which are the first of their row. [B, 1, S, T] bool."""
    first = mask.sum(-1, keepdim=True) - window  # [B, 1, S, 1]
    return mask & (torch.arange(mask.shape[-1], device=mask.device) >= first)


def _attend_by_parts(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scores: Scoring,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """attend() in plain products: with a softcap, which no fused kernel has, or after a prefix. Scores [B, K, H / K, S,
    P + T] are held in float32; the mask has their last two dimensions."""
    grouped = queries.unflatten(1, (keys.shape[1], -1))  # [B, K, H / K, S, E]
    raw = grouped @ keys[:, :, None].transpose(-1, -2)
    if prefix:
        raw = torch.cat((torch.einsum("bkgse,kpe->bkgsp", grouped, prefix[0]), raw), -1)
    raw = scores.scale * raw.float()  # [B, K, H / K, S, P + T]
    capped = scores.softcap * torch.tanh(raw / scores.softcap) if scores.softcap else raw
    weights = capped.masked_fill(~mask[:, :, None], float("-inf")).softmax(-1).type_as(values)
    mixed = weights[..., -keys.shape[2] :] @ values[:, :, None]
    if prefix:
        mixed = mixed + torch.einsum("bkgsp,kpe->bkgse", weights[..., : prefix[1].shape[1]], prefix[1])
    return mixed.flatten(1, 2)


def _attend_after_prefix(queries: Tensor, group: Group, scores: Scoring) -> Tensor:
    """attend() to the prefix that all rows share and to what each has of its own. [B, H, S, E] -> [B, H, S, E].

    The two are mixed by the sums of their exponentials (Juravsky et al. 2024, section 3.1), so that the prefix is read
    once for all rows.
    """
    (keys, values), (B, H, S, E) = group.prefix, queries.shape
    n_seen = keys.shape[1] + group.keys.shape[2]
    windowed = 0 < scores.window < n_seen
    if not queries.is_cpu or scores.softcap or windowed:
        mask = _causal(queries, group.keys) if group.mask is None else group.mask
        mask = F.pad(mask, (keys.shape[1], 0), value=True)
        mask = _in_window(mask, scores.window) if windowed else mask
        own = queries.float(), group.keys.float(), group.values.float()
        return _attend_by_parts(*own, mask, scores, (keys.float(), values.float())).type_as(queries)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    # the queries of all rows become positions of one row: [1, K, B H S / K, E]
    together = queries.reshape(B, len(keys), -1, E).transpose(0, 1).reshape(1, len(keys), -1, E)
    first, first_sums = flash(together, keys[None], values[None], scale=scores.scale)
    first, first_sums = (x.reshape(len(keys), B, H * S // len(keys), -1).transpose(0, 1).reshape(B, H, S, -1)
                         for x in (first, first_sums))
    mask = None if group.mask is None else group.mask.to(queries.dtype).log()  # what is added to scores
    own, own_sums = flash(queries, group.keys, group.values, is_causal=mask is None, attn_mask=mask, scale=scores.scale)
    share = torch.sigmoid(first_sums - own_sums[..., None])  # of the weights, what lies on the prefix
    return torch.lerp(own.float(), first.float(), share).type_as(queries)


def _attend_in_turn(queries: Tensor, keys: Tensor, values: Tensor, packed: Segments, scores: Scoring) -> Tensor:
    """attend() within samples laid end to end, one after the other. [1, H or K, S, E] -> [1, H, S, E]."""
    runs = [length for shared, first, *others in packed for length in (shared + first, *others)]
    rows = zip(*(heads.split(runs, dim=2) for heads in (queries, keys, values)), strict=True)
    mixed = []
    for shared, _, *others in packed:
        first = next(rows)
        mixed.append(attend(*first, None, scores))
        beginning = [heads[:, :, :shared] for heads in first[1:]]
        for _ in others:
            own, *rest = next(rows)
            seen = [torch.cat(both, dim=2) for both in zip(beginning, rest, strict=True)]
            mixed.append(attend(own, *seen, _causal(own, seen[0]), scores))
    return torch.cat(mixed, dim=2)


def _attend_in_samples(queries: Tensor, keys: Tensor, values: Tensor, packed: Packed, scores: Scoring) -> Tensor:
    """attend() within samples laid end to end: in one call of the GPU's flash kernel where it can, else in turn.

    [1, H, S, E], [1, K, S, E], [1, K, S, E] -> [1, H, S, E].
    """
    size = queries.shape[-1]
    has_kernel = queries.is_cuda and queries.dtype in HALF and size % 8 == 0 and size <= 256 and not scores.softcap
    if not (has_kernel and packed.longest):
        return _attend_in_turn(queries, keys, values, packed.segments, scores)
    rows = [heads[0].transpose(0, 1) for heads in (queries, keys, values)]  # [S, H or K, E]
    before = scores.window - 1 if scores.window else -1
    varlen_attn, grouped = _packed_kernel()
    mixed = varlen_attn(*rows, packed.ends, packed.ends, packed.longest, packed.longest, scale=scores.scale,
                        window_size=(before, 0), **(grouped if queries.shape[1] != keys.shape[1] else {}))
    return mixed.transpose(0, 1)[None]


class HeadNorm(RMSNorm):
    """RMS normalisation of each head (Henry et al. 2020): every rank holds the weight, and some of the heads."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__(config.head_dim, config.norm_eps, config.norm_offset, dtype)

    def scale(self) -> Tensor:
        """The factor of each dimension, its gradient summed over the ranks. -> [E] float32."""
        return copy_to_tensor_parallel(super().scale())


class ProjectionNorm(RMSNorm):
    """RMS normalisation over all heads at once (OLMo 2): every rank has its heads' weights, and their squares' sum."""

    def __init__(self, config: ModelConfig, projection: ColumnParallelLinear, copies: int, dtype: torch.dtype) -> None:
        """The norm of what `projection` gives; `copies`: the ranks that have this rank's heads."""
        super().__init__(len(projection.rows), config.norm_eps, config.norm_offset, dtype)
        self.rows, self.width = projection.rows, projection.out_features
        self.copies, self.replicated = copies, projection.replicated

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, H, E] of any float dtype -> [B, S, H, E] in the norm's dtype."""
        flat = x.flatten(-2).float()  # [B, S, H E]
        squares = flat.square().sum(-1, keepdim=True) / self.copies  # [B, S, 1]
        # all ranks need the sum, and the gradient that it has on all of them
        squares = copy_to_tensor_parallel(reduce_from_tensor_parallel(squares))
        normal = flat * (squares / self.width + self.eps).rsqrt()
        scale = self.scale()
        if self.replicated:
            scale = SumGradientOverReplicas.apply(scale, self.rows, self.width)
        return (normal * scale).to(self.dtype).view_as(x)


class Attention(nn.Module):
    """Multi-head attention with grouped key-value heads (Ainslie et al. 2023) and rotary positions."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        heads, kv_heads = config.heads_on(tensor_parallel_size(), tensor_parallel_rank())
        self.n_heads, self.n_kv_heads, self.head_dim = len(heads), len(kv_heads), config.head_dim
        queries, keys = config.rows_of(heads), config.rows_of(kv_heads)
        all_queries, all_keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        replicated = config.n_kv_heads < tensor_parallel_size()
        bias = config.qkv_bias or config.attention_bias
        self.wq = ColumnParallelLinear(config.dim, all_queries, queries, bias=bias)
        self.wk = ColumnParallelLinear(config.dim, all_keys, keys, bias=bias, replicated=replicated)
        self.wv = ColumnParallelLinear(config.dim, all_keys, keys, bias=bias, replicated=replicated)
        self.wo = RowParallelLinear(all_queries, config.dim, queries, bias=config.attention_bias)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.qk_norm_whole:
            ranks = [config.heads_on(tensor_parallel_size(), rank)[1] for rank in range(tensor_parallel_size())]
            self.q_norm = ProjectionNorm(config, self.wq, 1, dtype)
            self.k_norm = ProjectionNorm(config, self.wk, ranks.count(kv_heads), dtype)
        elif config.qk_norm:
            self.q_norm, self.k_norm = HeadNorm(config, dtype), HeadNorm(config, dtype)
        scale = config.attention_multiplier or (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        self.scores = Scoring(scale, config.attention_softcap, config.window_of(layer))

    def forward(self, x: Tensor, rotation: Rotation | None, mask: Mask, cache: Cache | None) -> Tensor:
        """x [B, S, D] -> [B, S, D]. A cache takes the new keys and values and makes the mask itself."""
        B, S, _ = x.shape
        queries = self.q_norm(self.wq(x).view(B, S, self.n_heads, self.head_dim))  # [B, S, H, E]
        keys = self.k_norm(self.wk(x).view(B, S, self.n_kv_heads, self.head_dim))  # [B, S, K, E]
        values = self.wv(x).view(B, S, self.n_kv_heads, self.head_dim)
        # before the cache: what it holds is rotated once, by positions that do not change
        queries, keys = apply_rope(queries, rotation), apply_rope(keys, rotation)
        queries, keys, values = (heads.transpose(1, 2) for heads in (queries, keys, values))  # [B, H or K, S, E]
        if cache is None and context_parallel.size() > 1:
            mixed = _attend_over_context(queries, keys, values, mask, self.scores)
        elif cache is None:
            mixed = attend(queries, keys, values, mask, self.scores)
        else:
            mixed = _attend_to_groups(queries, cache.write(self.layer, keys, values), self.scores)
        return self.wo(mixed.transpose(1, 2).reshape(B, S, -1))  # [B, S, H E], summed over the ranks to [B, S, D]


def _attend_over_context(queries: Tensor, keys: Tensor, values: Tensor, mask: Mask, scores: Scoring) -> Tensor:
    """attend() to all positions of a batch, of which this rank has S, with its share of the heads: see
    src/context_parallel.py. [B, H, S, E], [B, K, S, E], [B, K, S, E] -> [B, H, S, E]."""
    copies = context_parallel.size() // math.gcd(context_parallel.size(), keys.shape[1])
    if copies > 1:  # the queries of a key head go to several ranks
        keys, values = (heads.repeat_interleave(copies, 1) for heads in (keys, values))
    shares = (context_parallel.exchange(heads, 1, 2) for heads in (queries, keys, values))
    return context_parallel.exchange(attend(*shares, mask, scores), 2, 1)


def _attend_to_groups(queries: Tensor, groups: list[Group], scores: Scoring) -> Tensor:
    """attend(), each group of rows to what the cache holds of it. [B, H, S, E] -> [B, H, S, E]."""
    B, H, S, E = queries.shape
    n_kv_heads = groups[0].keys.shape[1]
    few = queries.is_cpu and queries.dtype in HALF and H < FEW_QUERIES * n_kv_heads
    if S == 1 and groups[0].mask is not None and not few:
        # the query heads that share a key head become positions of it: its keys and values are read once for all
        queries = queries.reshape(B, n_kv_heads, -1, E)
    parts = [
        _attend_after_prefix(queries[group.rows], group, scores) if group.prefix
        else attend(queries[group.rows], group.keys, group.values, group.mask, scores) for group in groups]
    return torch.cat(parts).view(B, H, S, E)
