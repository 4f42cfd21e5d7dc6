"""Choosing the next token, reproducibly: each sample's randomness depends on (seed, id, sample) alone.

B batch, V vocabulary
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from src.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; top_p keeps the smallest set of that probability."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 1

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature}: expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: expected 0 < top_p <= 1")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens}: expected at least 1")


def uniforms(seed: int, request_id: str, sample: int, n: int) -> np.ndarray:
    """n numbers in [0, 1) for one sample: a counter-based stream keyed by (seed, id, sample). float64."""
    digest = hashlib.sha256(f"{seed}\0{request_id}\0{sample}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(n)


def choose(logits: Tensor, sampling: Sampling, u: Tensor) -> tuple[Tensor, Tensor]:
    """The next token of each row and its log-prob under the plain model.

    logits [B, V], u [B] float64 in [0, 1) -> tokens [B] int64, logprobs [B] float32, nats.
    """
    plain = logits.float().log_softmax(-1)
    if sampling.temperature == 0:
        tokens = plain.argmax(-1)
    else:
        tokens = _draw((plain / sampling.temperature).double().softmax(-1), sampling.top_p, u)
    return tokens, plain.gather(-1, tokens[:, None]).squeeze(-1)


def _draw(probs: Tensor, top_p: float, u: Tensor) -> Tensor:
    """Invert the cumulative distribution at u. probs [B, V] float64 -> [B] int64."""
    order = None
    if top_p < 1:
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
        probs = probs * (
            probs.cumsum(-1) - probs < top_p
        )  # a token stays if those before it fall short of top_p
    cumulative = probs.cumsum(-1)
    index = torch.searchsorted(cumulative, (u * cumulative[:, -1])[:, None], right=True)
    index = index.clamp_max(probs.shape[-1] - 1)
    return (index if order is None else order.gather(-1, index)).squeeze(-1)
