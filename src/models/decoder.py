"""The decoder-only transformer: one model for every family, built from a ModelConfig.

B batch, S sequence, D width, N tokens, X experts, P vocabulary rows on this rank
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src import context_parallel, parallel
from src.errors import UserError
from src.models.attention import Attention, Mask, Packed, Segments
from src.models.cache import Cache
from src.models.config import ModelConfig
from src.models.layers import (
    ColumnParallelLinear,
    ParallelEmbedding,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from src.models.linear import linear
from src.models.rope import Rotation, layer_rotations


class Block(nn.Module):
    """Residual block: attention, then feed-forward, with norms of what they read, of what they give, or of both."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention = Attention(config, layer, dtype)
        self.feed_forward = MixtureOfExperts(config) if config.n_experts else FeedForward(config, config.ffn_dim)
        self.dtype, self.multiplier = dtype, config.residual_multiplier
        self.attention_norm = _norm(config, dtype) if config.pre_norms else nn.Identity()
        self.ffn_norm = _norm(config, dtype) if config.pre_norms else nn.Identity()
        self.attention_post_norm = _norm(config, dtype) if config.post_norms else nn.Identity()
        self.ffn_post_norm = _norm(config, dtype) if config.post_norms else nn.Identity()

    def forward(self, x: Tensor, rotation: Rotation | None, mask: Mask, cache: Cache | None) -> Tensor:
        """The residual stream x [B, S, D] float32 -> [B, S, D] float32."""
        read = self.attention_norm(x).to(self.dtype)  # [B, S, D]; as a norm does it, where there is one
        x = self._added(x, self.attention_post_norm(self.attention(read, rotation, mask, cache)))
        return self._added(x, self.ffn_post_norm(self.feed_forward(self.ffn_norm(x).to(self.dtype))))

    def _added(self, x: Tensor, y: Tensor) -> Tensor:
        """The residual stream x with a layer's output y, both [B, S, D]."""
        return x + (y if self.multiplier == 1 else y * self.multiplier)


def _positions(packed: Segments) -> Tensor:
    """The place of each token in its own sample. -> [S] int64."""
    parts = []
    for shared, first, *others in packed:
        parts += [torch.arange(shared + first), *(torch.arange(shared, shared + n) for n in others)]
    return torch.cat(parts)


def _norm(config: ModelConfig, dtype: torch.dtype) -> RMSNorm:
    """A norm over the model's width."""
    return RMSNorm(config.dim, config.norm_eps, config.norm_offset, dtype)


class Decoder(nn.Module):
    """Token ids to hidden states, and hidden states to logits (a solver) or scores (a verifier or critic).

    The two halves are separate calls so that the output layer only runs where someone wants its result.

    Every weight, and what linear layers and attention read and write, is rounded to `dtype`; the residual stream,
    norms, rotary angles, softmax, scores and losses are float32. The weights themselves may be stored in more bits.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        config.check_heads(parallel.tensor_parallel_size(), context_parallel.size(), f"a model of {config.family}")
        self.config, self.dtype = config, dtype
        by_width = config.embedding_dim_on(parallel.tensor_parallel_size()) == 1
        embedding = ParallelEmbedding if by_width else VocabParallelEmbedding
        self.tok_embeddings = embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer, dtype) for layer in range(config.n_layers))
        self.norm = _norm(config, dtype)
        if config.value_head:
            if config.two_layer_head:
                self.v_head_in = nn.Linear(config.dim, config.dim)
            self.v_head = nn.Linear(config.dim, 1, bias=config.two_layer_head)
        elif not config.tied:
            rows = parallel.padded_share(config.vocab_size)
            self.output = ColumnParallelLinear(config.dim, config.vocab_size, rows)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        lengths: Segments | None = None,
    ) -> Tensor:
        """tokens [B, S] int64 -> normalised hidden states [B, S, D] in the model's dtype; without a cache those of this
        rank's context_parallel.part(S).

        Without a cache attention is causal over the row, so padding after a row's end changes nothing before
        it; a PromptCache keeps what such a forward computes, at `positions` [B, S] int64 if a prefix comes before.
        With a KVCache one token a row is read at the `positions` [B, 1] that it gave. With `lengths` the one row
        holds samples end to end, each entry (shared, rest, rest, ...) those that begin alike: the beginning lies
        there once, positions after it start again for each rest, and no sample sees another.
        """
        B, S = tokens.shape
        if positions is None:
            positions = _positions(lengths or ((0, S),))
            self._check_context(int(positions.max()))
            positions = parallel.to_device(positions).expand(B, S)
        if cache is None and context_parallel.size() > 1:
            tokens, positions = context_parallel.cut(tokens), context_parallel.cut(positions)
            if lengths and (padding := tokens.shape[1] * context_parallel.size() - S):  # a sample of its own
                lengths = (*lengths, (0, padding))
        x = self.tok_embeddings(tokens).to(self.dtype)  # [B, S, D]
        if self.config.scaled_embeddings:  # the root is rounded too, as when the model was pretrained
            x = x * torch.tensor(self.config.dim**0.5, dtype=x.dtype, device=x.device)
        x = x.float()  # the residual stream: a sum over layers, in which half precision would lose what each adds
        if self.config.embedding_multiplier != 1:
            x = x * self.config.embedding_multiplier
        mask = Packed(lengths) if lengths else None  # None: causal over the row
        for layer, rotation in zip(self.layers, layer_rotations(self.config, positions), strict=True):
            x = layer(x, rotation, mask, cache=cache)
        return self.norm(x)

    def linear_weights(self) -> Iterator[Tensor]:
        """The matrices [out, in] of linear layers: all but an embedding that is no output layer."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and (self.config.tied or not name.startswith("tok_embeddings")):
                yield parameter

    def _check_context(self, last: int) -> None:
        """Raise UserError for a position beyond a context whose rule for it is not implemented."""
        bounded = self.config.rope_type in ("dynamic", "longrope") or self.config.logn_attention
        if bounded and last >= self.config.max_seq_len:
            raise UserError(f"position {last} lies beyond the model's context of {self.config.max_seq_len}, where its "
                            "dynamic or long rotary positions or logn attention would begin; they are not implemented: "
                            "shorten the text")

    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's vocabulary slice of the logits, padding rows at -inf. hidden [..., D] -> [..., P]."""
        if self.config.tied:
            local = self.tok_embeddings.logits(parallel.copy_to_tensor_parallel(hidden))
        else:
            local = self.output(hidden)
        return self.finish_logits(local)

    @property
    def output_weight(self) -> Tensor:
        """What hidden states are multiplied by to be logits. -> [P, D]."""
        return self.tok_embeddings.weight if self.config.tied else self.output.weight

    def finish_logits(self, local: Tensor) -> Tensor:
        """The output layer's products with what a family does to them in float32, padding rows at -inf. [..., P] ->
        [..., P]."""
        if self.config.logit_divisor != 1 or self.config.logit_softcap:
            local = local.float()
        if self.config.logit_divisor != 1:
            local = local / self.config.logit_divisor
        if self.config.logit_softcap:
            local = self.config.logit_softcap * torch.tanh(local / self.config.logit_softcap)
        rows = parallel.padded_share(self.config.vocab_size)
        if rows.stop > self.config.vocab_size:
            padding = torch.arange(rows.start, rows.stop, device=local.device) >= self.config.vocab_size
            local = local.masked_fill(padding, float("-inf"))
        return local

    def scores(self, hidden: Tensor) -> Tensor:
        """The value head's score of each position. hidden [..., D] -> [...] float32."""
        hidden = hidden.float()
        if self.config.two_layer_head:
            hidden = F.linear(hidden, self.v_head_in.weight.float(), self.v_head_in.bias.float()).relu()
            return F.linear(hidden, self.v_head.weight.float(), self.v_head.bias.float()).squeeze(-1)
        # rounded as FSDP2 gathers it: one rank's scores are those of several
        return F.linear(hidden, self.v_head.weight.to(self.dtype).float()).squeeze(-1)


