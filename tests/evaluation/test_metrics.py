"""src/evaluation/metrics.py: numbers by hand, and against enumeration of all subsets."""

import itertools
import math

import numpy as np
import pytest

from src.evaluation.metrics import (
    AGGREGATIONS,
    answer_classes,
    auc,
    best_of_n,
    best_threshold,
    calibration,
    curves,
    first_wrong_step,
    interval,
    pass_at_k,
    processbench_f1,
    sigmoid,
    vote,
    vote_weights,
    wilson_interval,
    winners,
)

GENERATOR = np.random.default_rng(5)
RIGHT = GENERATOR.random((6, 6)) < 0.4
CLASSES = [
    [0 if right else int(GENERATOR.choice([1, 2, -1])) for right in row] for row in RIGHT
]
CLASSES = [[None if name == -1 else name for name in row] for row in CLASSES]
SCORES = GENERATOR.random(RIGHT.shape)


def same_number(first: str, second: str) -> bool:
    return float(first) == float(second)


@pytest.mark.parametrize(("n", "c", "k", "expected"), [
    (4, 0, 2, 0.0),
    (4, 4, 1, 1.0),
    (4, 1, 1, 0.25),
    (4, 1, 4, 1.0),
    (4, 2, 2, 5 / 6),       # of the 6 pairs only the one of both wrong samples has no right one
    (5, 3, 3, 1.0),         # two wrong samples cannot fill three places
    (6, 2, 3, 0.8),         # 1 - C(4,3)/C(6,3) = 1 - 4/20
])
def test_pass_at_k_by_hand(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected)


def test_pass_at_k_is_the_ratio_of_binomials() -> None:
    for n in range(1, 12):
        for c in range(n + 1):
            for k in range(1, n + 1):
                assert pass_at_k(n, c, k) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k))


def test_pass_at_k_of_many_samples_stays_finite() -> None:
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 5), (4, 5, 1), (4, -1, 1), (4, 2, 0)])
def test_pass_at_k_refuses_what_was_not_sampled(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=str(n)):
        pass_at_k(n, c, k)


def test_wilson_interval_by_hand() -> None:
    low, high = wilson_interval(5, 10)      # (0.5 + 0.19207) / 1.38415 -+ 1.96 sqrt(0.025 + 0.0096) / 1.38415
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))


def test_wilson_interval_at_the_ends() -> None:
    assert wilson_interval(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))     # z^2 / (10 + z^2)
    assert wilson_interval(10, 10) == (pytest.approx(0.7225, abs=1e-4), pytest.approx(1.0))


def test_equal_shares_have_an_interval() -> None:
    assert interval([0.5] * 10) == wilson_interval(5, 10)     # the bootstrap would say 0.5 .. 0.5
    assert interval([0.25]) == wilson_interval(0.25, 1)
    low, high = interval([0.25, 0.75] * 50)                   # 0.5 -+ 1.96 * 0.25 / 10
    assert (low, high) == (pytest.approx(0.451, abs=0.01), pytest.approx(0.549, abs=0.01))


