"""A rollout buffer: episodes sampled from the policy, what they earned, and the advantages that follow.

B episodes, S sequence, P prompts of G episodes each
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from src import losses, parallel
from src.data import collate
from src.data.collate import Batch
from src.data.examples import Prompt
from src.inference.scoring import response_logprobs, response_values
from src.models.decoder import Decoder
from src.models.lora import without_adapters
from src.runlog import Phases
from src.text.tokenizer import Tokenizer
from src.training.ppo_settings import Settings
from src.training.residence import Arrangement
from src.training.rewards import Part, Scored, join_scored, score_parts, settle_ending
from src.training.rollouts import Episodes, join, per_token, sample_episodes


class Models(NamedTuple):
    """The models that PPO needs beside the reward, and when they are in memory.

    reference None: the actor without its adapters. critic None: the estimator has none.
    """

    actor: Decoder
    reference: Decoder | None
    critic: Decoder | None
    arrangement: Arrangement = Arrangement()


class Sampled(NamedTuple):
    """What was sampled for a buffer, groups without signal that it does not hold included."""

    groups: int
    dead_groups: int
    mean_reward: float


class Rollouts(NamedTuple):
    """A buffer of episodes, alike on every rank. Per-token tensors are [B, S] float32 on the CPU, 0 outside the
    response mask."""

    episodes: Episodes
    reward_parts: dict[str, Tensor]  # each [B], summed over its tokens, not weighted
    task_rewards: Tensor  # [B]: their weighted sum, all of an episode's reward but KL and penalties
    old_logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor | None
    advantages: Tensor
    returns: Tensor | None
    weights: Tensor  # what each token weighs in the policy loss
    kept: Tensor  # [K] int64: the episodes that are learned from
    n_ids: int  # that the sampler could draw
    sampled: Sampled

    @property
    def batch(self) -> Batch:
        """The episodes' tokens."""
        return self.episodes.batch


def collect(
    models: Models,
    prompts: Callable[[int], Sequence[Prompt]],
    tokenizer: Tokenizer,
    parts: Mapping[str, Part],
    settings: Settings,
    step: int,
    phases: Phases,
) -> Rollouts:
    """Fill a buffer: sample, judge, and turn rewards into advantages. prompts(0) fills it, prompts(1) and on refill it.

    The old log-probs come from the training forward at the sampling temperature, not from the sampler, so that
    the first ratio of the update is 1 by construction.
    """
    parallel.release_memory()  # of the update before
    episodes, scored, sampled = _filled(models, prompts, tokenizer, parts, settings, step, phases)
    batch, mask = episodes.batch, episodes.batch.response_mask
    parallel.release_memory()  # of decoding and of the verifier
    with phases("score"):
        old_logprobs, reference_logprobs = policy_logprobs(models, batch, settings, tokenizer.vocab_size)
        values = critic_values(models, batch, settings)
    task_rewards = scored.task.sum(1)
    kept = kept_rows(task_rewards, episodes, settings)
    task = settle_ending(scored.task, episodes, settings)
    rewards = (task - settings.kl_coef * losses.kl_k1(old_logprobs, reference_logprobs)) * mask
    advantages, returns = estimate(rewards, values, mask, kept, settings)
    if settings.tis_cap:
        # the loss is proportional to the advantages: to weigh them is to weigh it
        advantages *= losses.truncated_importance(old_logprobs, episodes.sampled_logprobs, settings.tis_cap)
    weights = losses.sequence_weights(episodes.lengths, settings.loss_aggregation, settings.max_new_tokens)
    return Rollouts(
        episodes,
        {name: part.sum(1) for name, part in scored.parts.items()},
        task_rewards,
        old_logprobs,
        reference_logprobs,
        values,
        advantages,
        returns,
        weights[:, None] * mask,
        kept,
        tokenizer.vocab_size,
        sampled,
    )


def _filled(
    models: Models,
    prompts: Callable[[int], Sequence[Prompt]],
    tokenizer: Tokenizer,
    parts: Mapping[str, Part],
    settings: Settings,
    step: int,
    phases: Phases,
) -> tuple[Episodes, Scored, Sampled]:
    """The episodes of a buffer and what they earn.

    With max_refills groups without signal give their place to those of further prompts (dynamic sampling: DAPO, Yu et
    al. 2025, section 3.2) until the buffer is full or was refilled that often.
    """
    found: list[tuple[Episodes, Scored]] = []
    groups, dead, missing, everything = 0, 0, len(prompts(0)), []
    for refill in range(1 + settings.max_refills):
        with phases("sample"), models.arrangement.using(models.actor):
            episodes = sample_episodes(models.actor, prompts(refill), tokenizer, settings, step, refill)
        with phases("reward"):
            scored = score_parts(parts, episodes)
        task = scored.task.sum(1)
        alive = has_signal(task, settings.group_size)
        groups, dead = groups + len(alive), dead + int((~alive).sum())
        everything.append(task)
        if settings.max_refills:
            rows = alive.repeat_interleave(settings.group_size).nonzero()[: missing * settings.group_size, 0]
            missing -= len(rows) // settings.group_size
            part = episodes.take(rows), scored.take(rows)
        else:
            missing, part = 0, (episodes, scored)
        found += [part] if len(part[0].prompts) else []
        if not missing:
            break
    sampled = Sampled(groups, dead, torch.cat(everything).mean().item())
    if (
        not found
    ):  # nothing to learn from: the last ones stand for the log, and filter_groups keeps none of them
        return episodes, scored, sampled
    joined = join([episodes for episodes, _ in found])
    return joined, join_scored([scored for _, scored in found], joined.batch.tokens.shape[1]), sampled


