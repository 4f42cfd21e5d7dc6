"""Proximal policy optimisation: the rewards of a rollout to advantages, and these to updates of actor and critic.

B episodes, S sequence, P prompts of G episodes each, N response tokens of some episodes laid end to end in row order
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from src import losses, parallel
from src.data import collate
from src.data.collate import Batch
from src.models.decoder import Decoder
from src.models.forward import logprobs_and_entropy, response_values
from src.training.ppo_config import AdvantageFlags, PPOConfig
from src.training.rewards import Scores, concatenate_scores
from src.training.rollout import Rollout, concatenate, shard_for_rank, trim_padding
from src.training.trainer import Trainer

KL_LOSSES = {"k2": losses.kl_k2, "k3": losses.kl_k3}


class PPOBuffer(NamedTuple):
    """What an update learns from, alike on every rank. Per-token tensors are [B, S] float32 on the CPU, 0 outside the
    response mask."""

    rollout: Rollout
    logprobs: Tensor  # of the policy that sampled, by the forward pass that training uses
    reference_logprobs: Tensor
    values: Tensor | None
    advantages: Tensor
    returns: Tensor | None
    weights: Tensor  # what each token weighs in the policy loss
    trainable: Tensor  # [K] int64: the episodes that are learned from
    n_ids: int  # that the sampler could draw

    @property
    def batch(self) -> Batch:
        """The episodes' tokens and response mask."""
        return self.rollout.batch


def group_has_variance(scores: Tensor, group_size: int) -> Tensor:
    """Whether the scores in a group differ by more than rounding. [P * G] -> [P] bool."""
    groups = scores.view(-1, group_size)
    return groups.amax(1) - groups.amin(1) > 1e-6


class Groups(NamedTuple):
    """What was sampled for a buffer, groups without variance that gave their place to others included."""

    n: int
    without_variance: int
    mean_score: float


def fill_buffer(
    sample: Callable[[int], tuple[Rollout, Scores]], config: PPOConfig
) -> tuple[Rollout, Scores, Groups]:
    """The episodes of a buffer and what they earn. sample(0) fills it, sample(1) and on refill it.

    With max_refills groups without variance give their place to those of further prompts (dynamic sampling: DAPO, Yu et
    al. 2025, section 3.2) until the buffer is full or was refilled that often.
    """
    found: list[tuple[Rollout, Scores]] = []
    has_variance, everything, missing = [], [], 0
    for refill in range(1 + config.max_refills):
        rollout, scores = sample(refill)
        everything.append(scores.total.sum(1))
        alive = group_has_variance(everything[-1], config.group_size)
        has_variance.append(alive)
        missing = missing if refill else len(alive)
        rows = torch.arange(len(alive) * config.group_size)
        if config.max_refills:
            rows = rows[alive.repeat_interleave(config.group_size)][: missing * config.group_size]
        missing -= len(rows) // config.group_size
        if len(rows):
            found.append((rollout.take(rows), scores.take(rows)))
        if not missing:
            break
    alive = torch.cat(has_variance)
    groups = Groups(len(alive), int((~alive).sum()), torch.cat(everything).mean().item())
    if not found:  # nothing to learn from: the last ones stand for the log, and filter_groups keeps none of them
        return rollout, scores, groups
    joined = concatenate([rollout for rollout, _ in found])
    return joined, concatenate_scores([scores for _, scores in found], joined.batch.tokens.shape[1]), groups


def trainable_rows(scores: Tensor, rollout: Rollout, config: PPOConfig) -> Tensor:
    """The episodes that are learned from. scores [B] -> [K] int64, K <= B.

    --filter_groups drops groups whose scores are equal (DAPO, Yu et al. 2025, section 3.2), --truncated mask responses
    that did not end (its section 3.4).
    """
    keep = torch.ones(len(scores), dtype=torch.bool)
    if config.filter_groups:
        keep &= group_has_variance(scores, config.group_size).repeat_interleave(config.group_size)
    if config.truncated == "mask":
        keep &= rollout.finished
    return keep.nonzero()[:, 0]


