"""Rollouts: responses sampled from the current policy, laid out as they were sampled, and what models say of them.

B episodes, S sequence, N response tokens of some episodes laid end to end in row order
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress, groupby
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from src import context_parallel, parallel
from src.code_solutions.tool_hook import INFRASTRUCTURE, Coding
from src.data.batch import Batch, make_batch, pack_shared
from src.data.encoding import Encoded, encode_prompt
from src.data.examples import Prompt
from src.errors import UserError
from src.inference.engine import Completion, Request, generate, vocabulary_of
from src.inference.sampling import Sampling
from src.models.decoder import Decoder
from src.models.forward import Distribution, response_logprobs, response_values
from src.text.tokenizer import Tokenizer
from src.training.policy_server import PolicyServers

Item = TypeVar("Item")


class Rollout(NamedTuple):
    """A response to each prompt, alike on every rank; the responses to one prompt, a group, stand together. What code
    printed stands in a response, but outside batch.response_mask: the policy did not sample it."""

    prompts: list[Prompt]
    responses: list[str]
    batch: Batch
    finished: Tensor  # [B] bool: the response ended by itself
    sampled_logprobs: Tensor  # [B, S] float32: of the distribution that was sampled from, 0 outside batch.response_mask
    executions: Sequence[Sequence[str]]  # how each run of a response's code ended; in text alone there is none

    @property
    def lengths(self) -> Tensor:
        """Sampled tokens of each episode. [B] int64."""
        return self.batch.response_mask.sum(1)

    @property
    def last(self) -> Tensor:
        """Column of each response's last sampled token. [B] int64."""
        mask = self.batch.response_mask
        return (torch.arange(mask.shape[1]) * mask).argmax(1)

    def by_group(self, rows: Tensor, group_size: int) -> Tensor:
        """These episodes, those of a group together, groups of the shortest first. [K] int64 -> [K]."""
        # sorted, the rows of a group are neighbours: they share their prompt in a pass
        rows = rows.sort().values
        longest = self.last.view(-1, group_size).amax(1)
        return rows[longest[rows // group_size].argsort(stable=True)]

    def take(self, rows: Tensor) -> "Rollout":
        """Some of the episodes, as wide as before. rows [K] int64."""
        return Rollout(
            [self.prompts[row] for row in rows],
            [self.responses[row] for row in rows],
            Batch(self.batch.tokens[rows], self.batch.response_mask[rows]),
            self.finished[rows],
            self.sampled_logprobs[rows],
            [self.executions[row] for row in rows])


def pack_episodes(batch: Batch, rows: Tensor) -> Batch:
    """Some episodes for a forward pass: end to end, a prompt that neighbours have in common only once.

    tokens, mask [B, S], rows [n] int64 -> [1, L]. The response tokens keep their order.
    """
    episodes = []
    for tokens, mask in zip(batch.tokens[rows], batch.response_mask[rows], strict=True):
        places = mask.nonzero()[:, 0]
        end = int(places[-1]) + 1
        episodes.append(Encoded(tokens[:end].tolist(), int(places[0]), answer_mask=mask[:end].tolist()))
    groups = groupby(episodes, lambda episode: episode.tokens[: episode.response_start])
    return pack_shared([tuple(group) for _, group in groups])


def shard_for_rank(order: Sequence[Item]) -> Sequence[Item]:
    """What this data-parallel rank takes of things that are dealt out in this order."""
    # every n-th, not a block: neighbours in an order of length are alike in what they take
    return order[parallel.data_parallel_rank() :: parallel.data_parallel_size()]


def requests_of(prompts: Sequence[Prompt], tokenizer: Tokenizer, numbers: range) -> list[list[Request]]:
    """A group of requests to each prompt, of these numbers."""
    encoded = [(prompt.id, encode_prompt(tokenizer, prompt.instruction, where=prompt.where)) for prompt in prompts]
    return [[Request(name, number, tokens) for number in numbers] for name, tokens in encoded]


def sample_rollout(
    actor: Decoder, prompts: Sequence[Prompt], tokenizer: Tokenizer, sampling: Sampling, *, numbers: range,
    max_batch_size: int, servers: PolicyServers | None = None, coding: Coding | None = None,
) -> Rollout:
    """A group of responses to each prompt, of these numbers, from the current policy. Every data-parallel rank, also
    of those that share batches, samples its part of them and gets all.

    (sampling.seed, prompt id, number) fixes each response, whatever the number of ranks. max_batch_size: sequences that
    decode at once. servers: they sample instead of the actor. coding: runs the code of responses. Raises UserError
    where code could not be run, and unless all tensor-parallel ranks sampled the same.
    """
    by_prompt = requests_of(prompts, tokenizer, numbers)
    # Whole groups: the samples of a prompt share its prefill
    mine = [request for group in context_parallel.share(shard_for_rank(by_prompt)) for request in group]
    if servers:
        requests = [request for group in by_prompt for request in group]
        completions = parallel.from_first_rank(lambda: servers.sample(requests, sampling))
        return _rollout(prompts, completions, len(numbers))
    if coding:
        sampling = coding.sampling(sampling)
    tool_hook = coding.tool_hook(whole=True) if coding else None
    # Ranks sample different numbers of tokens: FSDP's exchanges inside a forward pass would wait for ever
    with parallel.gathered(actor):
        found = list(generate(actor, mine, sampling, vocabulary=vocabulary_of(tokenizer),
                              max_batch_size=max_batch_size, tool_hook=tool_hook)) if mine else []
    found = parallel.gather_over_data_parallel(context_parallel.gather(found))
    everyone = {(done.request.id, done.request.sample): done for done in found}
    completions = [everyone[request.id, request.sample] for group in by_prompt for request in group]
    for done in completions:
        if done.finish.startswith(INFRASTRUCTURE):
            raise UserError(f"the code of a response to prompt {done.request.id!r} could not be run, and nothing was "
                            f"learnt from its buffer: {done.finish}; go on with --resume auto")
    return _rollout(prompts, completions, len(numbers))


def _rollout(prompts: Sequence[Prompt], completions: Sequence[Completion], group_size: int) -> Rollout:
    """Lay responses out, group_size to each prompt. Raises UserError unless the ranks hold the same."""
    batch = make_batch([
        Encoded(done.request.prompt + done.tokens, n, answer_mask=[False] * n + done.is_sampled)
        for done in completions for n in (len(done.request.prompt),)])
    _check_alike(batch.tokens)
    sampled_logprobs = torch.zeros(batch.tokens.shape)
    sampled_logprobs[batch.response_mask] = torch.tensor(
        [logprob for done in completions for logprob in compress(done.sampled_logprobs, done.is_sampled)])
    return Rollout(
        [prompt for prompt in prompts for _ in range(group_size)],
        [done.text for done in completions],
        batch,
        torch.tensor([done.finish == "stop" for done in completions]),
        sampled_logprobs,
        [done.tool_results for done in completions])


def _check_alike(tokens: Tensor) -> None:
    """Raise UserError unless the tensor-parallel ranks hold the same tokens [B, S]."""
    digest = hashlib.sha256(tokens.numpy().tobytes()).digest()  # 32 bytes to send, whatever the buffer's size
    own = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(parallel.device())
    first = parallel.broadcast_from_first(own.clone())
    if parallel.any_rank(not torch.equal(own, first)):
        raise UserError("the ranks sampled different tokens from one model; check that all see the same data and "
                        "weights")


def rollout_logprobs(
    model: Decoder, batch: Batch, distribution: Distribution, passes: Sequence[Tensor]
) -> Tensor:
    """Log-probs of the response tokens where they were sampled from, by the forward pass that training uses.
    passes: the rows [n] int64 that are read at once. -> [B, S] float32, nats, 0 outside the response mask."""
    return _per_token(partial(response_logprobs, model, distribution=distribution), model, batch, passes)


def rollout_values(critic: Decoder, batch: Batch, passes: Sequence[Tensor]) -> Tensor:
    """The critic's value of the state before each response token. -> [B, S] float32, 0 outside the response mask."""
    return _per_token(partial(response_values, critic), critic, batch, passes)


@torch.no_grad()
def _per_token(score: Callable[..., Tensor], model: Decoder, batch: Batch, passes: Sequence[Tensor]) -> Tensor:
    """A score of each response token as [B, S]: score(tokens, response_mask, lengths) -> [N] of one pass's rows.

    Every data-parallel rank computes its share and gets all.
    """
    laid_out = torch.zeros(batch.tokens.shape)
    with parallel.gathered(model):  # ranks may have different numbers of passes
        mine = shard_for_rank(passes)
        scores = [score(*pack_episodes(batch, rows).inputs).float() for rows in mine]  # read when all are under way
    for rows, found in zip(mine, scores, strict=True):
        values = torch.zeros(len(rows), laid_out.shape[1])
        values[batch.response_mask[rows]] = found.cpu()
        laid_out[rows] = values
    return parallel.join_over_data_parallel(laid_out)
