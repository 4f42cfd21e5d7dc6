"""Proximal policy optimisation: the rewards of a rollout to advantages, and these to updates of actor and critic.

B episodes, S sequence, P prompts of G episodes each, N response tokens of some episodes laid end to end in row order
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from src import losses, parallel
from src.data.batch import Batch, epoch_order
from src.models.forward import Distribution, logprobs_and_entropy, response_values
from src.training.ppo_config import PPOConfig
from src.training.rewards import Scores, add_counts, apply_length_penalty, at_last
from src.training.rollout import Rollout, pack_episodes, shard_for_rank
from src.training.trainer import StepReport, Trainer

KL_LOSSES = {"k2": losses.kl_k2, "k3": losses.kl_k3}


class PPOBuffer(NamedTuple):
    """What an update learns from, alike on every rank. Per-token tensors are [B, S] float32 on the CPU, 0 outside the
    response mask."""

    rollout: Rollout
    scores: Scores  # what the episodes earn, apart from KL and penalties
    logprobs: Tensor  # of the policy that sampled, by the forward pass that training uses
    reference_logprobs: Tensor
    values: Tensor | None
    advantages: Tensor
    returns: Tensor | None
    weights: Tensor  # what each token weighs in the policy loss
    trainable: Tensor  # [K] int64: the episodes that are learned from
    distribution: Distribution  # that was sampled from

    @property
    def batch(self) -> Batch:
        """The episodes' tokens and response mask."""
        return self.rollout.batch


def group_has_variance(scores: Tensor, group_size: int) -> Tensor:
    """Whether the scores in a group differ by more than rounding. [P * G] -> [P] bool."""
    groups = scores.view(-1, group_size)
    # sums of float32 in another order: equal rewards may differ in their last bits
    return groups.amax(1) - groups.amin(1) > 1e-6


def refill_groups(
    rollout: Rollout, scores: Scores, sample: Callable[[int], tuple[Rollout, Scores]], group_size: int, max_refills: int
) -> tuple[Rollout, Scores, dict[str, float]]:
    """Dynamic sampling (DAPO, Yu et al. 2025, section 3.2): keep the groups of a buffer whose rewards differ, and fill
    it with more of them. Returns it with its scores, and what the log says of all groups.

    sample(1), sample(2) and on, up to max_refills, give as many further groups as the buffer has; those that it has no
    place for are dropped. It is handed on short when they did not fill it.
    """
    found: list[tuple[Rollout, Scores]] = []
    everything, counts, has_variance, tokens = [], [], [], 0
    missing = len(rollout.prompts) // group_size
    for refill in range(1, max_refills + 2):
        everything.append(scores.total.sum(1))
        counts.append(scores.counts)
        tokens += int(rollout.lengths.sum())
        alive = group_has_variance(everything[-1], group_size)
        has_variance.append(alive)
        # groups beyond the room that is left are dropped
        rows = alive.repeat_interleave(group_size).nonzero()[:, 0][: missing * group_size]
        missing -= len(rows) // group_size
        if len(rows):
            found.append((rollout.take(rows), scores.take(rows)))
        if not missing or refill > max_refills:
            break
        rollout, scores = sample(refill)
    alive = torch.cat(has_variance)
    stats = {"dead_groups": int((~alive).sum()) / len(alive),
             "sampled_reward": torch.cat(everything).mean().item(), "sampled_groups": float(len(alive)),
             "sampled_tokens": float(tokens)}
    if not found:  # nothing to learn from: the last ones stand for the log, and --filter_groups trains on none of them
        return rollout, scores._replace(counts=add_counts(counts)), stats
    rollouts, parts = zip(*found, strict=True)
    rollout = Rollout(
        [prompt for part in rollouts for prompt in part.prompts],
        [response for part in rollouts for response in part.responses],
        Batch(_rows(part.batch.tokens for part in rollouts), _rows(part.batch.response_mask for part in rollouts)),
        torch.cat([part.finished for part in rollouts]),
        _rows(part.sampled_logprobs for part in rollouts),
        [each for part in rollouts for each in part.executions])
    by_reward = {name: _rows(part.by_reward[name] for part in parts) for name in scores.by_reward}
    scores = Scores(by_reward, _rows(part.total for part in parts), add_counts(counts))
    return rollout, scores, stats