def compute_advantages(
    rewards: Tensor, values: Tensor | None, mask: Tensor, trainable: Tensor, flags: AdvantageFlags, group_size: int
) -> tuple[Tensor, Tensor | None]:
    """Advantages, and for a critic the returns that it learns. rewards, mask [B, S] -> [B, S] each.

    Estimators with a critic or a baseline over the batch are whitened over the tokens of the trainable rows; those of a
    group compare the whole reward of each episode with the others' and give all its tokens the same advantage.
    """
    learned = torch.zeros_like(mask)
    learned[trainable] = mask[trainable]

    def whitened(advantages: Tensor) -> Tensor:
        if not flags.whiten_advantages:
            return advantages * learned
        return losses.whiten(advantages, learned) if learned.any() else torch.zeros_like(advantages)

    if flags.whiten_rewards and learned.any():
        rewards = losses.whiten(rewards, mask, shift=False)
    if values is not None:
        advantages = losses.gae(rewards, values, mask, flags.gamma, flags.gae_lambda)
        returns = losses.gae(rewards, values, mask, flags.gamma, flags.critic_lambda) + values
        return whitened(advantages), returns * mask
    groups = rewards.sum(1).view(-1, group_size)
    if flags.advantage == "reinforce++":
        advantages = losses.discounted_returns(rewards, mask, flags.gamma)
        if group_size > 1:  # REINFORCE++-baseline
            advantages -= groups.mean(1).repeat_interleave(group_size)[:, None]
        return whitened(advantages), None
    if flags.advantage == "rloo":
        of_groups = losses.rloo_advantages(groups)
    else:
        of_groups = losses.grpo_advantages(groups, divide_by_std=flags.advantage == "grpo")
    return of_groups.reshape(-1, 1) * mask, None


class MicroBatch(NamedTuple):
    """A forward pass of a data-parallel rank: rows of the buffer, which count unless the rank only keeps others
    company."""

    rows: Tensor
    counts: bool = True


class OptimizerStep(NamedTuple):
    """This rank's forward passes of an optimizer step, and what all ranks' passes hold together."""

    micros: list[MicroBatch]
    episodes: int
    tokens: int


