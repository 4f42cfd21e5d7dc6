"""Proximal policy optimisation: episodes to rewards, rewards to advantages, advantages to updates.

B episodes, S sequence, N response tokens of some episodes laid end to end in row order
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from src import losses, parallel
from src.data import collate
from src.data.collate import Batch, Encoded
from src.data.examples import Prompt
from src.inference.engine import Completion, Request, generate, vocabulary_of
from src.inference.sampling import Sampling
from src.inference.scoring import logprobs_and_entropy, response_logprobs, response_scores, response_values
from src.models.decoder import Decoder
from src.text.tokenizer import Tokenizer
from src.training.loop import TrainLoop

SCORE_LIMIT = 5.0  # a verifier's normalised score beyond this many deviations is noise, not merit


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers of the algorithm; ppo_train.py's flags of the same names say what each means."""

    temperature: float
    max_new_tokens: int
    rollout_batch_size: int
    max_batch_size: int
    inner_epochs: int
    minibatches: int
    kl_coef: float
    clip_ratio: float
    value_clip: float
    gamma: float
    gae_lambda: float
    missing_eos_penalty: float
    seed: int


class Models(NamedTuple):
    """The three models that PPO needs beside the reward."""

    actor: Decoder
    reference: Decoder
    critic: Decoder


class TaskReward(Protocol):
    """What an episode is worth, apart from KL and penalties."""

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], batch: Batch) -> Tensor:
        """-> [B] float32 on the CPU, alike on every rank."""


class Rollouts(NamedTuple):
    """A buffer of episodes. Per-token tensors are [B, S] float32 on the CPU, 0 outside batch.response_mask."""

    batch: Batch
    responses: list[str]
    finished: Tensor  # [B] bool: the response ended by itself
    task_rewards: Tensor  # [B] float32
    old_logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor
    advantages: Tensor  # whitened over the buffer
    returns: Tensor


def sample_episodes(
    actor: Decoder, prompts: Sequence[Prompt], tokenizer: Tokenizer, settings: Settings, step: int
) -> list[Completion]:
    """One response to each prompt from the current policy, in prompt order; (seed, step, id) fixes it."""
    sampling = Sampling(
        temperature=settings.temperature, max_new_tokens=settings.max_new_tokens, seed=settings.seed
    )
    requests = [
        Request(prompt.id, step, collate.encode_prompt(tokenizer, prompt.instruction)) for prompt in prompts
    ]
    completions = generate(
        actor,
        requests,
        sampling,
        vocabulary=vocabulary_of(tokenizer),
        max_batch_size=settings.rollout_batch_size,
    )
    by_id = {completion.request.id: completion for completion in completions}
    return [by_id[prompt.id] for prompt in prompts]