def refill_rows(n_prompts: int, n_rows: int, settings: Settings, step: int, refill: int) -> list[int]:
    """Rows of the prompts that a buffer is refilled with: a pure function of (seed, step, refill)."""
    return collate.epoch_order(n_prompts, settings.seed, -(step * settings.max_refills + refill))[:n_rows]


def policy_logprobs(models: Models, batch: Batch, settings: Settings, n_ids: int) -> tuple[Tensor, Tensor]:
    """Log-probs of the response tokens under the actor and the reference, [B, S] each."""

    def logprobs(model: Decoder, micro: Batch) -> Tensor:
        return response_logprobs(model, *micro, temperature=settings.temperature, n_ids=n_ids)

    actor, reference, using = models.actor, models.reference, models.arrangement.using
    with using(actor):
        old = per_token(actor, logprobs, batch, settings.max_batch_size)
        if reference is None:
            with without_adapters(actor):
                return old, per_token(actor, logprobs, batch, settings.max_batch_size)
    with using(reference):
        return old, per_token(reference, logprobs, batch, settings.max_batch_size)


def critic_values(models: Models, batch: Batch, settings: Settings) -> Tensor | None:
    """The critic's value of the state before each response token, [B, S]; None without a critic."""
    if models.critic is None:
        return None
    with models.arrangement.using(models.critic):
        return per_token(
            models.critic,
            lambda critic, micro: response_values(critic, *micro),
            batch,
            settings.max_batch_size,
        )


def kept_rows(task_rewards: Tensor, episodes: Episodes, settings: Settings) -> Tensor:
    """The episodes that are learned from. task_rewards [B] -> [K] int64, K <= B.

    --filter_groups drops groups whose rewards are equal (DAPO, Yu et al. 2025, section 3.2), --truncated mask
    responses that did not end (its section 3.4).
    """
    keep = torch.ones(len(task_rewards), dtype=torch.bool)
    if settings.filter_groups:
        keep &= has_signal(task_rewards, settings.group_size).repeat_interleave(settings.group_size)
    if settings.truncated == "mask":
        keep &= episodes.finished
    return keep.nonzero()[:, 0]


def has_signal(task_rewards: Tensor, group_size: int) -> Tensor:
    """Whether the rewards in a group differ by more than rounding. [P * G] -> [P] bool."""
    groups = task_rewards.view(-1, group_size)
    return groups.amax(1) - groups.amin(1) > 1e-6


def estimate(
    rewards: Tensor, values: Tensor | None, mask: Tensor, kept: Tensor, settings: Settings
) -> tuple[Tensor, Tensor | None]:
    """Advantages, and for a critic the returns that it learns. rewards, mask [B, S] -> [B, S] each.

    Estimators with a critic or a baseline over the batch are whitened over the tokens of the kept rows; those of a
    group compare the whole reward of each episode with the others' and give all its tokens the same advantage.
    """
    learned = torch.zeros_like(mask)
    learned[kept] = mask[kept]

    def whitened(advantages: Tensor) -> Tensor:
        return _whitened(advantages, learned) if settings.whiten_advantages else advantages * learned

    if settings.whiten_rewards and learned.any():
        rewards = losses.whiten(rewards, mask, shift=False)
    if values is not None:
        advantages = losses.gae(rewards, values, mask, settings.gamma, settings.gae_lambda)
        returns = losses.gae(rewards, values, mask, settings.gamma, settings.critic_lambda) + values
        return whitened(advantages), returns * mask
    groups = rewards.sum(1).view(-1, settings.group_size)
    if settings.advantage == "reinforce++":
        advantages = losses.discounted_returns(rewards, mask, settings.gamma)
        if settings.group_size > 1:  # REINFORCE++-baseline
            advantages -= groups.mean(1).repeat_interleave(settings.group_size)[:, None]
        return whitened(advantages), None
    if settings.advantage == "rloo":
        of_groups = losses.rloo_advantages(groups)
    else:
        of_groups = losses.grpo_advantages(groups, divide_by_std=settings.advantage == "grpo")
    return of_groups.reshape(-1, 1) * mask, None


def _whitened(advantages: Tensor, learned: Tensor) -> Tensor:
    return losses.whiten(advantages, learned) if learned.any() else torch.zeros_like(advantages)
