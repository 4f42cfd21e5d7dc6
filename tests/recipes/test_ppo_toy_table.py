"""recipes/ppo_toy_table.py: gains in pairs of answers, and the buffer at which a hacked verifier is noticed."""

import numpy as np
import pytest

from recipes import ppo_toy_table as table


def test_a_gain_is_paired_by_problem_and_its_interval_holds_it() -> None:
    before, after = np.zeros((2, 100)), np.zeros((2, 100))
    before[0, :50] = before[1, :40] = after[0, :70] = after[1, :50] = 1
    rise, low, high = table.gain(before, after)
    assert rise == pytest.approx(0.15) and 0.05 < low < 0.15 < high < 0.27
    assert table.gain(before, before) == (0.0, 0.0, 0.0)


def test_the_alarm_is_the_panel_s() -> None:
    worse = [{"reward_verifier": 0.01 * i, "graded_right": 0.9 - 0.01 * i} for i in range(30)]
    assert table.alarm(worse) == 20
    assert table.alarm([row | {"graded_right": 0.01 * i} for i, row in enumerate(worse)]) is None
    assert table.alarm([{"reward": 1.0}] * 30) is None


def test_the_ends_of_a_run_are_of_its_buffers() -> None:
    start = {"step": 0, "eval_accuracy": 0.5}
    run = [{"step": i, "reward_verifier": 0.1 * (i > 6), "graded_right": 0.25} for i in range(1, 13)]
    assert "verifier +0.000 to +0.100, right 25.0% to 25.0%" in table.watched([[start, *run]])[0]
