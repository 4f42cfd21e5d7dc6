"""benchmarks/kill_ppo.py with two kills: a run of PPO that died twice ends with the bits of one that did not."""

import random
from pathlib import Path

from benchmarks import kill_ppo


def test_ppo_killed_while_judging_and_while_learning_ends_bit_equal(tmp_path: Path) -> None:
    kill_ppo.prepare(tmp_path)
    moments, equal = kill_ppo.kill_and_compare(
        "PPO, 1 process", tmp_path, ("judge", "learn"), random.Random(1)
    )
    assert [moment.phase for moment in moments] == ["judge", "learn"] and equal