def _rows(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors [K, S] of several widths below one another, filled up with zeros (padding's id, False)."""
    tensors = list(tensors)
    width = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([F.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])


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


def decoupled_rewards(scores: Scores, weights: Sequence[float], rollout: Rollout, config: PPOConfig) -> Tensor:
    """gdpo's rewards: each compared within its groups before they are added up, what an ending costs as one more of
    weight 1. -> [B, S], at the last tokens."""
    # in float64: equal costs must not differ by rounding, which a group without spread makes large
    total = scores.total.double()
    cost = apply_length_penalty(total, rollout, config) - total
    parts = torch.stack([part.double().sum(1) for part in (*scores.by_reward.values(), cost)])  # [K, B]
    groups = parts.view(len(parts), -1, config.group_size)
    return at_last(losses.gdpo_advantages(groups, torch.tensor([*weights, 1.0]).double()).flatten(), rollout)


def compute_advantages(
    rewards: Tensor, values: Tensor | None, mask: Tensor, trainable: Tensor, config: PPOConfig
) -> tuple[Tensor, Tensor | None]:
    """Advantages by --advantage, and for a critic the returns that it learns.

    rewards, values [B, S] float32, mask [B, S] bool, trainable [K] int64 -> [B, S] float32 each, 0 outside the mask.
    """
    learned = torch.zeros_like(mask)
    learned[trainable] = mask[trainable]
    if config.whiten_rewards and learned.any():
        rewards = losses.whiten(rewards, mask, shift=False)
    groups = rewards.sum(1).view(-1, config.group_size)  # [P, G]: each response's whole reward, its KL included

    if config.advantage == "gae":
        advantages = losses.gae(rewards, values, mask, config.gamma, config.gae_lambda)
        # A lambda of its own: the critic wants unbiased targets, the actor advantages of little variance
        # An advantage and the value it is beyond are the lambda-return
        returns = (losses.gae(rewards, values, mask, config.gamma, config.critic_lambda) + values) * mask
    elif config.advantage == "reinforce++":
        if config.group_size > 1:  # REINFORCE++-baseline: of the whole reward, before it is discounted
            ends = (mask * torch.arange(mask.shape[1])).amax(1, keepdim=True)  # [B, 1]: the last token's place
            means = groups.double().mean(1).float().repeat_interleave(config.group_size)[:, None]
            rewards = rewards.scatter_add(1, ends, -means)
        advantages, returns = losses.discounted_returns(rewards, mask, config.gamma), None
    elif config.advantage == "rloo":
        return losses.rloo_advantages(groups).view(-1, 1) * mask, None
    elif config.advantage == "gdpo":  # decoupled_rewards() has compared the groups
        each = groups.flatten()
        if config.whiten_advantages and len(trainable):
            each = losses.whiten(each, learned.any(1))
        return each[:, None] * mask, None
    else:  # every token of a response gets the advantage of the whole
        by_group = losses.grpo_advantages(groups, divide_by_std=config.advantage == "grpo")
        return by_group.view(-1, 1) * mask, None

    # Whitened over the whole buffer, not over each minibatch: a minibatch's own mean would depend on the shuffle.
    # Advantages within groups, above, are left as their papers have them
    if not config.whiten_advantages:
        return advantages * learned, returns
    return losses.whiten(advantages, learned) if learned.any() else torch.zeros_like(advantages), returns


class MicroBatch(NamedTuple):
    """A forward pass of a data-parallel rank: rows [n] int64 of the buffer. counts False: a rank with fewer passes
    than others runs along, its tokens masked, because FSDP gathers the weights from all ranks in every pass."""

    rows: Tensor
    counts: bool = True

    def of(self, buffer: PPOBuffer) -> tuple[Batch, Callable[[Tensor], Tensor]]:
        """Its tokens and response mask, and what sends its response tokens of a tensor to the device: [B, S] -> [N]."""
        mask = buffer.batch.response_mask[self.rows] & self.counts
        batch = pack_episodes(buffer.batch, self.rows)
        batch = batch._replace(response_mask=batch.response_mask & self.counts)
        return batch, lambda tensor: parallel.to_device(tensor[self.rows][mask])


class Minibatch(NamedTuple):
    """An optimizer step: this rank's forward passes, and how many episodes and response tokens those of all ranks
    hold together."""

    micros: list[MicroBatch]
    episodes: int
    tokens: int


def epoch_passes(
    rollout: Rollout, trainable: Tensor, config: PPOConfig, iteration: int, inner_epoch: int = 0
) -> Iterator[Sequence[Tensor]]:
    """The rows [n] int64 of the forward passes of each optimizer step in one pass over the trainable episodes [K].

    Shuffled by (seed, iteration, inner epoch). Inside a step the rows of a group follow each other: a pass reads their
    prompt once. Groups are ordered by length: passes that ranks run at the same time are alike in size.
    Yields nothing where no episode is trainable.
    """
    if n := len(trainable):
        order = epoch_order(n, config.seed, iteration * config.inner_epochs + inner_epoch)
        # no more minibatches than episodes: an empty one would be a step without a gradient
        for rows in trainable[torch.tensor(order)].tensor_split(min(config.minibatches, n)):
            yield rollout.by_group(rows, config.group_size).split(config.max_batch_size)


def scoring_passes(rollout: Rollout, trainable: Tensor, config: PPOConfig, iteration: int) -> list[Tensor]:
    """The rows [n] int64 of the forward passes that score a rollout: those of its first inner epoch, then the rest.

    In half precision a log-prob depends on the other rows of its pass, by up to 0.25 nats in a model of 135M
    parameters: scored as they are learnt from, the first optimizer step's ratios are exactly 1.
    """
    learned = [rows for step in epoch_passes(rollout, trainable, config, iteration) for rows in step]
    others = torch.ones(len(rollout.finished), dtype=torch.bool)
    others[trainable] = False
    rest = rollout.by_group(others.nonzero()[:, 0], config.group_size).split(config.max_batch_size)
    return learned + [rows for rows in rest if len(rows)]


def minibatches(buffer: PPOBuffer, config: PPOConfig, iteration: int) -> Iterator[Minibatch]:
    """The optimizer steps of all passes over the trainable episodes. Forward passes are dealt in turn to the
    data-parallel ranks. The update does not depend on it."""
    for inner_epoch in range(config.inner_epochs):
        for passes in epoch_passes(buffer.rollout, buffer.trainable, config, iteration, inner_epoch):
            micros = [MicroBatch(part) for part in shard_for_rank(passes)]
            busiest = -(-len(passes) // parallel.data_parallel_size())
            micros += [MicroBatch(passes[0][:1], counts=False)] * (busiest - len(micros))
            rows = torch.cat(passes)
            yield Minibatch(micros, len(rows), int(buffer.batch.response_mask[rows].sum()))


# What the log says of a model that had nothing to learn from
NOTHING_LEARNED = dict.fromkeys((
    "policy_loss", "grad_norm", "lr", "value_loss", "critic_grad_norm", "value_clipped", "critic_lr", "entropy",
    "kl_loss", "clipped_low", "clipped_high", "ratio_deviation_max", "first_ratio_deviation",
), 0.0)


def update_critic(critic: Trainer, buffer: PPOBuffer, config: PPOConfig, iteration: int) -> dict[str, float]:
    """inner_epochs passes of the critic over a buffer. Returns means over their tokens and steps for the log."""
    # the rate follows the buffers, also those that gave fewer steps
    critic.set_step(iteration * config.steps_per_buffer)
    reports, n_clipped, n_tokens = [], torch.zeros((), dtype=torch.int64, device=parallel.device()), 0
    for minibatch in minibatches(buffer, config, iteration):
        for micro in minibatch.micros:
            batch, pick = micro.of(buffer)
            values, old_values = response_values(critic.model, *batch.inputs), pick(buffer.values)  # [N] each
            loss = losses.ppo_value_loss(values, old_values, pick(buffer.returns), config.value_clip)
            # over the tokens of all ranks' passes: the step does not depend on how it is cut up
            critic.backward(loss.sum() / minibatch.tokens, last=micro is minibatch.micros[-1])
            n_clipped += ((values.detach() - old_values).abs() > config.value_clip).sum()
        reports.append(critic.step())
        n_tokens += minibatch.tokens
    value_clipped = parallel.sum_over_data_parallel(n_clipped.item()) / max(1, n_tokens)
    return _means(reports, "value_loss", "critic_grad_norm", "critic_lr") | {"value_clipped": value_clipped}


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, counts: Tensor, config: PPOConfig
) -> tuple[Tensor, Tensor]:
    """--policy_loss of each response token and the ratio that it clips. [N] each, counts [B] -> two [N]."""
    if config.policy_loss == "gspo":
        ratio = losses.sequence_ratio(logprobs, old_logprobs, counts)
    else:
        ratio = losses.probability_ratio(logprobs, old_logprobs)
    if config.policy_loss == "cispo":
        return losses.cispo_loss(logprobs, ratio, advantages, config.clip_ratio, config.clip_high), ratio
    return losses.ppo_policy_loss(ratio, advantages, config.clip_ratio, config.clip_high, config.dual_clip), ratio


def update_actor(
    actor: Trainer, buffer: PPOBuffer, config: PPOConfig, iteration: int, critic_warmup: int = 0, kl_scale: float = 1.0
) -> dict[str, float]:
    """inner_epochs passes of the actor over a buffer. Returns means over their tokens and steps, and the largest
    deviations of a ratio from 1, for the log.

    critic_warmup: iterations in which it did not learn. kl_scale: what the weight of the KL loss is multiplied by.
    """
    actor.set_step((iteration - critic_warmup) * config.steps_per_buffer)
    reports, seen, n_tokens, n_first = [], [], 0, 0
    for minibatch in minibatches(buffer, config, iteration):
        # over all ranks' passes; the weights of sequences have their lengths in them
        n = minibatch.tokens if config.loss_aggregation == "token-mean" else minibatch.episodes
        for micro in minibatch.micros:
            batch, pick = micro.of(buffer)
            logprobs, entropy = logprobs_and_entropy(
                actor.model, *batch.inputs, distribution=buffer.distribution,
                learn_entropy=config.entropy_coef > 0)  # [N] each
            loss, ratio = policy_loss(
                logprobs, pick(buffer.logprobs), pick(buffer.advantages), batch.response_counts(), config)
            kl = logprobs.new_zeros(())
            if config.kl_loss != "none":
                # here it acts by its own gradient, in the reward through the advantages
                kl = KL_LOSSES[config.kl_loss](logprobs, pick(buffer.reference_logprobs))
                loss = loss + config.kl_loss_coef * kl_scale * kl
            if config.entropy_coef:  # taken off: what is minimised rewards it
                loss = loss - config.entropy_coef * entropy
            actor.backward((loss * pick(buffer.weights)).sum() / n, last=micro is minibatch.micros[-1])

            deviation = ratio.detach() - 1
            sums = entropy, deviation < -config.clip_ratio, deviation > config.clip_high, kl
            worst = deviation.abs().max() if micro.counts else logprobs.new_zeros(())
            # read when all is done: to read is to wait for the device
            seen.append(torch.stack([*(found.sum().double() for found in sums), worst.double()]).detach())
        n_first = n_first or len(seen)
        reports.append(actor.step())
        n_tokens += minibatch.tokens
    if not seen:
        return {}
    rows = torch.stack(seen).tolist()
    # before any step the policy is the one that sampled: monitor.check_first_update() wants these ratios to be 1
    first, rows = (parallel.gather_over_data_parallel(found) for found in (rows[:n_first], rows))
    *sums, worst = zip(*rows, strict=True)
    names = "entropy", "clipped_low", "clipped_high", "kl_loss"
    means = {name: sum(each) / n_tokens for name, each in zip(names, sums, strict=True)}
    return _means(reports, "policy_loss", "grad_norm", "lr") | means | {
        "ratio_deviation_max": max(worst), "first_ratio_deviation": max(row[-1] for row in first)}


def _means(reports: list[StepReport], *names: str) -> dict[str, float]:
    """Mean loss, gradient norm and learning rate of some optimizer steps under these names."""
    columns = zip(*reports, strict=True) if reports else ((0.0,),) * len(names)
    return {name: sum(values) / len(values) for name, values in zip(names, columns, strict=True)}
