"""Dynamic sampling: groups of equal rewards give their place in a buffer to further prompts' (DAPO, Yu et al. 2025)."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from src.data.batch import Batch
from src.training.ppo import group_has_variance
from src.training.rewards import Scores, add_counts
from src.training.rollout import Rollout, pad_to


def refill_groups(
    rollout: Rollout, scores: Scores, sample: Callable[[int], tuple[Rollout, Scores]], group_size: int, max_refills: int
) -> tuple[Rollout, Scores, dict[str, float]]:
    """Keep the groups of a buffer whose rewards differ, and fill it with more of them. Returns it with its scores, and
    what the log says of all groups.

    sample(1), sample(2) and on, up to max_refills, give as many further groups as the buffer has; those that it has no
    place for are dropped. It is handed on short when they did not fill it.
    """
    found: list[tuple[Rollout, Scores]] = []
    everything, has_variance, tokens = [], [], 0
    missing = len(rollout.prompts) // group_size
    for refill in range(1, max_refills + 2):
        everything.append(scores.total.sum(1))
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
        return rollout, scores, stats
    rollouts, parts = zip(*found, strict=True)
    rollout = Rollout(
        [prompt for part in rollouts for prompt in part.prompts],
        [response for part in rollouts for response in part.responses],
        Batch(_rows(part.batch.tokens for part in rollouts), _rows(part.batch.response_mask for part in rollouts)),
        torch.cat([part.finished for part in rollouts]),
        _rows(part.sampled_logprobs for part in rollouts),
        [each for part in rollouts for each in part.executions],
    )
    by_reward = {name: _rows(part.by_reward[name] for part in parts) for name in scores.by_reward}
    scores = Scores(by_reward, _rows(part.total for part in parts), add_counts(part.counts for part in parts))
    return rollout, scores, stats


def _rows(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors [K, S] of several widths below one another, padded to the widest."""
    tensors = list(tensors)
    return torch.cat([pad_to(tensor, max(each.shape[1] for each in tensors)) for tensor in tensors])
