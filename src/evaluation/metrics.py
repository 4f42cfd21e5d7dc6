"""Many samples of a problem as one answer or one number, and how well scores tell right from wrong.

Pure functions of numbers; equality of answers is passed in. P problems, N samples of each.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

NORMAL_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
BOOTSTRAP_DRAWS = 1000

Equal = Callable[[str, str], bool]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


def curves(
    right: Bools, classes: Sequence[Sequence[int | None]], scores: Mapping[str, Floats]
) -> dict[str, dict[int, Floats]]:
    """Compute each problem's chance to be right when one answer is submitted for k samples, k = 1, 2, 4 .. N.

    right [P, N]; classes: rows of answer_classes(); scores by name [P, N], -inf for a sample without one. ->
    {"pass", "majority", "best of n, NAME", "weighted vote, NAME"} -> k -> [P]. At k = 1 all of them are pass@1.
    Raises ValueError for a score that is not a number: every comparison with it would be false.
    """
    n_problems, n = right.shape
    sizes = [*(2**i for i in range((n - 1).bit_length())), n]
    for name, values in scores.items():
        if np.isnan(values).any():
            raise ValueError(f"a score ({name}) is not a number; the verifier that gave it has diverged")
    found = {"pass": {k: np.array([pass_at_k(n, int(c), k) for c in right.sum(1)]) for k in sizes},
             "majority": {k: vote(right, classes, np.ones(right.shape), k) for k in sizes}}
    for name, values in scores.items():
        weights = vote_weights(values)
        found[f"best of n, {name}"] = {k: best_of_n(right, values, k) for k in sizes}
        found[f"weighted vote, {name}"] = {k: vote(right, classes, weights, k) for k in sizes}
    return found


def pass_at_k(n: int, c: int, k: int) -> float:
    """Compute the probability that k of n samples, drawn without replacement, hold a right one when c are right.

    1 - C(n-c, k) / C(n, k) as the product of Chen et al. 2021 ("Evaluating Large Language Models Trained on Code",
    section 2.1), unbiased for every k. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"c={c} right samples of n={n}: expected 0 <= c <= n")
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples of every problem, found {n}; sample more or lower k")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def best_of_n(right: Bools, scores: Floats, n: int) -> Floats:
    """Compute the chance that the best-scored of n samples, drawn without replacement, is right. [P, N] twice -> [P].

    Exact: the i-th lowest score (from 1) is the highest of the n with probability C(i-1, n-1) / C(N, n). Of equal
    scores each is as likely to be taken (best-of-N with a verifier: Cobbe et al. 2021).
    """
    places = np.arange(1, right.shape[1] + 1)
    # C(i-1, n-1) / C(N, n), by the ratio of neighbours, which no binomial of a large N can overflow
    chance = np.zeros(len(places))
    chance[-1] = n / len(places)
    for i in range(len(places) - 1, n - 1, -1):
        chance[i - 1] = chance[i] * (i - n + 1) / i
    order = np.argsort(scores, axis=1, kind="stable")
    shares = np.take_along_axis(right, order, 1).astype(np.float64)
    # right of each sample, replaced by the mean over the samples of the same score
    for row, values in zip(shares, np.take_along_axis(scores, order, 1), strict=True):
        starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
        lengths = np.diff(np.r_[starts, len(values)])
        row[:] = np.repeat(np.add.reduceat(row, starts) / lengths, lengths)
    return shares @ chance


def vote(right: Bools, classes: Sequence[Sequence[int | None]], weights: Floats, k: int) -> Floats:
    """Compute the chance that the vote of a group of k consecutive samples is right. [P, N], [P, N] -> [P].

    The mean over the disjoint groups: samples of a problem are exchangeable, so this is an unbiased estimate of the
    expectation, which no formula gives; it needs no random draws, is exact at k = 1, and at k = N the one vote of all
    samples. Of classes that tie each is as likely to be taken; no votes is wrong.
    """
    starts = range(0, right.shape[1] - k + 1, k)
    shares = np.zeros(len(right))
    for place, (is_right, names, weighs) in enumerate(zip(right, classes, weights.tolist(), strict=True)):
        for start in starts:
            if tied := winners(names[start : start + k], weighs[start : start + k]):
                shares[place] += is_right[start:][tied].mean()
    return shares / len(starts)


