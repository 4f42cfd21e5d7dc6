"""Episodes: responses sampled from the current policy, laid out as they were sampled.

B episodes, S sequence, N response tokens of some episodes laid end to end in row order
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from src import parallel
from src.data import collate
from src.data.collate import Batch, Encoded
from src.data.examples import Prompt
from src.errors import UserError
from src.inference.engine import Completion, Request, generate, vocabulary_of
from src.inference.sampling import Sampling
from src.models.decoder import Decoder
from src.text.tokenizer import Tokenizer
from src.training.ppo_settings import Settings


class Episodes(NamedTuple):
    """A response to each prompt; the prompts of a group are equal and stand together."""

    prompts: list[Prompt]
    responses: list[str]
    batch: Batch
    finished: Tensor  # [B] bool: the response ended by itself
    sampled_logprobs: Tensor  # [B, S] float32: what the sampler drew from, 0 outside batch.response_mask

    @property
    def lengths(self) -> Tensor:
        """Response tokens of each episode. [B] int64."""
        return self.batch.response_mask.sum(1)

    @property
    def last(self) -> Tensor:
        """Column of each response's last token. [B] int64."""
        mask = self.batch.response_mask
        return (torch.arange(mask.shape[1]) * mask).argmax(1)


def sample_episodes(
    actor: Decoder, prompts: Sequence[Prompt], tokenizer: Tokenizer, settings: Settings, step: int
) -> Episodes:
    """group_size responses to each prompt from the current policy; (seed, step, id, place in the group) fixes each.

    Raises UserError unless all ranks drew the same tokens.
    """
    sampling = Sampling(
        temperature=settings.temperature, max_new_tokens=settings.max_new_tokens, seed=settings.seed
    )
    size = settings.group_size
    requests = [
        Request(prompt.id, step * size + place, collate.encode_prompt(tokenizer, prompt.instruction))
        for prompt in prompts
        for place in range(size)
    ]
    completions = generate(
        actor,
        requests,
        sampling,
        vocabulary=vocabulary_of(tokenizer),
        max_batch_size=settings.rollout_batch_size,
    )
    done = {(one.request.id, one.request.sample): one for one in completions}
    in_order = [done[request.id, request.sample] for request in requests]
    return lay_out([prompt for prompt in prompts for _ in range(size)], in_order, tokenizer)


def greedy_accuracy(
    actor: Decoder,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    grade: Callable[[Sequence[str], Sequence[str]], list[str]],
    settings: Settings,
) -> float:
    """Share of labelled prompts whose greedy response `grade` finds "right". The first rank's word holds."""
    requests = [
        Request(prompt.id, 0, collate.encode_prompt(tokenizer, prompt.instruction)) for prompt in prompts
    ]
    completions = generate(
        actor,
        requests,
        Sampling(temperature=0.0, max_new_tokens=settings.max_new_tokens, seed=settings.seed),
        vocabulary=vocabulary_of(tokenizer),
        max_batch_size=settings.rollout_batch_size,
    )
    texts = {done.request.id: done.text for done in completions}
    outcomes = grade([texts[prompt.id] for prompt in prompts], [prompt.label or "" for prompt in prompts])
    right = torch.tensor(float(outcomes.count("right")), device=parallel.device())
    return parallel.broadcast_from_first(right).item() / len(prompts)


def lay_out(prompts: list[Prompt], completions: Sequence[Completion], tokenizer: Tokenizer) -> Episodes:
    """Prompts and sampled tokens exactly as they were sampled, padded."""
    batch = collate.collate(
        [Encoded(done.request.prompt + done.tokens, len(done.request.prompt)) for done in completions]
    )
    _check_alike(batch.tokens)
    sampled = torch.zeros(batch.tokens.shape)
    sampled[batch.response_mask] = torch.tensor(
        [logprob for done in completions for logprob in done.sampled_logprobs]
    )
    return Episodes(
        prompts,
        [tokenizer.decode(done.tokens) for done in completions],
        batch,
        torch.tensor([done.finish == "stop" for done in completions]),
        sampled,
    )


def _check_alike(tokens: Tensor) -> None:
    """Raise UserError unless the tensor-parallel ranks hold the same tokens."""
    digest = hashlib.sha256(tokens.numpy().tobytes()).digest()
    own = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(parallel.device())
    first = parallel.broadcast_from_first(own.clone())
    if parallel.any_rank(not torch.equal(own, first)):
        raise UserError(
            "the ranks sampled different tokens from one model; check that all see the same data and weights"
        )


@torch.no_grad()
def per_token(score: Callable[[Batch], Tensor], batch: Batch, max_batch_size: int) -> Tensor:
    """Lay a [N]-valued score of a batch out as [B, S], computed max_batch_size rows at a time."""
    laid_out = torch.zeros(batch.tokens.shape)
    for rows in torch.arange(len(batch.tokens)).split(max_batch_size):
        micro = trim(Batch(batch.tokens[rows], batch.response_mask[rows]))
        values = torch.zeros(micro.tokens.shape)
        values[micro.response_mask] = score(micro.to(parallel.device())).float().cpu()
        laid_out[rows, : values.shape[1]] = values
    return laid_out


def trim(batch: Batch) -> Batch:
    """Cut the columns behind the longest row."""
    length = int(batch.response_mask.any(0).nonzero().max()) + 1
    return Batch(batch.tokens[:, :length], batch.response_mask[:, :length])
