"""Proximal policy optimisation: a rollout buffer's advantages to updates of actor and critic.

N response tokens of some episodes laid end to end in row order
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from src import losses, parallel
from src.data import collate
from src.data.collate import Batch
from src.inference.scoring import logprobs_and_entropy, response_values
from src.models.decoder import Decoder
from src.training.buffer import Rollouts
from src.training.loop import TrainLoop
from src.training.ppo_settings import Settings
from src.training.residence import Arrangement
from src.training.rollouts import my_share, trim

KL_LOSSES = {"k2": losses.kl_k2, "k3": losses.kl_k3}


class Micro(NamedTuple):
    """A forward pass of a data-parallel rank: rows of the buffer, which count unless the rank only keeps others
    company."""

    rows: Tensor
    counts: bool = True


class OptimizerStep(NamedTuple):
    """This rank's forward passes of an optimizer step, and what all ranks' passes hold together."""

    micros: list[Micro]
    episodes: int
    tokens: int


def minibatches(
    rollouts: Rollouts, settings: Settings, step: int, inner_epoch: int
) -> Iterator[OptimizerStep]:
    """The optimizer steps of a pass over the buffer; shuffled by (seed, step, inner epoch).

    Inside a step rows are ordered by length and dealt in turn to the data-parallel ranks: passes hold little padding,
    and those that run at the same time are alike in size. The update does not depend on it. Yields nothing where no
    episode is kept.
    """
    n = len(rollouts.kept)
    order = collate.epoch_order(n, settings.seed, step * settings.inner_epochs + inner_epoch)
    kept = rollouts.kept[torch.tensor(order, dtype=torch.int64)]
    for rows in kept.tensor_split(min(settings.minibatches, n)) if n else ():
        by_length = rows[rollouts.episodes.last[rows].argsort(stable=True)]
        passes = by_length.split(settings.max_batch_size)
        micros = [Micro(part) for part in my_share(passes)]
        busiest = -(-len(passes) // parallel.data_parallel_size())
        micros += [Micro(by_length[:1], counts=False)] * (busiest - len(micros))
        yield OptimizerStep(micros, len(rows), int(rollouts.batch.response_mask[rows].sum()))


class ActorSums(NamedTuple):
    """Sums over a forward pass's tokens for the log, and the largest |ratio - 1| in it."""

    entropy: float
    clipped_low: float
    clipped_high: float
    kl_loss: float
    ratio_deviation_max: float


def update(
    actor_loop: TrainLoop,
    critic_loop: TrainLoop | None,
    rollouts: Rollouts,
    settings: Settings,
    step: int,
    *,
    critic_warmup: int = 0,
    arrangement: Arrangement = Arrangement(),  # noqa: B008 (never changed: it holds no model)
) -> dict[str, float]:
    """inner_epochs passes over a buffer, `minibatches` optimizer steps each. Returns means for the log.

    The critic learns first, then, behind the first critic_warmup buffers, the actor: neither reads the other, and only
    one of them need be in memory. The rates follow the buffers: one that gave fewer steps does not hold them back.
    """
    steps_a_buffer = settings.inner_epochs * settings.minibatches
    metrics: dict[str, float] = {}
    parallel.release_memory()  # of the buffer's collection
    if critic_loop is not None:
        critic_loop.go_to(step * steps_a_buffer)
        with arrangement.training(critic_loop.model):
            metrics |= _update_critic(critic_loop, rollouts, settings, step)
        parallel.release_memory()
    if step >= critic_warmup:
        actor_loop.go_to((step - critic_warmup) * steps_a_buffer)
        with arrangement.training(actor_loop.model):
            metrics |= _update_actor(actor_loop, rollouts, settings, step)
    return NOTHING_LEARNED | metrics


NOTHING_LEARNED = dict.fromkeys(
    (
        "policy_loss", "grad_norm", "lr", "value_loss", "critic_grad_norm", "value_clipped", "critic_lr", "entropy",
        "kl_loss", "clipped_low", "clipped_high", "ratio_deviation_max", "first_ratio_deviation",
    ), 0.0,
)  # fmt: skip