def winners(classes: Sequence[int | None], weights: Sequence[float]) -> list[int]:
    """Find the place of the first member of each class with the highest sum of weights; weights of one make it the
    majority (self-consistency, Wang et al. 2022; by a verifier's scores, Li et al. 2022, "DiVeRSe").

    More than one place is a tie, in the order seen. None among the classes has no vote; nobody's vote is no place.
    """
    sums: dict[int, float] = {}
    for name, weight in zip(classes, weights, strict=True):
        if name is not None:
            sums[name] = sums.get(name, 0.0) + weight
    highest = max(sums.values(), default=0.0)
    return [list(classes).index(name) for name, weight in sums.items() if weight == highest]


def vote_weights(scores: Floats) -> Floats:
    """Turn scores into weights of votes; -inf weighs nothing. Scores that all lie between 0 and 1 weigh as they are,
    others by their sigmoid: scores around 0, summed as they are, would give a class nothing for its size."""
    known = scores[~np.isneginf(scores)]
    if ((known >= 0) & (known <= 1)).all():
        return np.maximum(scores, 0.0)
    return 0.5 + 0.5 * np.tanh(0.5 * scores)


def answer_classes(answers: Sequence[str | None], equal: Equal) -> list[int | None]:
    """For each answer the index of the first answer of its class of equal ones; None for a missing answer (None).

    Answers join the first class whose most frequent one they equal, frequent ones before others: where 5 equals both
    5 m and 5 cm, which differ, the order of the samples decides nothing.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    spoken_for: dict[str, str] = {}
    for answer in sorted(counts, key=lambda answer: (-counts[answer], answer)):
        heads = dict.fromkeys(spoken_for.values())
        spoken_for[answer] = next((head for head in heads if equal(head, answer)), answer)
    firsts: dict[str, int] = {}
    return [None if answer is None else firsts.setdefault(spoken_for[answer], index)
            for index, answer in enumerate(answers)]


def interval(shares: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean: Wilson for 0/1 shares, a seeded bootstrap over problems otherwise. Equal shares, of
    which the bootstrap would see no spread, count as the trials of their mean: none of [0, 1] spread further."""
    if all(share in (0.0, 1.0) for share in shares) or len(set(shares)) == 1:
        return wilson_interval(sum(shares), len(shares))
    draws = np.random.default_rng(0).choice(np.array(shares), (BOOTSTRAP_DRAWS, len(shares))).mean(1)
    return float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


def wilson_interval(right: float, total: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927, "Probable Inference"), as fractions.

    Valid for independent trials: count problems, not samples of the same problem. Raises ValueError unless
    0 <= right <= total and total > 0.
    """
    if total <= 0 or not 0 <= right <= total:
        raise ValueError(f"{right} right of {total}: expected 0 <= right <= total and a positive total")
    share, z2 = right / total, NORMAL_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return max(0.0, centre - half), min(1.0, centre + half)


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
    # kept where a logit is a number
    "sum_logit": lambda probabilities: sum(math.log(p / (1 - p)) for p in np.clip(probabilities, 1e-12, 1 - 1e-12)),
}


def auc(scores: Floats, right: Bools) -> float:
    """Chance that a right sample scores above a wrong one, ties counting half (Mann-Whitney). [N], [N]; nan if one
    kind is absent."""
    n_right, n_wrong = int(right.sum()), int((~right).sum())
    if not n_right or not n_wrong:
        return math.nan
    values, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # from 1; equal scores share their mean rank
    return float((ranks[right].sum() - n_right * (n_right + 1) / 2) / (n_right * n_wrong))


def calibration(probabilities: Floats, right: Bools) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error (Guo et al. 2017, eq. 3) and its ten bins: probability, accuracy, count."""
    places = np.minimum((probabilities * 10).astype(int), 9)
    bins = [{"probability": float(probabilities[inside].mean()), "accuracy": float(right[inside].mean()),
             "count": int(inside.sum())} for inside in (places == place for place in np.unique(places))]
    error = sum(each["count"] * abs(each["probability"] - each["accuracy"]) for each in bins) / len(right)
    return error, bins


def first_wrong_step(probabilities: Sequence[float], threshold: float) -> int:
    """Find the first step below the threshold; -1 if all pass."""
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
    """Find the threshold with the highest F1 on these solutions: halfway between neighbouring probabilities."""
    values = sorted({p for probabilities in solutions for p in probabilities})
    candidates = [0.0, *((low + high) / 2 for low, high in zip(values, values[1:], strict=False)), 1.0 + 1e-9]
    if len(candidates) > 512:  # more would cost time and move F1 by less than its noise
        candidates = [candidates[int(place)] for place in np.linspace(0, len(candidates) - 1, 512)]
    return max(candidates, key=lambda threshold: processbench_f1(
        [first_wrong_step(probabilities, threshold) for probabilities in solutions], expected))
