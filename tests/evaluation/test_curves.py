"""src/evaluation/curves.py against enumeration of all subsets and orders, and hand-made extremes."""

import itertools

import numpy as np
import pytest

from src.evaluation.curves import Choices, best_of_n, curves, pass_at_n, sizes, vote
from src.evaluation.vote import best_of, pass_at_k, weighted_vote

GENERATOR = np.random.default_rng(5)
RIGHT = GENERATOR.random((6, 6)) < 0.4
CLASSES = np.where(RIGHT, 0, GENERATOR.integers(1, 3, RIGHT.shape))
CLASSES[GENERATOR.random(RIGHT.shape) < 0.2] = -1
RIGHT &= CLASSES != -1
SCORES = GENERATOR.random(RIGHT.shape)


@pytest.mark.parametrize("n", range(1, 7))
def test_best_of_n_is_the_mean_over_all_subsets(n: int) -> None:
    for right, scores, found in zip(RIGHT, SCORES, best_of_n(RIGHT, SCORES, n), strict=True):
        subsets = list(itertools.combinations(range(6), n))
        expected = np.mean([right[max(subset, key=scores.__getitem__)] for subset in subsets])
        assert found == pytest.approx(expected, abs=1e-12)


def test_best_of_all_takes_the_best_and_shares_a_tie() -> None:
    assert best_of_n(RIGHT, SCORES, 6).tolist() == [
        right[best_of(list(row))] for right, row in zip(RIGHT, SCORES, strict=True)
    ]
    assert best_of_n(np.array([[True, False, False]]), np.array([[1.0, 1.0, 0.0]]), 3).tolist() == [0.5]


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_is_the_unbiased_estimate(n: int) -> None:
    assert pass_at_n(RIGHT, n).tolist() == pytest.approx(
        [pass_at_k(6, int(c), n) for c in RIGHT.sum(1)], abs=1e-12
    )


@pytest.mark.parametrize("n", [1, 2, 5])
def test_vote_over_all_orders_equals_voting_one_by_one(n: int) -> None:
    orders = np.array(list(itertools.permutations(range(6))))[::7]
    found = vote(Choices(CLASSES, RIGHT), SCORES, n, orders)
    for problem in range(6):
        wins = []
        for order in orders:
            picked = order[:n]
            answers = [None if CLASSES[problem, i] == -1 else str(CLASSES[problem, i]) for i in picked]
            first = weighted_vote(answers, [float(SCORES[problem, i]) for i in picked], str.__eq__)
            wins.append(first is not None and RIGHT[problem, picked[first]])
        assert found[problem] == pytest.approx(np.mean(wins))


def test_a_perfect_score_reaches_pass_and_a_constant_one_a_single_sample() -> None:
    scores = {"perfect": RIGHT.astype(float), "constant": np.ones(RIGHT.shape)}
    found = curves(Choices(CLASSES, RIGHT), scores)
    assert found["best of n, perfect"] == found["pass"]
    assert found["best of n, constant"].accuracy == pytest.approx([RIGHT.mean()] * 4)
    assert found["weighted vote, constant"] == found["majority"]
    assert found["pass"].n == [1, 2, 4, 6] == sizes(6)
    for curve in found.values():
        assert all(
            low <= middle <= high
            for low, middle, high in zip(curve.low, curve.accuracy, curve.high, strict=True)
        )
    assert found == curves(Choices(CLASSES, RIGHT), scores)


def test_large_n_stays_finite() -> None:
    right = GENERATOR.random((3, 1024)) < 0.1
    assert np.isfinite(best_of_n(right, GENERATOR.random((3, 1024)), 512)).all()
    assert best_of_n(np.ones((1, 1024), dtype=bool), GENERATOR.random((1, 1024)), 300) == pytest.approx(1.0)
