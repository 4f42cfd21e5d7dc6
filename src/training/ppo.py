"""Proximal policy optimisation: episodes to rewards, rewards to advantages, advantages to updates.

B episodes, S sequence, N response tokens of some episodes laid end to end in row order
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from src import losses, parallel
from src.data import collate
from src.data.collate import Batch
from src.data.examples import Prompt
from src.inference.scoring import logprobs_and_entropy, response_logprobs, response_values
from src.models.decoder import Decoder
from src.models.lora import without_adapters
from src.runlog import Phases
from src.text.tokenizer import Tokenizer
from src.training.loop import StepReport, TrainLoop
from src.training.ppo_settings import Settings
from src.training.rewards import Part, score_parts, settle_ending
from src.training.rollouts import Episodes, per_token, sample_episodes, trim

KL_LOSSES = {"k2": losses.kl_k2, "k3": losses.kl_k3}


class Models(NamedTuple):
    """The models that PPO needs beside the reward.

    reference None: the actor without its adapters. critic None: the estimator has none.
    """

    actor: Decoder
    reference: Decoder | None
    critic: Decoder | None


class Rollouts(NamedTuple):
    """A buffer of episodes. Per-token tensors are [B, S] float32 on the CPU, 0 outside the response mask."""

    episodes: Episodes
    reward_parts: dict[str, Tensor]  # each [B], summed over its tokens
    old_logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor | None
    advantages: Tensor
    returns: Tensor | None
    weights: Tensor  # what each token weighs in the policy loss
    kept: Tensor  # [K] int64: the episodes that are learned from
    n_ids: int  # that the sampler could draw

    @property
    def batch(self) -> Batch:
        """The episodes' tokens."""
        return self.episodes.batch

    @property
    def task_rewards(self) -> Tensor:
        """All parts of an episode's reward but KL and penalties. [B] float32."""
        return torch.stack(list(self.reward_parts.values())).sum(0)


