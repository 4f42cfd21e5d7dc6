import math

import pytest

from src.evaluation.vote import best_of, majority, pass_at_k, weighted_vote, wilson_interval


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


@pytest.mark.parametrize(("right", "total"), [(1, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses_impossible_counts(right: int, total: int) -> None:
    with pytest.raises(ValueError, match="of"):
        wilson_interval(right, total)


def test_majority_counts_classes_not_strings() -> None:
    assert majority(["3", "2", "2.0", "3", "2.00"], same_number) == 1


def test_majority_ties_go_to_the_first_seen() -> None:
    assert majority(["5", "7", "7.0", "5.0"], same_number) == 0


def test_missing_answers_do_not_vote() -> None:
    assert majority([None, None, None, "4", "4.0", "1"], same_number) == 3
    assert majority([None, None], same_number) is None
    assert majority([], same_number) is None


def test_best_of_takes_the_first_of_equal_scores() -> None:
    assert best_of([0.1, 0.9, 0.9, -3.0]) == 1
    assert best_of([-math.inf, -2.0]) == 1


def test_best_of_refuses_nothing_and_nan() -> None:
    with pytest.raises(ValueError, match="none"):
        best_of([])
    with pytest.raises(ValueError, match="score 1 of 2"):
        best_of([0.0, math.nan])


def test_weighted_vote_adds_scores_of_a_class() -> None:
    assert weighted_vote(["1", "2", "1.0", None], [0.3, 0.5, 0.3, 9.0], same_number) == 0
    assert weighted_vote(["1", "2", "1.0", None], [0.2, 0.5, 0.2, 9.0], same_number) == 1
    assert weighted_vote([None], [1.0], same_number) is None


def test_weighted_vote_refuses_scores_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="2 answers but 1 scores"):
        weighted_vote(["1", "2"], [0.5], same_number)