def episodes_batch(completions: Sequence[Completion]) -> Batch:
    """Prompts and sampled tokens exactly as they were sampled, padded."""
    return collate.collate(
        [Encoded(done.request.prompt + done.tokens, len(done.request.prompt)) for done in completions]
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


def token_rewards(
    task_rewards: Tensor,
    finished: Tensor,
    kl: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    missing_eos_penalty: float,
) -> Tensor:
    """Reward of each token: -kl_coef * KL everywhere, the response's own reward at its last token.

    task_rewards [B], finished [B] bool, kl and mask [B, S] -> [B, S].
    """
    rewards = -kl_coef * kl * mask
    last = (torch.arange(mask.shape[1]) * mask).argmax(1)
    rewards[torch.arange(len(mask)), last] += task_rewards - missing_eos_penalty * ~finished
    return rewards


def collect(
    models: Models,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    task_reward: TaskReward,
    settings: Settings,
    step: int,
) -> Rollouts:
    """Fill a buffer: sample, score, and turn rewards into advantages.

    The old log-probs come from the training forward at the sampling temperature, not from the sampler, so that
    the first ratio of the update is 1 by construction.
    """
    completions = sample_episodes(models.actor, prompts, tokenizer, settings, step)
    batch = episodes_batch(completions)
    responses = [tokenizer.decode(done.tokens) for done in completions]
    finished = torch.tensor([done.finish == "stop" for done in completions])

    def logprobs_of(model: Decoder) -> Tensor:
        return per_token(
            lambda micro: response_logprobs(model, *micro, temperature=settings.temperature),
            batch,
            settings.max_batch_size,
        )

    old_logprobs, reference_logprobs = logprobs_of(models.actor), logprobs_of(models.reference)
    values = per_token(lambda micro: response_values(models.critic, *micro), batch, settings.max_batch_size)
    task_rewards = task_reward(prompts, responses, batch)
    mask = batch.response_mask
    rewards = token_rewards(
        task_rewards,
        finished,
        losses.kl_k1(old_logprobs, reference_logprobs),
        mask,
        kl_coef=settings.kl_coef,
        missing_eos_penalty=settings.missing_eos_penalty,
    )
    advantages = losses.gae(rewards, values, mask, settings.gamma, settings.gae_lambda)
    return Rollouts(
        batch,
        responses,
        finished,
        task_rewards,
        old_logprobs,
        reference_logprobs,
        values,
        losses.whiten(advantages, mask),
        (advantages + values) * mask,
    )


def minibatches(
    rollouts: Rollouts, settings: Settings, step: int, inner_epoch: int
) -> Iterator[list[Tensor]]:
    """The episodes of each optimizer step, as micro-batches of row numbers; shuffled by (seed, step, inner epoch).

    Inside a step rows are ordered by length: micro-batches then hold little padding, and the update is the same.
    """
    n = len(rollouts.batch.tokens)
    order = torch.tensor(collate.epoch_order(n, settings.seed, step * settings.inner_epochs + inner_epoch))
    lengths = (torch.arange(rollouts.batch.tokens.shape[1]) * rollouts.batch.response_mask).argmax(1)
    for rows in order.tensor_split(min(settings.minibatches, n)):
        yield list(rows[lengths[rows].argsort(stable=True)].split(settings.max_batch_size))


def update(
    actor_loop: TrainLoop,
    critic_loop: TrainLoop,
    rollouts: Rollouts,
    settings: Settings,
    step: int,
    *,
    train_actor: bool,
) -> dict[str, float]:
    """inner_epochs passes over a buffer, `minibatches` optimizer steps each. Returns means for the log."""
    sums: dict[str, float] = {
        "tokens": 0.0,
        "steps": 0.0,
        "policy_loss": 0.0,
        "value_loss": 0.0,
        "entropy": 0.0,
        "clipped": 0.0,
        "grad_norm": 0.0,
        "critic_grad_norm": 0.0,
        "ratio_deviation_max": 0.0,
    }
    for inner_epoch in range(settings.inner_epochs):
        for micros in minibatches(rollouts, settings, step, inner_epoch):
            n_tokens = int(rollouts.batch.response_mask[torch.cat(micros)].sum())
            for rows in micros:
                critic_loop.backward(critic_loss(critic_loop.model, rollouts, rows, settings, n_tokens))
                if train_actor:
                    loss, seen = actor_loss(actor_loop.model, rollouts, rows, settings, n_tokens)
                    actor_loop.backward(loss)
                    sums["entropy"] += seen.entropy
                    sums["clipped"] += seen.clipped
                    sums["ratio_deviation_max"] = max(sums["ratio_deviation_max"], seen.ratio_deviation_max)
            report = critic_loop.step()
            sums["value_loss"] += report.loss
            sums["critic_grad_norm"] += report.grad_norm
            if train_actor:
                report = actor_loop.step()
                sums["policy_loss"] += report.loss
                sums["grad_norm"] += report.grad_norm
            sums["tokens"] += n_tokens
            sums["steps"] += 1
    tokens, steps, worst = sums.pop("tokens"), sums.pop("steps"), sums.pop("ratio_deviation_max")
    per_token_names = ("entropy", "clipped")
    means = {name: value / (tokens if name in per_token_names else steps) for name, value in sums.items()}
    return means | {"ratio_deviation_max": worst}


class ActorSums(NamedTuple):
    """Sums over a micro-batch's tokens for the log, and the largest |ratio - 1| in it."""

    entropy: float
    clipped: float
    ratio_deviation_max: float


def actor_loss(
    actor: Decoder, rollouts: Rollouts, rows: Tensor, settings: Settings, normaliser: int
) -> tuple[Tensor, ActorSums]:
    """Clipped policy loss of some episodes, divided by the step's token count."""
    batch, pick = _rows(rollouts, rows)
    logprobs, entropy = logprobs_and_entropy(actor, *batch, temperature=settings.temperature)
    ratio = losses.probability_ratio(logprobs, pick(rollouts.old_logprobs))
    loss = losses.ppo_policy_loss(ratio, pick(rollouts.advantages), settings.clip_ratio)
    deviation = (ratio.detach() - 1).abs()
    sums = ActorSums(
        entropy.sum().item(), (deviation > settings.clip_ratio).sum().item(), deviation.max().item()
    )
    return loss.sum() / normaliser, sums


def critic_loss(
    critic: Decoder, rollouts: Rollouts, rows: Tensor, settings: Settings, normaliser: int
) -> Tensor:
    """Clipped value loss of some episodes, divided by the step's token count. -> scalar."""
    batch, pick = _rows(rollouts, rows)
    values = response_values(critic, *batch)
    loss = losses.ppo_value_loss(values, pick(rollouts.values), pick(rollouts.returns), settings.value_clip)
    return loss.sum() / normaliser


def _rows(rollouts: Rollouts, rows: Tensor) -> tuple[Batch, Callable[[Tensor], Tensor]]:
    """Some episodes of a buffer on the device, and how to pick their response tokens [N] from a [B, S] tensor."""
    mask = rollouts.batch.response_mask[rows]
    batch = trim(Batch(rollouts.batch.tokens[rows], mask)).to(parallel.device())
    return batch, lambda tensor: tensor[rows][mask].to(parallel.device())


def rollout_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Means over a buffer for the log."""
    mask = rollouts.batch.response_mask
    kl = losses.kl_k1(rollouts.old_logprobs, rollouts.reference_logprobs)[mask]
    return {
        "reward": rollouts.task_rewards.mean().item(),
        "reward_std": rollouts.task_rewards.std(unbiased=False).item(),
        "kl": kl.mean().item(),
        "response_tokens": mask.sum(1).float().mean().item(),
        "truncated_share": 1 - rollouts.finished.float().mean().item(),
        "explained_variance": losses.explained_variance(rollouts.values[mask], rollouts.returns[mask]).item(),
    }


def verifier_reward(verifier: Decoder, max_batch_size: int) -> TaskReward:
    """A verifier's normalised score of each response, within +-SCORE_LIMIT."""
    config = verifier.config

    @torch.no_grad()
    def reward(prompts: Sequence[Prompt], responses: Sequence[str], batch: Batch) -> Tensor:
        scores = []
        for rows in torch.arange(len(batch.tokens)).split(max_batch_size):
            micro = trim(Batch(batch.tokens[rows], batch.response_mask[rows])).to(parallel.device())
            scores.append(response_scores(verifier, *micro).cpu())
        return ((torch.cat(scores) - config.score_mean) / config.score_std).clamp(-SCORE_LIMIT, SCORE_LIMIT)

    return reward


def graded_reward(grade: Callable[[Sequence[str], Sequence[str]], Sequence[bool]]) -> TaskReward:
    """1 for a response that `grade` (of responses and labels) finds right, else 0. The first rank's word holds."""

    def reward(prompts: Sequence[Prompt], responses: Sequence[str], batch: Batch) -> Tensor:
        rewards = torch.zeros(len(responses), device=parallel.device())
        if parallel.tensor_parallel_rank() == 0:
            right = grade(responses, [prompt.label or "" for prompt in prompts])
            rewards += torch.tensor(right, dtype=torch.float32, device=parallel.device())
        return parallel.broadcast_from_first(rewards).cpu()

    return reward
