"""src/evaluation/step_scores.py: hand-computed numbers."""

import math

import numpy as np
import pytest

from src.evaluation.step_scores import (
    AGGREGATIONS,
    auc,
    best_threshold,
    calibration,
    first_wrong_step,
    processbench_f1,
    sigmoid,
)


def test_aggregations_by_hand() -> None:
    found = {name: aggregate([0.5, 0.9, 0.8]) for name, aggregate in AGGREGATIONS.items()}
    assert found == pytest.approx(
        {
            "min": 0.5,
            "prod": 0.36,
            "last": 0.8,
            "mean": 2.2 / 3,
            "max": 0.9,
            "sum_logit": math.log(9) + math.log(4),
        }
    )
    assert all(math.isfinite(aggregate([0.0, 1.0])) for aggregate in AGGREGATIONS.values())


def test_sigmoid_does_not_overflow() -> None:
    assert (sigmoid(-1000), sigmoid(0), sigmoid(1000)) == (0.0, 0.5, 1.0)


def test_auc_counts_pairs_and_halves_ties() -> None:
    right = np.array([True, True, False, False])
    assert auc(np.array([3.0, 1.0, 2.0, 1.0]), right) == (1 + 1 + 0 + 0.5) / 4
    assert auc(np.ones(4), right) == 0.5
    assert math.isnan(auc(np.ones(4), np.ones(4, dtype=bool)))


def test_calibration_by_hand() -> None:
    error, bins = calibration(np.array([0.95, 0.95, 0.15, 1.0]), np.array([True, False, False, True]))
    assert [each["count"] for each in bins] == [1, 3]
    assert error == pytest.approx((1 * 0.15 + 3 * abs((0.95 + 0.95 + 1.0) / 3 - 2 / 3)) / 4)


def test_f1_of_a_perfect_and_of_constant_scorers() -> None:
    expected = [1, -1, 0, -1]
    perfect = [[0.9, 0.1, 0.5], [0.9, 0.9], [0.2], [0.8]]
    found = [first_wrong_step(p, best_threshold(perfect, expected)) for p in perfect]
    assert processbench_f1(found, expected) == 1.0
    for constant in (-1, 0):
        assert processbench_f1([constant] * 4, [1, -1, 2, -1]) == 0.0
    with pytest.raises(ValueError, match="one kind is absent"):
        processbench_f1([0], [-1])
