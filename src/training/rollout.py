"""Rollouts: responses sampled from the current policy, laid out as they were sampled, and what models say of them.

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
from src.grading.grader import Grader
from src.inference.engine import Completion, Request, generate, vocabulary_of
from src.inference.sampling import Sampling
from src.models.decoder import Decoder
from src.models.forward import response_logprobs, response_values
from src.text.tokenizer import Tokenizer

Item = TypeVar("Item")

NAMED = 5  # prompts that a warning names; it counts all


class Rollout(NamedTuple):
    """A response to each prompt, alike on every rank; the responses to one prompt, a group, stand together."""

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

    def take(self, rows: Tensor) -> "Rollout":
        """Some of the episodes, as wide as before. rows [K] int64."""
        return Rollout(
            [self.prompts[row] for row in rows],
            [self.responses[row] for row in rows],
            Batch(self.batch.tokens[rows], self.batch.response_mask[rows]),
            self.finished[rows],
            self.sampled_logprobs[rows],
        )


def concatenate(parts: Sequence[Rollout]) -> Rollout:
    """Rollouts below one another, padded to the longest."""
    width = max(part.batch.tokens.shape[1] for part in parts)

    def rows(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([pad_to(tensor, width) for tensor in tensors])

    return Rollout(
        [prompt for part in parts for prompt in part.prompts],
        [response for part in parts for response in part.responses],
        Batch(rows(part.batch.tokens for part in parts), rows(part.batch.response_mask for part in parts)),
        torch.cat([part.finished for part in parts]),
        rows(part.sampled_logprobs for part in parts),
    )


def pad_to(tensor: Tensor, width: int) -> Tensor:
    """[B, S] -> [B, width], zeros (padding's id, False) behind."""
    return F.pad(tensor, (0, width - tensor.shape[1]))


def trim_padding(batch: Batch) -> Batch:
    """Cut the columns behind the longest row."""
    length = int(batch.response_mask.any(0).nonzero().max()) + 1
    return Batch(batch.tokens[:, :length], batch.response_mask[:, :length])


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


def shard_for_rank(order: Sequence[Item]) -> Sequence[Item]:
    """What this data-parallel rank takes of things that are dealt out in this order."""
    return order[parallel.data_parallel_rank() :: parallel.data_parallel_size()]


def sample_rollout(
    actor: Decoder,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    sampling: Sampling,
    *,
    group_size: int,
    first_sample: int,
    max_batch_size: int,
) -> Rollout:
    """group_size responses to each prompt from the current policy. Every data-parallel rank samples its share and
    gets all.

    (sampling.seed, prompt id, first_sample + place in the group) fixes each response, whatever the number of ranks.
    max_batch_size: sequences that decode at once. Raises UserError unless all tensor-parallel ranks drew the same.
    """
    requests = [
        Request(prompt.id, first_sample + place, encode_prompt(tokenizer, prompt.instruction))
        for prompt in prompts
        for place in range(group_size)
    ]
    done = _generate(actor, requests, tokenizer, sampling, max_batch_size)
    completions = [done[request.id, request.sample] for request in requests]
    batch = collate.collate(
        [Encoded(done.request.prompt + done.tokens, len(done.request.prompt)) for done in completions]
    )
    _check_alike(batch.tokens)
    sampled_logprobs = torch.zeros(batch.tokens.shape)
    sampled_logprobs[batch.response_mask] = torch.tensor(
        [logprob for done in completions for logprob in done.sampled_logprobs]
    )
    return Rollout(
        [prompt for prompt in prompts for _ in range(group_size)],
        [tokenizer.decode(done.tokens) for done in completions],
        batch,
        torch.tensor([done.finish == "stop" for done in completions]),
        sampled_logprobs,
    )


def greedy_accuracy(
    actor: Decoder,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    sampling: Sampling,
    grader: Grader,
    max_batch_size: int,
) -> float:
    """Share of labelled prompts whose greedy response grades right. The first rank's word holds.

    Every data-parallel rank grades its share.
    """
    requests = [Request(prompt.id, 0, encode_prompt(tokenizer, prompt.instruction)) for prompt in prompts]
    done = _generate(actor, requests, tokenizer, sampling, max_batch_size)
    mine = shard_for_rank(prompts)
    texts, labels = [done[prompt.id, 0].text for prompt in mine], [prompt.label or "" for prompt in mine]
    n_right = sum(verdict.outcome == "right" for verdict in grader.grade(texts, labels))
    right = torch.tensor(float(n_right), device=parallel.device())
    right = parallel.broadcast_from_first(right).item()
    return parallel.sum_over_data_parallel(right) / len(prompts)


def _generate(
    actor: Decoder,
    requests: Sequence[Request],
    tokenizer: Tokenizer,
    sampling: Sampling,
    max_batch_size: int,
) -> dict[tuple[str, int], Completion]:
    """All completions by id and sample, on every rank; each data-parallel rank samples its share."""
    by_prompt = [list(same) for _, same in groupby(requests, key=lambda request: request.id)]
    mine = [request for same in shard_for_rank(by_prompt) for request in same]
    with parallel.gathered(actor):
        completions = generate(
            actor, mine, sampling, vocabulary=vocabulary_of(tokenizer), max_batch_size=max_batch_size
        )
        own = list(completions) if mine else []
    everyone = parallel.gather_over_data_parallel(own)
    return {(done.request.id, done.request.sample): done for done in everyone}


def _check_alike(tokens: Tensor) -> None:
    """Raise UserError unless the tensor-parallel ranks hold the same tokens."""
    digest = hashlib.sha256(tokens.numpy().tobytes()).digest()
    own = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(parallel.device())
    first = parallel.broadcast_from_first(own.clone())
    if parallel.any_rank(not torch.equal(own, first)):
        raise UserError(
            "the ranks sampled different tokens from one model; check that all see the same data and weights"
        )


def rollout_logprobs(
    model: Decoder, batch: Batch, temperature: float, n_ids: int, max_batch_size: int
) -> Tensor:
    """Log-probs of the response tokens among the first n_ids ids, by the forward pass that training uses.
    -> [B, S] float32, nats, 0 outside the response mask."""
    return _per_token(
        lambda micro: response_logprobs(model, *micro, temperature=temperature, n_ids=n_ids),
        model, batch, max_batch_size,
    )  # fmt: skip


def rollout_values(critic: Decoder, batch: Batch, max_batch_size: int) -> Tensor:
    """The critic's value of the state before each response token. -> [B, S] float32, 0 outside the response mask."""
    return _per_token(lambda micro: response_values(critic, *micro), critic, batch, max_batch_size)


@torch.no_grad()
def _per_token(
    score: Callable[[Batch], Tensor], model: Decoder, batch: Batch, max_batch_size: int
) -> Tensor:
    """Lay a [N]-valued score by the model out as [B, S], computed max_batch_size rows of like length at a time.

    Every data-parallel rank computes its share and gets all.
    """
    laid_out = torch.zeros(batch.tokens.shape)
    by_length = batch.response_mask.int().cumsum(1).argmax(1).argsort(stable=True)
    with parallel.gathered(model):
        for rows in shard_for_rank(by_length.split(max_batch_size)):
            micro = trim_padding(Batch(batch.tokens[rows], batch.response_mask[rows]))
            values = torch.zeros(micro.tokens.shape)
            values[micro.response_mask] = score(micro.to(parallel.device())).float().cpu()
            laid_out[rows] = pad_to(values, laid_out.shape[1])
    return parallel.join_over_data_parallel(laid_out)
