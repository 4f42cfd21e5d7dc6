"""src/training/ppo.py, refill_groups(): groups without variance give their place to others."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import ppo_train
from src.grading.tasks import find_task
from src.runlog import Phases
from src.text.tokenizer import Tokenizer
from src.training.ppo_setup import Inputs
from src.training.rewards import Reward, at_last
from src.training.rollout import Rollout
from tests.conftest import Folders
from tests.training.workers import PROMPTS, ppo_config, ppo_models


def test_a_buffer_is_refilled_until_it_is_full_or_the_limit_is_reached(
    folders: Folders, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    models = ppo_models(folders.one, "", str(tmp_path))

    def first_group_alone_differs(rollout: Rollout) -> Tensor:
        scores = torch.zeros(len(rollout.prompts))
        scores[0] = 1.0
        return at_last(scores, rollout)

    def fill(max_refills: int, n_dead: int = 0) -> tuple[Rollout, Tensor, dict[str, float]]:
        numbers = ppo_config(advantage="grpo", group_size=2, filter_groups=True, max_refills=max_refills)
        counts = {"graded_timeout": (1, 6)}
        weights = iter([0.0] * n_dead + [1.0] * 9)  # of the rounds
        rewards = {"first": Reward(1.0, lambda rollout: (next(weights) * first_group_alone_differs(rollout), counts))}
        data = Inputs(PROMPTS, [], 0, tokenizer, find_task("toy"), [], 1)
        buffer, stats = ppo_train.collect(numbers, models, data, rewards, [0, 1, 2], 0, 1.0, Phases())
        # those of all groups, kept or not, as the stats are
        rounds = stats["sampled_groups"] // 3
        assert buffer.scores.counts == {"graded_timeout": (rounds, 6 * rounds)}
        return buffer.rollout, buffer.scores.total.sum(1), stats

    full, scores, stats = fill(9)  # one group a round, three wanted
    assert len(full.prompts) == 6
    assert stats.pop("sampled_tokens") >= int(full.lengths.sum())
    assert stats == {"sampled_groups": 9, "dead_groups": 6 / 9, "sampled_reward": pytest.approx(3 / 18)}
    assert scores.tolist() == [1.0, 0.0] * 3
    assert len({(p.id, r) for p, r in zip(full.prompts, full.responses, strict=True)}) > 3
    short, _, stats = fill(1)
    assert len(short.prompts) == 4 and stats["sampled_groups"] == 6
    late, _, stats = fill(1, n_dead=1)
    assert len(late.prompts) == 2 and stats["dead_groups"] == 5 / 6
    shorter, _, stats = fill(0)  # without refills, what nothing is learned from is not even scored
    assert len(shorter.prompts) == 2 and stats["sampled_groups"] == 3
    # what was there without refills is there with them
    assert short.prompts[:2] == full.prompts[:2] == [PROMPTS[0]] * 2
