"""Choosing the next token, reproducibly: each sample's randomness depends on (seed, id, sample) alone.

B batch, P vocabulary rows on this rank, R ranks, C candidates a rank sends

Logits stay where they are: what crosses the tensor-parallel ranks is a row's sums, its best few candidates and the
token sampled. Whatever the number of ranks, one number in [0, 1) selects the token by inverting the cumulative
distribution in the order of ids - an order that rounding cannot change, as it could that of probabilities.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from src import parallel
from src.errors import UserError

CANDIDATES = 64  # a rank sends these first; a trained model's nucleus is rarely wider
CACHED = 2**18  # logits that fit a processor's cache, where passes over them cost a fraction of those over memory
BLOCK = 256  # ids summed together: the draw looks for its block, then for its id


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are sampled. temperature 0 is greedy.

    The temperature comes first; then top_k keeps so many tokens (0 = all), top_p the smallest set of that share of
    what is left, min_p those at least that likely relative to the likeliest. stop ends a response where one of
    these strings begins. logit_bias is added to the logits of its ids before anything else; -inf bans an id.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 1

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or 1e-30 <= self.temperature <= 1e30):  # others are 0 or infinite to a logit
            raise UserError(f"temperature={self.temperature}: expected 0 (greedy), or 1e-30 to 1e30")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: expected 0 < top_p <= 1")
        if not 0 <= self.top_k < 2**63:  # a larger one is no int64, with which places are compared
            raise UserError(f"top_k={self.top_k}: expected 0 (all tokens) or more, below 2**63")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p={self.min_p}: expected 0 <= min_p <= 1")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens}: expected at least 1")
        if "" in self.stop:
            raise UserError("stop holds an empty string, which every response begins with; drop it")

    def until_stop(self, text: str) -> tuple[str, str]:
        """The text up to the first stop string in it, and that string; "" where there is none."""
        stop = min((stop for stop in self.stop if stop in text), key=text.index, default="")
        return (text[: text.index(stop)], stop) if stop else (text, "")

    @property
    def truncates(self) -> bool:
        """Whether some tokens can never be sampled."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


class Choice(NamedTuple):
    """The next token of each row, alike on every rank. logprobs are those of the plain model, sampled_logprobs those of
    the distribution that was sampled from (after bias, temperature and truncation; 0 when greedy). Nats."""

    tokens: Tensor  # [B] int64
    logprobs: Tensor  # [B] float32
    sampled_logprobs: Tensor  # [B] float32


def check_numbers(logprobs: np.ndarray, where: str) -> None:
    """Raise UserError for log-probs [...] that are NaN: by such logits the same token is the likeliest everywhere, and
    whatever is measured with it means nothing."""
    if np.isnan(logprobs).any():
        raise UserError(f"{where}: the model's logits are NaN: its weights hold NaN or infinity, or float16 does not "
                        "hold what it computes; try --precision bfloat16 or float32, or another checkpoint")


