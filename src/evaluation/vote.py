"""Many samples of one problem as one number or one answer. Pure functions; equality of answers is passed in."""

import math
from collections.abc import Callable, Sequence

NORMAL_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution

Equal = Callable[[str, str], bool]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of the n samples, drawn without replacement, hold a right one when c are right.

    1 - C(n-c, k) / C(n, k) as the product of Chen et al. 2021 ("Evaluating Large Language Models Trained on Code",
    section 2.1), unbiased for every k. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"c={c} right samples of n={n}: expected 0 <= c <= n")
    if not 1 <= k <= n:
        raise ValueError(
            f"pass@{k} needs at least {k} samples of every problem, found {n}; sample more or lower k"
        )
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def wilson_interval(right: int, total: int) -> tuple[float, float]:
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


def answer_classes(answers: Sequence[str | None], equal: Equal) -> list[int | None]:
    """For each answer the index of the first answer of its class of equal ones; None for a missing answer (None).

    Each answer joins the first class whose first member it equals.
    """
    firsts: list[int] = []
    classes: list[int | None] = []
    for index, answer in enumerate(answers):
        first = None
        if answer is not None:
            first = next((first for first in firsts if equal(answers[first], answer)), index)
            if first == index:
                firsts.append(index)
        classes.append(first)
    return classes


def majority(answers: Sequence[str | None], equal: Equal) -> int | None:
    """Index of the first answer of the largest class of equal answers (self-consistency, Wang et al. 2022).

    None among the answers is a missing one and has no vote; None is returned when nobody votes. Of classes of the
    same size the one seen first wins.
    """
    return weighted_vote(answers, [1.0] * len(answers), equal)


def best_of(scores: Sequence[float]) -> int:
    """Index of the highest score, the first one of equals (best-of-N with a verifier, Cobbe et al. 2021).

    Raises ValueError if there are no scores or one is not a number.
    """
    refuse_nan(scores)
    if not scores:
        raise ValueError("best_of needs at least one score, found none")
    return max(range(len(scores)), key=scores.__getitem__)


def weighted_vote(answers: Sequence[str | None], scores: Sequence[float], equal: Equal) -> int | None:
    """Index of the first answer of the class with the highest sum of scores (Li et al. 2022, "DiVeRSe").

    Missing answers (None) have no vote; None is returned when nobody votes. Of equal sums the class seen first wins.
    Raises ValueError if the lengths differ or a score is not a number.
    """
    if len(answers) != len(scores):
        raise ValueError(f"{len(answers)} answers but {len(scores)} scores; expected one score an answer")
    refuse_nan(scores)
    sums: dict[int, float] = {}  # index of the first member of a class -> its score
    for first, score in zip(answer_classes(answers, equal), scores, strict=True):
        if first is not None:
            sums[first] = sums.get(first, 0.0) + score
    return max(sums, key=sums.__getitem__) if sums else None


def refuse_nan(scores: Sequence[float]) -> None:
    """Raise ValueError if a score is not a number: every comparison with it would be false."""
    for index, score in enumerate(scores):
        if math.isnan(score):
            raise ValueError(
                f"score {index} of {len(scores)} is not a number; the verifier that gave it has diverged"
            )