@pytest.mark.parametrize(("right", "total"), [(1, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses_impossible_counts(right: int, total: int) -> None:
    with pytest.raises(ValueError, match="of"):
        wilson_interval(right, total)


def test_a_majority_counts_classes_not_strings() -> None:
    classes = answer_classes(["3", "2", "2.0", "3", "2.00", None], same_number)
    assert classes == [0, 1, 1, 0, 1, None]
    assert winners(classes, [1.0] * 6) == [1]


def test_classes_do_not_depend_on_the_order_of_answers() -> None:
    """A number without a unit equals it with either, but these differ: it goes with the more frequent one."""
    for answers in itertools.permutations(["5", "5 m", "5 cm", "5 m"]):
        classes = answer_classes(answers, lambda first, second: first == second or "5" in (first, second))
        named = {answer: name for answer, name in zip(answers, classes, strict=True)}
        assert named["5"] == named["5 m"] != named["5 cm"]
        assert classes[named["5 m"]] == named["5 m"] and classes[named["5 cm"]] == named["5 cm"]


def test_classes_that_tie_win_together_and_missing_answers_do_not_vote() -> None:
    assert winners([5, 7, 7, 5, 3], [1.0] * 5) == [0, 1]
    assert winners([None, None, None, 3, 3, 5], [1.0] * 6) == [3]
    assert winners([None, None], [1.0] * 2) == []
    assert winners([], []) == []


def test_a_vote_adds_the_weights_of_a_class() -> None:
    assert winners([0, 1, 0, None], [0.3, 0.5, 0.3, 9.0]) == [0]
    assert winners([0, 1, 0, None], [0.2, 0.5, 0.2, 9.0]) == [1]
    assert winners([0, 1, 0, None], [0.25, 0.5, 0.25, 9.0]) == [0, 1]
    with pytest.raises(ValueError, match="shorter"):
        winners([0, 1], [0.5])


def test_scores_beyond_0_and_1_weigh_by_their_sigmoid() -> None:
    assert vote_weights(np.array([[0.2, 1.0, -np.inf]])).tolist() == [[0.2, 1.0, 0.0]]
    assert vote_weights(np.array([[0.0, math.log(3), -np.inf]]))[0].tolist() == pytest.approx([0.5, 0.75, 0.0])


def test_a_vote_is_counted_in_disjoint_groups() -> None:
    right, classes = np.array([[True, False, False, False, True]]), [[0, 1, 1, None, 0]]
    ones = np.ones((1, 5))
    # of 2: a tie of right and wrong, and a wrong answer alone; of 5: two right ones tie with two wrong ones
    assert [vote(right, classes, ones, k)[0] for k in range(1, 6)] == [0.4, 0.25, 0.0, 0.0, 0.5]
    weights = np.array([[0.1, 0.4, 0.3, 0.9, 0.2]])
    assert vote(right, classes, weights, 5)[0] == 0.0
    assert vote(right, [[None] * 5], ones, 2)[0] == 0.0


@pytest.mark.parametrize("n", range(1, 7))
def test_best_of_n_is_the_mean_over_all_subsets(n: int) -> None:
    for right, scores, found in zip(RIGHT, SCORES, best_of_n(RIGHT, SCORES, n), strict=True):
        subsets = list(itertools.combinations(range(6), n))
        expected = np.mean([right[max(subset, key=scores.__getitem__)] for subset in subsets])
        assert found == pytest.approx(expected, abs=1e-12)


def test_best_of_all_takes_the_best_and_shares_a_tie() -> None:
    expected = [right[row.argmax()] for right, row in zip(RIGHT, SCORES, strict=True)]
    assert best_of_n(RIGHT, SCORES, 6).tolist() == expected
    assert best_of_n(np.array([[True, False, False]]), np.array([[1.0, 1.0, 0.0]]), 3).tolist() == [0.5]


def test_one_sample_is_pass_at_1_however_it_is_chosen() -> None:
    """Also where the right samples all stand at one place, or a score has no vote to weigh."""
    first = np.zeros((6, 6), dtype=bool)
    first[:, 0] = True
    for right in (RIGHT, first):
        scores = {"some": np.where(SCORES < 0.3, -np.inf, SCORES), "signed": SCORES - 0.5}
        classes = [[0 if each else 1 for each in row] for row in right]
        found = curves(right, classes, scores)
        assert len(found) == 6
        for curve in found.values():
            assert curve[1] == pytest.approx(right.mean(1), abs=1e-12)


def test_a_perfect_score_reaches_pass_and_a_constant_one_a_single_sample() -> None:
    scores = {"perfect": RIGHT.astype(float), "constant": np.ones(RIGHT.shape)}
    found = curves(RIGHT, CLASSES, scores)
    assert list(found["pass"]) == [1, 2, 4, 6]
    for k in (1, 2, 4, 6):
        assert found["best of n, perfect"][k] == pytest.approx(found["pass"][k])
        assert found["best of n, constant"][k] == pytest.approx(RIGHT.mean(1))
        assert found["weighted vote, constant"][k].tolist() == found["majority"][k].tolist()
    with pytest.raises(ValueError, match="a score .broken. is not a number"):
        curves(RIGHT, CLASSES, {"broken": np.full(RIGHT.shape, np.nan)})
    for n, sizes in ((1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5])):
        assert list(curves(RIGHT[:, :n], [row[:n] for row in CLASSES], {})["pass"]) == sizes


def test_large_n_stays_finite() -> None:
    right = GENERATOR.random((3, 1024)) < 0.1
    assert np.isfinite(best_of_n(right, GENERATOR.random((3, 1024)), 512)).all()
    assert best_of_n(np.ones((1, 1024), dtype=bool), GENERATOR.random((1, 1024)), 300) == pytest.approx(1.0)


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