def uniforms(seed: int, request_id: str, sample: int, n: int) -> np.ndarray:
    """Numbers in [0, 1) for one sample: a counter-based stream keyed by (seed, id, sample). -> [n] float64."""
    digest = hashlib.sha256(f"{seed}\0{request_id}\0{sample}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(n)


def choose(local_logits: Tensor, sampling: Sampling, u: Tensor, bias: Tensor | None = None) -> Choice:
    """Sample each row's next token. local_logits [B, P] any float dtype, this rank's slice; u [B] float64 in [0, 1);
    bias [P] float32, this rank's -> three [B]."""
    alone = local_logits.is_cpu and parallel.tensor_parallel_size() == 1
    # ranks take all rows at once: they send each other a message or two for each part
    n, parts = max(1, CACHED // local_logits.shape[-1]) if alone else max(1, len(local_logits)), []
    for logits, draws in zip(local_logits.split(n), u.split(n), strict=True):
        plain = logits.float()  # [b, P]
        biased = plain if bias is None else plain + bias
        if sampling.temperature == 0:
            parts.append(_greedy(plain, biased))
            continue
        # float(): torch takes no integer of 2^64 or more, which a server may be asked for
        scaled = biased if sampling.temperature == 1 else biased / float(sampling.temperature)
        parts.append(_sample_candidate(plain, scaled, sampling, draws) if sampling.truncates
                     else _sample_any(plain, scaled, draws))
    choice = Choice(*map(torch.cat, zip(*parts, strict=True)))
    parallel.broadcast_from_first(choice.tokens)  # one rank's rounding decides for all
    return choice


def _from_ranks(*columns: Tensor) -> Tensor:
    """Every rank's float64 columns, in one message. [B] or [B, n] each -> [B, R, all n]."""
    local = torch.cat([column.double().reshape(len(column), -1) for column in columns], -1)
    return parallel.gather_vocab(local).unflatten(-1, (-1, local.shape[-1]))


def _first_id(local_logits: Tensor) -> int:
    """The id of this rank's first vocabulary row. [B, P] -> int."""
    return parallel.tensor_parallel_rank() * local_logits.shape[-1]


def _of_rank(values: Tensor, ranks: Tensor) -> Tensor:
    """Each row's entry of its own rank. values [B, R, n], ranks [B] int64 -> [B, n]."""
    return values[torch.arange(len(values), device=values.device), ranks]


def _greedy(plain: Tensor, biased: Tensor) -> Choice:
    """Take the likeliest token, the first of equals. [B, P], [B, P] -> three [B]."""
    highest, index = biased.max(-1)
    chosen = plain.gather(-1, index[:, None])
    found = _from_ranks(highest, index + _first_id(plain), chosen, plain.logsumexp(-1))
    best = _of_rank(found, found[:, :, 0].argmax(-1))
    logprobs = best[:, 2] - found[:, :, 3].logsumexp(-1)
    return Choice(best[:, 1].long(), logprobs.float(), torch.zeros_like(logprobs, dtype=torch.float32))


def _sample_any(plain: Tensor, scaled: Tensor, u: Tensor) -> Choice:
    """Sample from the whole softmax: sums decide which rank holds the token, its rank finds it. plain, scaled [B, P], u
    [B] -> three [B]."""
    highest = scaled.amax(-1)  # [B]; -inf where the slice is padding alone, and -inf less itself would be nan
    weights = torch.exp(scaled - highest.clamp_min(torch.finfo(scaled.dtype).min)[:, None])  # [B, P]
    blocks = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    # in float64: float32 sums of a large vocabulary would lose its rarest ids
    sums = blocks.sum(-1).double().cumsum(-1)  # [B, P / BLOCK]
    found = _from_ranks(highest, sums[:, -1], plain.logsumexp(-1))
    top = found[:, :, 0].amax(-1)
    scale = (found[:, :, 0] - top[:, None]).exp()  # [B, R]
    ends = (scale * found[:, :, 1]).cumsum(-1)
    target = u * ends[:, -1]
    owner = _position(ends, target)
    # the rest of the search is the owner's; the others compute something that nobody reads
    rank = parallel.tensor_parallel_rank()
    rest = (target - ends[:, rank]) / scale[:, rank].clamp_min(1e-300) + sums[:, -1]
    block = _position(sums, rest)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block].double().cumsum(-1)  # [B, BLOCK]
    before = sums.gather(-1, block[:, None]).squeeze(-1) - inside[:, -1]
    index = (block * BLOCK + _position(inside, rest - before)).clamp_max(plain.shape[-1] - 1)
    values = [logits.gather(-1, index[:, None]) for logits in (plain, scaled)]
    sampled = _of_rank(_from_ranks(index + _first_id(plain), *values), owner)
    return Choice(sampled[:, 0].long(), (sampled[:, 1] - found[:, :, 2].logsumexp(-1)).float(),
                  (sampled[:, 2] - top - ends[:, -1].log()).float())


def _position(cumulative: Tensor, target: Tensor) -> Tensor:
    """Where each row's target falls: the first entry above it that adds anything. [B, n], [B] -> [B] int64."""
    above = torch.searchsorted(cumulative, target[:, None].clamp_min(0), right=True)
    # rounding may put a target at the very end, after the last entry that adds anything
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    # NaN ends all sums: the row's log-prob is NaN too, which check_numbers() refuses
    return torch.minimum(above, last).squeeze(-1).clamp_max(cumulative.shape[-1] - 1)


def _sample_candidate(plain: Tensor, scaled: Tensor, sampling: Sampling, u: Tensor) -> Choice:
    """Sample from the likeliest tokens: each rank sends its own few, more of them where they fall short. plain, scaled
    [B, P], u [B] -> three [B]."""
    n = sampling.top_k or CANDIDATES
    while True:
        n = min(n, scaled.shape[-1])
        values, index = scaled.topk(n)
        found = _from_ranks(scaled.logsumexp(-1), plain.logsumexp(-1), values, index + _first_id(plain),
                            plain.gather(-1, index))
        values, ids, plain_values = (
            columns.flatten(1) for columns in found[:, :, 2:].unflatten(-1, (3, n)).unbind(2)
        )  # [B, R * n]
        values, order = values.sort(descending=True, stable=True)
        kept = _kept(values, found[:, :, 0].logsumexp(-1), sampling)
        # those kept come first; without top_k a GPU is waited for, to know how many they are
        width = min(sampling.top_k, values.shape[-1]) or int(kept.sum(-1).max())
        # all that any rank kept back is below its n-th: the first n in all are the true first n
        if sampling.top_k or n == scaled.shape[-1] or width < n:
            break
        n *= 16
    ids, by_id = ids.gather(-1, order[:, :width]).sort()  # [B, width]
    plain_values = plain_values.gather(-1, order[:, :width]).gather(-1, by_id)
    logits = values[:, :width].masked_fill(~kept[:, :width], float("-inf")).gather(-1, by_id)
    logprobs = logits.log_softmax(-1)
    cumulative = logprobs.exp().cumsum(-1)
    index = _position(cumulative, u * cumulative[:, -1])[:, None]  # of the sum, which rounding takes off 1
    return Choice(
        ids.gather(-1, index).squeeze(-1).long(),
        (plain_values.gather(-1, index).squeeze(-1) - found[:, :, 1].logsumexp(-1)).float(),
        logprobs.gather(-1, index).squeeze(-1).float())


def _kept(values: Tensor, total: Tensor, sampling: Sampling) -> Tensor:
    """Which sorted candidates may be sampled: always the first. values [B, n], total [B] log-sum -> [B, n] bool."""
    place = torch.arange(values.shape[-1], device=values.device)
    if sampling.top_k:
        values = values.masked_fill(place >= sampling.top_k, float("-inf"))
        total = values.logsumexp(-1)
    probs = (values - total[:, None]).exp()
    before = probs.cumsum(-1) - probs
    kept = (before < sampling.top_p) & (probs >= sampling.min_p * probs[:, :1]) & (probs > 0)
    return kept | (place == 0)
