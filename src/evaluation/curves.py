"""What choosing among n samples is worth, for n from 1 to all: exact where a formula exists, else by random draws.

P problems, N samples of each
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MISSING = -1  # class of a sample without an answer: it has no vote

Floats = NDArray[np.float64]


class Choices(NamedTuple):
    """Samples as arrays: classes [P, N] int64, equal numbers for equal answers of a problem; right [P, N] bool."""

    classes: NDArray[np.int64]
    right: NDArray[np.bool_]


class Curve(NamedTuple):
    """Accuracy over n with 95% bootstrap intervals over problems: one number for each n, in [0, 1]."""

    n: list[int]
    accuracy: list[float]
    low: list[float]
    high: list[float]


def sizes(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    powers = [1 << power for power in range(most.bit_length()) if 1 << power <= most]
    return powers if powers[-1] == most else [*powers, most]


def best_of_n(right: NDArray[np.bool_], scores: Floats, n: int) -> Floats:
    """Chance that the best-scored of n samples drawn without replacement is right. [P, N], [P, N] -> [P].

    Exact: the i-th lowest score (from 1) is the highest of the n with probability C(i-1, n-1) / C(N, n). Of equal
    scores each is as likely to be taken.
    """
    places = np.arange(1, right.shape[1] + 1)
    # C(i-1, n-1) / C(N, n), by the ratio of neighbours, which no binomial of a large N can overflow
    chance = np.zeros(len(places))
    chance[-1] = n / len(places)
    for i in range(len(places) - 1, n - 1, -1):
        chance[i - 1] = chance[i] * (i - n + 1) / i
    order = np.argsort(scores, axis=1, kind="stable")
    return _mean_over_ties(np.take_along_axis(right, order, 1), np.take_along_axis(scores, order, 1)) @ chance


def _mean_over_ties(right: NDArray[np.bool_], scores: Floats) -> Floats:
    """`right` of samples sorted by score, each replaced by the mean over the samples of the same score. -> [P, N]."""
    shares = right.astype(np.float64)
    for row, values in zip(shares, scores, strict=True):
        starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
        lengths = np.diff(np.r_[starts, len(values)])
        row[:] = np.repeat(np.add.reduceat(row, starts) / lengths, lengths)
    return shares


def pass_at_n(right: NDArray[np.bool_], n: int) -> Floats:
    """Chance that n samples drawn without replacement hold a right one. [P, N] -> [P]."""
    return best_of_n(right, right.astype(np.float64), n)


def vote(choices: Choices, weights: Floats, n: int, draws: NDArray[np.int64]) -> Floats:
    """Mean over draws of whether the class with the most weight among the first n samples is right. -> [P].

    draws [R, N]: orders of the samples. Of equal classes the one drawn first wins; no votes is wrong.
    """
    n_problems = len(choices.classes)
    rows = np.arange(n_problems)[:, None]
    won = np.zeros(n_problems)
    for order in draws:
        picked = order[:n]
        classes, right = choices.classes[:, picked], choices.right[:, picked]
        voting = classes != MISSING
        sums = np.zeros(
            (n_problems, int(choices.classes.max()) + 2)
        )  # the last column takes the missing ones
        np.add.at(sums, (rows, classes), np.where(voting, weights[:, picked], 0.0))
        mine = np.where(voting, sums[rows, classes], -np.inf)
        won += right[rows[:, 0], mine.argmax(1)] & voting.any(1)
    return won / len(draws)


def curves(
    choices: Choices,
    scores: Mapping[str, Floats],
    *,
    n_draws: int = 32,
    n_bootstrap: int = 1000,
    seed: int = 1,
) -> dict[str, Curve]:
    """Every way of choosing over n: pass, majority, and best-of-n and weighted voting by each named score [P, N].

    Scores that are negative somewhere choose the best of n only: they cannot weigh a vote. A sample of score -inf comes
    last, and its vote has no weight. Draws and bootstrap follow from the seed.
    """
    generator = np.random.default_rng(seed)
    draws = generator.permuted(np.tile(np.arange(choices.right.shape[1]), (n_draws, 1)), axis=1)
    resampled = generator.integers(len(choices.right), size=(n_bootstrap, len(choices.right)))
    ones = np.ones(choices.right.shape)
    ways = {
        "pass": lambda n: pass_at_n(choices.right, n),
        "majority": lambda n: vote(choices, ones, n, draws),
    }
    for name, values in scores.items():
        ways[f"best of n, {name}"] = lambda n, values=values: best_of_n(choices.right, values, n)
        weights = np.where(np.isneginf(values), 0.0, values)
        if (weights[choices.classes != MISSING] >= 0).all():
            ways[f"weighted vote, {name}"] = lambda n, weights=weights: vote(choices, weights, n, draws)
    return {
        name: _curve([way(n) for n in sizes(choices.right.shape[1])], choices, resampled)
        for name, way in ways.items()
    }


def _curve(accuracies: Sequence[Floats], choices: Choices, resampled: NDArray[np.int64]) -> Curve:
    low, high = zip(
        *(np.quantile(values[resampled].mean(1), (0.025, 0.975)) for values in accuracies), strict=True
    )
    return Curve(
        sizes(choices.right.shape[1]),
        [float(values.mean()) for values in accuracies],
        [float(value) for value in low],
        [float(value) for value in high],
    )