def minibatches(
    buffer: PPOBuffer, config: PPOConfig, iteration: int, inner_epoch: int
) -> Iterator[OptimizerStep]:
    """The optimizer steps of a pass over the buffer; shuffled by (seed, iteration, inner epoch).

    Inside a step rows are ordered by length and dealt in turn to the data-parallel ranks: passes hold little padding,
    and those that run at the same time are alike in size. The update does not depend on it. Yields nothing where no
    episode is trainable.
    """
    n = len(buffer.trainable)
    order = collate.epoch_order(n, config.seed, iteration * config.inner_epochs + inner_epoch)
    rows_in_order = buffer.trainable[torch.tensor(order, dtype=torch.int64)]
    for rows in rows_in_order.tensor_split(min(config.minibatches, n)) if n else ():
        by_length = rows[buffer.rollout.last[rows].argsort(stable=True)]
        passes = by_length.split(config.max_batch_size)
        micros = [MicroBatch(part) for part in shard_for_rank(passes)]
        busiest = -(-len(passes) // parallel.data_parallel_size())
        micros += [MicroBatch(by_length[:1], counts=False)] * (busiest - len(micros))
        yield OptimizerStep(micros, len(rows), int(buffer.batch.response_mask[rows].sum()))


class ActorSums(NamedTuple):
    """Sums over a forward pass's tokens for the log, and the largest |ratio - 1| in it."""

    entropy: float
    clipped_low: float
    clipped_high: float
    kl_loss: float
    ratio_deviation_max: float


# What the log says of a buffer that had nothing to learn from
NOTHING_LEARNED = dict.fromkeys(
    (
        "policy_loss", "grad_norm", "lr", "value_loss", "critic_grad_norm", "value_clipped", "critic_lr", "entropy",
        "kl_loss", "clipped_low", "clipped_high", "ratio_deviation_max", "first_ratio_deviation",
    ), 0.0,
)  # fmt: skip


def update_critic(trainer: Trainer, buffer: PPOBuffer, config: PPOConfig, iteration: int) -> dict[str, float]:
    """inner_epochs passes of the critic over a buffer. Returns means over their tokens and steps for the log."""
    # the rate follows the buffers, also those that gave fewer steps
    trainer.set_step(iteration * config.steps_per_buffer)
    clipped: list[float] = []
    reports, n_tokens = [], 0
    for now in _steps(buffer, config, iteration):
        for micro in now.micros:
            loss, n_clipped = critic_loss(trainer.model, buffer, micro, config, now.tokens)
            trainer.backward(loss, last=micro is now.micros[-1])
            clipped.append(n_clipped)
        reports.append(trainer.step())
        n_tokens += now.tokens
    return {
        "value_loss": _mean([report.loss for report in reports]),
        "critic_grad_norm": _mean([report.grad_norm for report in reports]),
        "value_clipped": parallel.sum_over_data_parallel(sum(clipped)) / max(1, n_tokens),
        "critic_lr": _mean([report.lr for report in reports]),
    }


def update_actor(
    trainer: Trainer, buffer: PPOBuffer, config: PPOConfig, iteration: int, critic_warmup: int = 0
) -> dict[str, float]:
    """inner_epochs passes of the actor over a buffer. Returns means over their tokens and steps, and the largest
    deviations of a ratio from 1, for the log. critic_warmup: iterations in which it did not learn."""
    trainer.set_step((iteration - critic_warmup) * config.steps_per_buffer)
    seen: list[ActorSums] = []
    first: list[float] = []  # of the very first pass of each rank, before any step
    reports, n_tokens = [], 0
    for now in _steps(buffer, config, iteration):
        normaliser = now.tokens if config.loss_aggregation == "token-mean" else now.episodes
        for micro in now.micros:
            loss, sums = actor_loss(trainer.model, buffer, micro, config, normaliser)
            trainer.backward(loss, last=micro is now.micros[-1])
            seen.append(sums)
        first = first or [sums.ratio_deviation_max for sums in seen]
        reports.append(trainer.step())
        n_tokens += now.tokens
    seen, first = (parallel.gather_over_data_parallel(found) for found in (seen, first))
    totals = {name: sum(getattr(sums, name) for sums in seen) for name in ActorSums._fields[:-1]}
    return {
        "policy_loss": _mean([report.loss for report in reports]),
        "grad_norm": _mean([report.grad_norm for report in reports]),
        "lr": _mean([report.lr for report in reports]),
        **{name: total / max(1, n_tokens) for name, total in totals.items()},
        "ratio_deviation_max": max((sums.ratio_deviation_max for sums in seen), default=0.0),
        "first_ratio_deviation": max(first, default=0.0),
    }


def _steps(buffer: PPOBuffer, config: PPOConfig, iteration: int) -> Iterator[OptimizerStep]:
    """The optimizer steps of all passes over a buffer."""
    for inner_epoch in range(config.inner_epochs):
        yield from minibatches(buffer, config, iteration, inner_epoch)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def actor_loss(
    actor: Decoder, buffer: PPOBuffer, micro: MicroBatch, config: PPOConfig, normaliser: int
) -> tuple[Tensor, ActorSums]:
    """Clipped policy loss of some episodes with its KL and entropy terms, weighted and divided by the step's count."""
    batch, pick = _rows(buffer, micro)
    logprobs, entropy = logprobs_and_entropy(
        actor,
        *batch,
        temperature=config.temperature,
        n_ids=buffer.n_ids,
        learn_entropy=config.entropy_coef > 0,
    )
    ratio = losses.probability_ratio(logprobs, pick(buffer.logprobs))
    loss = losses.ppo_policy_loss(
        ratio, pick(buffer.advantages), config.clip_ratio, config.clip_high, config.dual_clip
    )
    kl = torch.zeros(())
    if config.kl_loss != "none":
        kl = KL_LOSSES[config.kl_loss](logprobs, pick(buffer.reference_logprobs))
        loss = loss + config.kl_loss_coef * kl
    if config.entropy_coef:
        loss = loss - config.entropy_coef * entropy
    deviation = ratio.detach() - 1
    sums = ActorSums(
        entropy.sum().item(),
        (deviation < -config.clip_ratio).sum().item(),
        (deviation > config.clip_high).sum().item(),
        kl.sum().item(),
        deviation.abs().max().item() if micro.counts else 0.0,
    )
    return (loss * pick(buffer.weights)).sum() / normaliser, sums


def critic_loss(
    critic: Decoder, buffer: PPOBuffer, micro: MicroBatch, config: PPOConfig, normaliser: int
) -> tuple[Tensor, float]:
    """Clipped value loss of some episodes, divided by the step's token count. -> scalar, and how many values were
    farther from their old ones than the clip allows."""
    batch, pick = _rows(buffer, micro)
    values, old = response_values(critic, *batch), pick(buffer.values)
    loss = losses.ppo_value_loss(values, old, pick(buffer.returns), config.value_clip)
    n_clipped = ((values.detach() - old).abs() > config.value_clip).sum().item()
    return loss.sum() / normaliser, n_clipped


def _rows(buffer: PPOBuffer, micro: MicroBatch) -> tuple[Batch, Callable[[Tensor], Tensor]]:
    """Some episodes of a buffer on the device, and how to pick their response tokens [N] from a [B, S] tensor."""
    batch = trim_padding(Batch(buffer.batch.tokens[micro.rows], buffer.batch.response_mask[micro.rows]))
    batch = Batch(batch.tokens, batch.response_mask & micro.counts).to(parallel.device())
    wanted = buffer.batch.response_mask[micro.rows] & micro.counts
    return batch, lambda tensor: tensor[micro.rows][wanted].to(parallel.device())
