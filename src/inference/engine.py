"""Batched decoding with a key-value cache: finished rows leave the batch, waiting requests take their place.

B rows in the batch, S prompt length, V vocabulary
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from src import parallel
from src.errors import UserError
from src.inference.sampling import Sampling, choose, uniforms
from src.models.cache import KVCache, PromptCache
from src.models.decoder import Decoder


class Request(NamedTuple):
    """A prompt to continue; (id, sample) names the result and seeds its randomness."""

    id: str
    sample: int
    prompt: list[int]


class Completion(NamedTuple):
    """What was sampled: response ids (EOS included when it came), their plain log-probs, and why it ended."""

    request: Request
    tokens: list[int]
    logprobs: list[float]
    finish: str  # stop | length


class _Row:
    """A request being decoded."""

    def __init__(self, request: Request, sampling: Sampling, max_seq_len: int) -> None:
        self.request = request
        self.limit = min(sampling.max_new_tokens, max_seq_len - len(request.prompt))
        self.uniforms = uniforms(sampling.seed, request.id, request.sample, self.limit)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []

    def finish(self, eos_id: int) -> str | None:
        """Why this row is done, None while it is not."""
        if self.tokens[-1] == eos_id:
            return "stop"
        return "length" if len(self.tokens) == self.limit else None


@torch.inference_mode()
def generate(
    model: Decoder, requests: Sequence[Request], sampling: Sampling, *, eos_id: int, max_batch_size: int
) -> Iterator[Completion]:
    """Yield completions as they finish; every tensor-parallel rank yields the same ones in the same order.

    At most max_batch_size rows decode at once. Raises UserError for a prompt that fills the model's context.
    """
    _check_lengths(requests, model.config.max_seq_len)
    was_training = model.training
    model.eval()
    waiting = sorted(
        requests, key=lambda request: len(request.prompt), reverse=True
    )  # popped from the short end
    rows: dict[int, _Row] = {}  # by slot
    cache = KVCache(max_batch_size, parallel.device())
    try:
        while rows or waiting:
            free = cache.free_slots()
            if (
                waiting and 2 * len(free) >= max_batch_size
            ):  # refill in halves: few large prefills, not many small
                changed = {
                    slot: _Row(waiting.pop(), sampling, model.config.max_seq_len) for slot in free if waiting
                }
                _choose(list(changed.values()), _prefill(model, changed, cache), sampling)
                rows |= changed
            else:
                positions = cache.advance()
                changed = {slot: rows[slot] for slot in cache.slots()}
                _choose(
                    list(changed.values()), _decode(model, list(changed.values()), positions, cache), sampling
                )
            for slot, row in changed.items():
                if why := row.finish(eos_id):
                    yield Completion(row.request, row.tokens, row.logprobs, why)
                    cache.release(slot)
                    del rows[slot]
    finally:
        model.train(was_training)


def _check_lengths(requests: Sequence[Request], max_seq_len: int) -> None:
    for request in requests:
        if len(request.prompt) >= max_seq_len:
            raise UserError(
                f"prompt {request.id!r} has {len(request.prompt)} tokens but the model's context is "
                f"{max_seq_len}; shorten or drop it"
            )


def _prefill(model: Decoder, rows: dict[int, _Row], cache: KVCache) -> Tensor:
    """Read the prompts into their slots of the cache; logits [B, V] of the position after each."""
    prompts = [torch.tensor(row.request.prompt) for row in rows.values()]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    read = PromptCache()
    hidden = model(tokens.to(parallel.device()), cache=read)
    for index, slot in enumerate(rows):
        cache.admit([slot], read.row(index, len(prompts[index])))
    return parallel.gather_vocab(model.logits(hidden[torch.arange(len(prompts)), lengths - 1]))


def _decode(model: Decoder, rows: list[_Row], positions: Tensor, cache: KVCache) -> Tensor:
    """Feed each row its newest token; logits [B, V] of the position after it."""
    tokens = torch.tensor([[row.tokens[-1]] for row in rows], device=parallel.device())
    return parallel.gather_vocab(model.logits(model(tokens, positions, cache)[:, -1]))


def _choose(rows: list[_Row], logits: Tensor, sampling: Sampling) -> None:
    """Append the next token to every row; the first rank draws, the others receive."""
    u = torch.from_numpy(np.array([row.uniforms[len(row.tokens)] for row in rows])).to(logits.device)
    tokens, logprobs = choose(logits, sampling, u)
    parallel.broadcast_from_first(tokens)
    for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
        row.tokens.append(token)
        row.logprobs.append(logprob)