class FeedForward(nn.Module):
    """Gated linear unit (Shazeer 2020): w2(act(w1 x) * w3 x), with its inner width split over the ranks."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.act = F.silu if config.activation == "silu" else partial(F.gelu, approximate="tanh")
        bias = config.mlp_bias
        self.w1 = ColumnParallelLinear(config.dim, width, bias=bias)
        self.w2 = RowParallelLinear(width, config.dim, bias=bias)
        self.w3 = ColumnParallelLinear(config.dim, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, D] -> [B, S, D]."""
        return self.w2(self.act(self.w1(x)) * self.w3(x))

    def partial_output(self, x: Tensor) -> Tensor:
        """This rank's summand of the output, for callers that sum over ranks themselves. x [N, D] -> [N, D]."""
        inner = self.act(linear(x, self.w1.weight)) * linear(x, self.w3.weight)  # [N, width on this rank]
        return linear(inner, self.w2.weight)


class MixtureOfExperts(nn.Module):
    """Each token through its n_active_experts most probable experts (Shazeer et al. 2017), none dropped.

    Where there is a shared expert, all tokens go through it too, each weighed by a sigmoid (Qwen team 2024).
    Every expert is split over the ranks like a plain feed-forward layer. All ranks route alike, so the experts'
    outputs are summed over the ranks once, however many were used.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_active, self.renormalised = config.n_active_experts, config.renormalised_experts
        self.gate = nn.Linear(config.dim, config.n_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config, config.ffn_dim) for _ in range(config.n_experts))
        self.shared = FeedForward(config, config.shared_ffn_dim) if config.shared_ffn_dim else None
        self.shared_gate = nn.Linear(config.dim, 1, bias=False) if config.shared_ffn_dim else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, D] -> [B, S, D]."""
        tokens = x.flatten(0, 1)  # [N, D]
        probabilities = linear(tokens, self.gate.weight).float().softmax(-1)  # [N, X]
        weights, chosen = probabilities.topk(self.n_active, dim=-1)  # [N, n_active]
        if self.renormalised:
            weights = weights / weights.sum(-1, keepdim=True)
        # each rank has a part of every expert, hence a part of these gradients
        tokens, weights = parallel.copy_to_tensor_parallel(tokens), parallel.copy_to_tensor_parallel(weights)
        output = torch.zeros_like(tokens, dtype=torch.float32)  # [N, D]
        if self.shared is not None:
            share = linear(x.flatten(0, 1), self.shared_gate.weight).float().sigmoid()  # [N, 1]
            output = parallel.copy_to_tensor_parallel(share) * self.shared.partial_output(tokens)
        chosen, weights = chosen.flatten(), weights.flatten()  # [N * n_active]
        # a GPU is asked once how many tokens each expert has
        counts = (chosen[:, None] == torch.arange(len(self.experts), device=chosen.device)).sum(0).tolist()
        for expert, places in zip(self.experts, chosen.argsort(stable=True).split(counts), strict=True):
            rows = places // self.n_active
            if not len(rows) and not torch.is_grad_enabled():  # in training an idle expert has a gradient of zero
                continue
            mixed = expert.partial_output(tokens[rows]) * weights[places, None]  # [the expert's tokens, D]
            output = output.index_add(0, rows, mixed.type_as(output))
        return parallel.reduce_from_tensor_parallel(output).view_as(x)
