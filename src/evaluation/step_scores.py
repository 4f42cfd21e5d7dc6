"""Step scores of a solution as one score, and how well scores tell right from wrong. Pure functions of numbers."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def sigmoid(logit: float) -> float:
    """1 / (1 + e^-x) without overflow."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


# Probability that each step is right -> one weight in [0, 1] or, for sum_logit, a score (Sun et al. 2024, section 3.3:
# prod is best for weighted voting, min for best-of-n).
AGGREGATIONS = {
    "min": min,
    "prod": math.prod,
    "last": lambda probabilities: probabilities[-1],
    "mean": lambda probabilities: sum(probabilities) / len(probabilities),
    "max": max,
    "sum_logit": lambda probabilities: sum(math.log(p / (1 - p)) for p in map(clipped, probabilities)),
}


def clipped(probability: float) -> float:
    """The probability kept where its logit is a number."""
    return min(max(probability, 1e-12), 1 - 1e-12)


def auc(scores: Floats, right: NDArray[np.bool_]) -> float:
    """Chance that a right sample scores above a wrong one, ties counting half (Mann-Whitney). [N], [N]; nan if one
    kind is absent."""
    n_right, n_wrong = int(right.sum()), int((~right).sum())
    if not n_right or not n_wrong:
        return math.nan
    values, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # from 1; equal scores share their mean rank
    return float((ranks[right].sum() - n_right * (n_right + 1) / 2) / (n_right * n_wrong))


def calibration(
    probabilities: Floats, right: NDArray[np.bool_], n_bins: int = 10
) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error (Guo et al. 2017, eq. 3) and the bins behind it: probability, accuracy, count."""
    places = np.minimum((probabilities * n_bins).astype(int), n_bins - 1)
    bins = [
        {
            "probability": float(probabilities[places == place].mean()),
            "accuracy": float(right[places == place].mean()),
            "count": int((places == place).sum()),
        }
        for place in range(n_bins)
        if (places == place).any()
    ]
    error = sum(each["count"] * abs(each["probability"] - each["accuracy"]) for each in bins) / len(right)
    return error, bins


def first_wrong_step(probabilities: Sequence[float], threshold: float) -> int:
    """The first step below the threshold; -1 if all pass."""
    return next((place for place, p in enumerate(probabilities) if p < threshold), -1)


def processbench_f1(found: Sequence[int], expected: Sequence[int]) -> float:
    """Harmonic mean of the accuracies on solutions with an error (found exactly) and without one (Zheng et al. 2024,
    section 3.1). Raises ValueError if one kind is absent."""
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for got, want in zip(found, expected, strict=True):
        hits[want >= 0].append(got == want)
    if not hits[True] or not hits[False]:
        raise ValueError("F1 needs solutions with and without a wrong step; one kind is absent")
    faulty, sound = (sum(kind) / len(kind) for kind in hits.values())
    return 2 * faulty * sound / (faulty + sound) if faulty + sound else 0.0


def best_threshold(solutions: Sequence[Sequence[float]], expected: Sequence[int]) -> float:
    """The threshold with the highest F1 on these solutions: halfway between neighbouring probabilities."""
    values = sorted({p for probabilities in solutions for p in probabilities})
    candidates = [0.0, *((low + high) / 2 for low, high in zip(values, values[1:], strict=False)), 1.0 + 1e-9]
    if len(candidates) > 512:  # more would cost time and move F1 by less than its noise
        candidates = [candidates[int(place)] for place in np.linspace(0, len(candidates) - 1, 512)]
    return max(
        candidates,
        key=lambda threshold: processbench_f1(
            [first_wrong_step(probabilities, threshold) for probabilities in solutions], expected
        ),
    )