def _update_critic(loop: TrainLoop, rollouts: Rollouts, settings: Settings, step: int) -> dict[str, float]:
    """Means over the tokens and optimizer steps of the critic's update."""
    clipped: list[float] = []
    reports, n_tokens = [], 0
    for now in _steps(rollouts, settings, step):
        for micro in now.micros:
            loss, n_clipped = critic_loss(loop.model, rollouts, micro, settings, now.tokens)
            loop.backward(loss, last=micro is now.micros[-1])
            clipped.append(n_clipped)
        reports.append(loop.step())
        n_tokens += now.tokens
    return {
        "value_loss": _mean([report.loss for report in reports]),
        "critic_grad_norm": _mean([report.grad_norm for report in reports]),
        "value_clipped": parallel.sum_over_data_parallel(sum(clipped)) / max(1, n_tokens),
        "critic_lr": _mean([report.lr for report in reports]),
    }


def _update_actor(loop: TrainLoop, rollouts: Rollouts, settings: Settings, step: int) -> dict[str, float]:
    """Means over the tokens and optimizer steps of the actor's update, and the largest deviations of a ratio from 1."""
    seen: list[ActorSums] = []
    first: list[float] = []  # of the very first pass of each rank, before any step
    reports, n_tokens = [], 0
    for now in _steps(rollouts, settings, step):
        normaliser = now.tokens if settings.loss_aggregation == "token-mean" else now.episodes
        for micro in now.micros:
            loss, sums = actor_loss(loop.model, rollouts, micro, settings, normaliser)
            loop.backward(loss, last=micro is now.micros[-1])
            seen.append(sums)
        first = first or [sums.ratio_deviation_max for sums in seen]
        reports.append(loop.step())
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


def _steps(rollouts: Rollouts, settings: Settings, step: int) -> Iterator[OptimizerStep]:
    """The optimizer steps of all passes over a buffer."""
    for inner_epoch in range(settings.inner_epochs):
        yield from minibatches(rollouts, settings, step, inner_epoch)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def actor_loss(
    actor: Decoder, rollouts: Rollouts, micro: Micro, settings: Settings, normaliser: int
) -> tuple[Tensor, ActorSums]:
    """Clipped policy loss of some episodes with its KL and entropy terms, weighted and divided by the step's count."""
    batch, pick = _rows(rollouts, micro)
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
    kl = torch.zeros(())
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
        kl.sum().item(),
        deviation.abs().max().item() if micro.counts else 0.0,
    )
    return (loss * pick(rollouts.weights)).sum() / normaliser, sums


def critic_loss(
    critic: Decoder, rollouts: Rollouts, micro: Micro, settings: Settings, normaliser: int
) -> tuple[Tensor, float]:
    """Clipped value loss of some episodes, divided by the step's token count. -> scalar, and how many values were
    farther from their old ones than the clip allows."""
    batch, pick = _rows(rollouts, micro)
    values, old = response_values(critic, *batch), pick(rollouts.values)
    loss = losses.ppo_value_loss(values, old, pick(rollouts.returns), settings.value_clip)
    n_clipped = ((values.detach() - old).abs() > settings.value_clip).sum().item()
    return loss.sum() / normaliser, n_clipped


def _rows(rollouts: Rollouts, micro: Micro) -> tuple[Batch, Callable[[Tensor], Tensor]]:
    """Some episodes of a buffer on the device, and how to pick their response tokens [N] from a [B, S] tensor."""
    tokens, mask = trim(Batch(rollouts.batch.tokens[micro.rows], rollouts.batch.response_mask[micro.rows]))[
        :2
    ]
    batch = Batch(tokens, mask & micro.counts).to(parallel.device())
    wanted = rollouts.batch.response_mask[micro.rows] & micro.counts
    return batch, lambda tensor: tensor[micro.rows][wanted].to(parallel.device())