def collect(
    models: Models,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    parts: Mapping[str, Part],
    settings: Settings,
    step: int,
    phases: Phases,
) -> Rollouts:
    """Fill a buffer: sample, score, and turn rewards into advantages.

    The old log-probs come from the training forward at the sampling temperature, not from the sampler, so that
    the first ratio of the update is 1 by construction.
    """
    with phases("sample"):
        episodes = sample_episodes(models.actor, prompts, tokenizer, settings, step)
    batch, mask = episodes.batch, episodes.batch.response_mask

    def logprobs_of(model: Decoder) -> Tensor:
        return per_token(
            lambda micro: response_logprobs(
                model, *micro, temperature=settings.temperature, n_ids=tokenizer.vocab_size
            ),
            batch,
            settings.max_batch_size,
        )

    with phases("score"):
        old_logprobs = logprobs_of(models.actor)
        with contextlib.nullcontext() if models.reference else without_adapters(models.actor):
            reference_logprobs = logprobs_of(models.reference or models.actor)
        critic, values = models.critic, None
        if critic is not None:
            values = per_token(lambda micro: response_values(critic, *micro), batch, settings.max_batch_size)
    with phases("reward"):
        scored = score_parts(parts, episodes)
    reward_parts = {name: reward.sum(1) for name, reward in scored.items()}
    kept = kept_rows(torch.stack(list(reward_parts.values())).sum(0), episodes, settings)
    task = settle_ending(torch.stack(list(scored.values())).sum(0), episodes, settings)
    rewards = (task - settings.kl_coef * losses.kl_k1(old_logprobs, reference_logprobs)) * mask
    weights = losses.sequence_weights(episodes.lengths, settings.loss_aggregation, settings.max_new_tokens)
    return Rollouts(
        episodes,
        reward_parts,
        old_logprobs,
        reference_logprobs,
        values,
        *estimate(rewards, values, mask, kept, settings),
        weights[:, None] * mask,
        kept,
        tokenizer.vocab_size,
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
    if values is not None:
        advantages = losses.gae(rewards, values, mask, settings.gamma, settings.gae_lambda)
        returns = losses.gae(rewards, values, mask, settings.gamma, settings.critic_lambda) + values
        return _whitened(advantages, learned), returns * mask
    groups = rewards.sum(1).view(-1, settings.group_size)
    if settings.advantage == "reinforce++":
        advantages = losses.discounted_returns(rewards, mask, settings.gamma)
        if settings.group_size > 1:  # REINFORCE++-baseline
            advantages -= groups.mean(1).repeat_interleave(settings.group_size)[:, None]
        return _whitened(advantages, learned), None
    if settings.advantage == "rloo":
        of_groups = losses.rloo_advantages(groups)
    else:
        of_groups = losses.grpo_advantages(groups, divide_by_std=settings.advantage == "grpo")
    return of_groups.reshape(-1, 1) * mask, None


def _whitened(advantages: Tensor, learned: Tensor) -> Tensor:
    return losses.whiten(advantages, learned) if learned.any() else torch.zeros_like(advantages)


def minibatches(
    rollouts: Rollouts, settings: Settings, step: int, inner_epoch: int
) -> Iterator[list[Tensor]]:
    """The episodes of each optimizer step, as micro-batches of row numbers; shuffled by (seed, step, inner epoch).

    Inside a step rows are ordered by length: micro-batches then hold little padding, and the update is the same.
    Yields nothing where no episode is kept.
    """
    n = len(rollouts.kept)
    order = collate.epoch_order(n, settings.seed, step * settings.inner_epochs + inner_epoch)
    kept = rollouts.kept[torch.tensor(order, dtype=torch.int64)]
    for rows in kept.tensor_split(min(settings.minibatches, n)) if n else ():
        yield list(rows[rollouts.episodes.last[rows].argsort(stable=True)].split(settings.max_batch_size))


class ActorSums(NamedTuple):
    """Sums over a micro-batch's tokens for the log, and the largest |ratio - 1| in it."""

    entropy: float
    clipped_low: float
    clipped_high: float
    ratio_deviation_max: float


def update(
    actor_loop: TrainLoop,
    critic_loop: TrainLoop | None,
    rollouts: Rollouts,
    settings: Settings,
    step: int,
    *,
    train_actor: bool,
) -> dict[str, float]:
    """inner_epochs passes over a buffer, `minibatches` optimizer steps each. Returns means for the log."""
    seen: list[ActorSums] = []
    actor_steps: list[StepReport] = []
    critic_steps: list[StepReport] = []
    n_tokens = 0
    for inner_epoch in range(settings.inner_epochs):
        for micros in minibatches(rollouts, settings, step, inner_epoch):
            rows_of_step = torch.cat(micros)
            tokens = int(rollouts.batch.response_mask[rows_of_step].sum())
            n_tokens += tokens
            for rows in micros if critic_loop is not None else ():
                critic_loop.backward(critic_loss(critic_loop.model, rollouts, rows, settings, tokens))
            for rows in micros if train_actor else ():
                normaliser = tokens if settings.loss_aggregation == "token-mean" else len(rows_of_step)
                loss, sums = actor_loss(actor_loop.model, rollouts, rows, settings, normaliser)
                actor_loop.backward(loss)
                seen.append(sums)
            if critic_loop is not None:
                critic_steps.append(critic_loop.step())
            if train_actor:
                actor_steps.append(actor_loop.step())
    return _update_metrics(seen, n_tokens, actor_steps, critic_steps)


def _update_metrics(
    seen: Sequence[ActorSums],
    n_tokens: int,
    actor_steps: Sequence[StepReport],
    critic_steps: Sequence[StepReport],
) -> dict[str, float]:
    """Means over the tokens and optimizer steps of an update."""

    def mean(values: Iterator[float], count: int) -> float:
        return sum(values) / max(1, count)

    return {
        "policy_loss": mean((report.loss for report in actor_steps), len(actor_steps)),
        "grad_norm": mean((report.grad_norm for report in actor_steps), len(actor_steps)),
        "value_loss": mean((report.loss for report in critic_steps), len(critic_steps)),
        "critic_grad_norm": mean((report.grad_norm for report in critic_steps), len(critic_steps)),
        "entropy": mean((sums.entropy for sums in seen), n_tokens),
        "clipped_low": mean((sums.clipped_low for sums in seen), n_tokens),
        "clipped_high": mean((sums.clipped_high for sums in seen), n_tokens),
        "ratio_deviation_max": max((sums.ratio_deviation_max for sums in seen), default=0.0),
        "first_ratio_deviation": seen[0].ratio_deviation_max if seen else 0.0,
    }


def actor_loss(
    actor: Decoder, rollouts: Rollouts, rows: Tensor, settings: Settings, normaliser: int
) -> tuple[Tensor, ActorSums]:
    """Clipped policy loss of some episodes with its KL and entropy terms, weighted and divided by the step's count."""
    batch, pick = _rows(rollouts, rows)
    logprobs, entropy = logprobs_and_entropy(
        actor,
        *batch,
        temperature=settings.temperature,
        n_ids=rollouts.n_ids,
        learn_entropy=settings.entropy_coef > 0,
    )
    ratio = losses.probability_ratio(logprobs, pick(rollouts.old_logprobs))
    loss = losses.ppo_policy_loss(
        ratio, pick(rollouts.advantages), settings.clip_ratio, settings.clip_high, settings.dual_clip
    )
    if settings.kl_loss != "none":
        kl = KL_LOSSES[settings.kl_loss](logprobs, pick(rollouts.reference_logprobs))
        loss = loss + settings.kl_loss_coef * kl
    if settings.entropy_coef:
        loss = loss - settings.entropy_coef * entropy
    deviation = ratio.detach() - 1
    sums = ActorSums(
        entropy.sum().item(),
        (deviation < -settings.clip_ratio).sum().item(),
        (deviation > settings.clip_high).sum().item(),
        deviation.abs().max().item(),
    )
    return (loss * pick(rollouts.weights)).sum() / normaliser, sums


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
