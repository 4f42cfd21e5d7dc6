"""Episodes: responses sampled from the current policy, laid out as they were sampled.

B episodes, S sequence, N response tokens of some episodes laid end to end in row order
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from src import parallel, runlog
from src.data import collate
from src.data.collate import Batch
from src.data.encoding import Encoded, encode_prompt
from src.data.examples import Prompt
from src.errors import UserError
from src.inference.engine import Completion, Request, generate, vocabulary_of
from src.inference.sampling import Sampling
from src.models.decoder import Decoder
from src.text.tokenizer import Tokenizer
from src.training.ppo_settings import Settings

Item = TypeVar("Item")

NAMED = 5  # prompts that a warning names; it counts all


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

    def take(self, rows: Tensor) -> "Episodes":
        """Some of the episodes, as wide as before. rows [K] int64."""
        return Episodes(
            [self.prompts[row] for row in rows],
            [self.responses[row] for row in rows],
            Batch(self.batch.tokens[rows], self.batch.response_mask[rows]),
            self.finished[rows],
            self.sampled_logprobs[rows],
        )


def join(parts: Sequence[Episodes]) -> Episodes:
    """Episodes below one another, padded to the longest."""
    width = max(part.batch.tokens.shape[1] for part in parts)

    def rows(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([widen(tensor, width) for tensor in tensors])

    return Episodes(
        [prompt for part in parts for prompt in part.prompts],
        [response for part in parts for response in part.responses],
        Batch(rows(part.batch.tokens for part in parts), rows(part.batch.response_mask for part in parts)),
        torch.cat([part.finished for part in parts]),
        rows(part.sampled_logprobs for part in parts),
    )


def widen(tensor: Tensor, width: int) -> Tensor:
    """[B, S] -> [B, width], zeros (padding's id, False) behind."""
    return F.pad(tensor, (0, width - tensor.shape[1]))


def fitting_prompts(
    prompts: Sequence[Prompt],
    source: str,
    tokenizer: Tokenizer,
    contexts: Mapping[str, int],
    max_new_tokens: int,
) -> list[Prompt]:
    """The prompts of the file `source` that leave every model a token of its context; warns of the others, by name.

    contexts: tokens by checkpoint directory. Warns too where a response may be cut off before max_new_tokens. Raises
    UserError if no prompt is left.
    """
    folder, context = min(contexts.items(), key=lambda item: item[1])
    n_tokens = [len(encode_prompt(tokenizer, prompt.instruction)) for prompt in prompts]
    left_out = [
        f"row {row} (id {prompt.id!r}, {n} tokens)"
        for row, (prompt, n) in enumerate(zip(prompts, n_tokens, strict=True), 1)
        if n >= context
    ]
    told = f"{source}: {len(left_out)} of {len(prompts)} prompts fill the context of {folder}, {context} tokens"
    if len(left_out) == len(prompts):
        raise UserError(f"{told}; the first is {left_out[0]}; shorten them or give models with a longer context")
    if left_out:
        more = ", ..." if len(left_out) > NAMED else ""
        runlog.logger().warning("%s, and are left out: %s%s", told, ", ".join(left_out[:NAMED]), more)
    kept = [prompt for prompt, n in zip(prompts, n_tokens, strict=True) if n < context]
    n_cut = sum(context - max_new_tokens < n < context for n in n_tokens)
    if n_cut:
        runlog.logger().warning(
            "%s: %d of %d prompts leave less than --max_new_tokens %d in the context of %s, %d tokens",
            source,
            n_cut,
            len(kept),
            max_new_tokens,
            folder,
            context,
        )
    return kept


def my_share(order: Sequence[Item]) -> Sequence[Item]:
    """What this data-parallel rank takes of things that are dealt out in this order."""
    return order[parallel.data_parallel_rank() :: parallel.data_parallel_size()]


def sample_episodes(
    actor: Decoder,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    settings: Settings,
    step: int,
    refill: int = 0,
) -> Episodes:
    """group_size responses to each prompt from the current policy; (seed, step, refill, id, place in the group) fixes
    each, whatever the number of ranks. Every data-parallel rank samples its share and gets all.

    Raises UserError unless all tensor-parallel ranks drew the same tokens.
    """
    size = settings.group_size
    first = (step * (1 + settings.max_refills) + refill) * size
    requests = [
        Request(prompt.id, first + place, encode_prompt(tokenizer, prompt.instruction))
        for prompt in prompts
        for place in range(size)
    ]
    done = _generate(actor, requests, tokenizer, settings, settings.temperature)
    in_order = [done[request.id, request.sample] for request in requests]
    return lay_out([prompt for prompt in prompts for _ in range(size)], in_order, tokenizer)


def greedy_accuracy(
    actor: Decoder,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    grade: Callable[[Sequence[str], Sequence[str]], list[str]],
    settings: Settings,
    n_left_out: int = 0,
) -> float:
    """Share of labelled prompts whose greedy response `grade` finds "right". The first rank's word holds.

    n_left_out: further prompts, too long to be answered, which are not right either.
    Every data-parallel rank grades its share.
    """
    requests = [
        Request(prompt.id, 0, encode_prompt(tokenizer, prompt.instruction)) for prompt in prompts
    ]
    done = _generate(actor, requests, tokenizer, settings, temperature=0.0)
    mine = my_share(prompts)
    outcomes = grade([done[prompt.id, 0].text for prompt in mine], [prompt.label or "" for prompt in mine])
    right = torch.tensor(float(outcomes.count("right")), device=parallel.device())
    right = parallel.broadcast_from_first(right).item()
    return parallel.sum_over_data_parallel(right) / (len(prompts) + n_left_out)


def _generate(
    actor: Decoder,
    requests: Sequence[Request],
    tokenizer: Tokenizer,
    settings: Settings,
    temperature: float,
) -> dict[tuple[str, int], Completion]:
    """All completions by id and sample, on every rank; each data-parallel rank samples its share."""
    sampling = Sampling(temperature=temperature, max_new_tokens=settings.max_new_tokens, seed=settings.seed)
    by_prompt = [list(same) for _, same in groupby(requests, key=lambda request: request.id)]
    mine = [request for same in my_share(by_prompt) for request in same]
    with parallel.gathered(actor):
        completions = generate(
            actor,
            mine,
            sampling,
            vocabulary=vocabulary_of(tokenizer),
            max_batch_size=settings.rollout_batch_size,
        )
        own = list(completions) if mine else []
    everyone = parallel.gather_over_data_parallel(own)
    return {(done.request.id, done.request.sample): done for done in everyone}


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
def per_token(
    model: Decoder, score: Callable[[Decoder, Batch], Tensor], batch: Batch, max_batch_size: int
) -> Tensor:
    """Lay a [N]-valued score of a batch out as [B, S], computed max_batch_size rows of like length at a time.

    Every data-parallel rank computes its share and gets all.
    """
    laid_out = torch.zeros(batch.tokens.shape)
    by_length = batch.response_mask.int().cumsum(1).argmax(1).argsort(stable=True)
    with parallel.gathered(model):
        for rows in my_share(by_length.split(max_batch_size)):
            micro = trim(Batch(batch.tokens[rows], batch.response_mask[rows]))
            values = torch.zeros(micro.tokens.shape)
            values[micro.response_mask] = score(model, micro.to(parallel.device())).float().cpu()
            laid_out[rows] = widen(values, laid_out.shape[1])
    return parallel.join_over_data_parallel(laid_out)


def trim(batch: Batch) -> Batch:
    """Cut the columns behind the longest row."""
    length = int(batch.response_mask.any(0).nonzero().max()) + 1
    return Batch(batch.tokens[:, :length], batch.response_mask[:, :length])
