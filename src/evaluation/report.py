"""Graded samples to numbers: results.json and the table on the screen. Every problem is in every denominator."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from operator import eq
from typing import NamedTuple

import numpy as np

from src.code_solutions.tool_hook import CONTEXT_FULL, MAX_ROUNDS, MAX_TOKENS
from src.data.examples import OUTCOMES, Prompt
from src.evaluation.vote import answer_classes, best_of, majority, pass_at_k, weighted_vote, wilson_interval
from src.grading.answer_types import AnswerType
from src.grading.grader import GRADER_VERSION, Grader, Verdict
from src.grading.tasks import Task

BOOTSTRAP_DRAWS = 1000
CURVES = {"pass_at": "pass", "maj_at": "majority", "best_of_at": "best of", "weighted_at": "weighted"}


CUT = ("length", MAX_TOKENS, CONTEXT_FULL, MAX_ROUNDS)  # ends of samples that were not done


class Graded(NamedTuple):
    """One sample of a problem with its verdict; score is a verifier's, finish and token_count the sampler's."""

    verdict: Verdict
    score: float | None = None
    finish: str | None = None
    token_count: int | None = None
    vote: str | None = None  # names the class of equal answers among the problem's samples; None has no vote


NOTHING = Graded(Verdict("unparsed", None))


class Speed(NamedTuple):
    """What decoding took in this start of the program; a rerun that only finishes a file decodes less."""

    samples: int
    tokens: int
    seconds: float


def type_of(prompt: Prompt) -> AnswerType:
    """How the label of a problem is compared."""
    return AnswerType(prompt.answer_type, prompt.tolerance)


def with_votes(samples: Sequence[Graded], answer_type: AnswerType, grader: Grader) -> list[Graded]:
    """The samples of one problem, each with the class of answers that it votes for."""
    same = partial(grader.equal, answer_type=answer_type)
    classes = answer_classes([sample.verdict.answer for sample in samples], same)
    return [
        sample._replace(vote=None if first is None else str(first))
        for sample, first in zip(samples, classes, strict=True)
    ]


def summarize(
    task: Task, prompts: Sequence[Prompt], problems: dict[str, list[Graded]], grader: Grader
) -> dict[str, object]:
    """The numbers of results.json. accuracy = mean over problems of the share of right samples.

    n samples a problem is the most any problem has; one with fewer is filled up with misses. maj_at, best_of_at and
    weighted_at average over the disjoint groups of k consecutive samples, and count classes of equal answers; of equal
    votes the answer seen first wins. choices() says what a vote by score weighs. Intervals are 95%.
    """
    n = max([1, *(len(samples) for samples in problems.values())])
    filled = []
    for prompt in prompts:
        samples = with_votes(problems.get(prompt.id, []), type_of(prompt), grader) if n > 1 else None
        samples = problems.get(prompt.id, []) if samples is None else samples
        filled.append(samples + [NOTHING] * (n - len(samples)))
    given = [graded for samples in problems.values() for graded in samples]
    outcomes = Counter(graded.verdict.outcome for samples in filled for graded in samples)
    shares = [sum(graded.verdict.outcome == "right" for graded in samples) / n for samples in filled]
    lengths = [graded.token_count for graded in given if graded.token_count is not None]
    results: dict[str, object] = {
        "task": task.name,
        "rules": task.rules(),
        "grader": GRADER_VERSION,
        "accuracy": _mean(shares),
        "interval": interval(shares),
        "problems": len(prompts),
        "samples": len(given),
        "samples_a_problem": n,
        "missing": outcomes["unparsed"],
        "never_sampled": n * len(prompts) - len(given),
        "truncated": sum(graded.finish in CUT for graded in given),
        "mean_tokens": _mean(lengths) if lengths else None,
        "outcomes": {name: outcomes[name] for name in OUTCOMES},
    }
    curves = _curves(filled, shares, n, [graded.score for graded in given])
    for name, values in curves.items():
        results[name] = {k: _mean(share) for k, share in values.items()}
    results["intervals"] = {
        name: {k: interval(share) for k, share in values.items()} for name, values in curves.items()
    }
    levels, subjects = [prompt.level for prompt in prompts], [prompt.subject for prompt in prompts]
    return results | {"by_level": _by(levels, shares), "by_subject": _by(subjects, shares)}


def _curves(
    filled: Sequence[Sequence[Graded]], shares: Sequence[float], n: int, scores: Sequence[float | None]
) -> dict[str, dict[int, list[float]]]:
    """For each way to use k samples and each k = 1, 2, 4 .. n: the problems' chances to be right."""
    sizes = [2**i for i in range(n.bit_length())]
    curves = {"pass_at": {k: [pass_at_k(n, round(share * n), k) for share in shares] for k in sizes}}
    for name, choose in choices(scores).items() if n > 1 else ():
        curves[name] = {k: [_chosen_share(samples, k, choose) for samples in filled] for k in sizes}
    return curves


Choice = Callable[[Sequence[Graded]], int | None]  # which sample of a group to submit; None = no answer


def choices(all_scores: Sequence[float | None]) -> dict[str, Choice]:
    """The ways to submit one answer for several samples; those by score only where every sample has one.

    Scores that all lie between 0 and 1 weigh a vote as they are, others by their sigmoid: scores around 0, summed as
    they are, would give a class nothing for its size.
    """
    scored = None not in all_scores
    shares = scored and all(0 <= score <= 1 for score in all_scores)

    def scores(group: Sequence[Graded]) -> list[float]:
        return [float("-inf") if graded.score is None else graded.score for graded in group]

    def weights(group: Sequence[Graded]) -> list[float]:
        return [max(0.0, s) if shares else 0.5 + 0.5 * math.tanh(0.5 * s) for s in scores(group)]

    def votes(group: Sequence[Graded]) -> list[str | None]:
        return [graded.vote for graded in group]

    ways: dict[str, Choice] = {"maj_at": lambda group: majority(votes(group), eq)}
    if scored:
        ways["best_of_at"] = lambda group: best_of(scores(group))
        ways["weighted_at"] = lambda group: weighted_vote(votes(group), weights(group), eq)
    return ways


def _chosen_share(samples: Sequence[Graded], k: int, choose: Choice) -> float:
    """Share of right submissions over the disjoint groups of k consecutive samples."""
    groups = [samples[start : start + k] for start in range(0, len(samples) - k + 1, k)]
    picks = [(group, choose(group)) for group in groups]
    right = sum(pick is not None and group[pick].verdict.outcome == "right" for group, pick in picks)
    return right / len(groups)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def interval(shares: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean: Wilson for 0/1 shares, a seeded bootstrap over problems otherwise."""
    if all(share in (0.0, 1.0) for share in shares):
        return wilson_interval(int(sum(shares)), len(shares))
    draws = np.random.default_rng(0).choice(np.array(shares), (BOOTSTRAP_DRAWS, len(shares))).mean(1)
    return float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


def _by(names: Sequence[Hashable], shares: Sequence[float]) -> dict[Hashable, dict[str, object]]:
    """Accuracy, interval and count of each level or subject that problems name."""
    groups: dict[Hashable, list[float]] = defaultdict(list)
    for name, share in zip(names, shares, strict=True):
        if name is not None:
            groups[name].append(share)
    return {
        name: {"accuracy": _mean(values), "interval": interval(values), "problems": len(values)}
        for name, values in sorted(groups.items())
    }


def results_table(results: dict[str, object], speed: Speed | None = None) -> str:
    """results.json as a person reads it, and the speed of this start."""
    low, high = results["interval"]
    n, rules = results["samples_a_problem"], results["rules"]
    lines = [
        f"{results['task']}: {results['problems']} problems, {n} samples each; "
        f"{rules['extraction']}, {rules['equality']}",
        f"accuracy    {results['accuracy']:7.1%}   95% interval {low:.1%} .. {high:.1%}",
    ]
    for name, label in CURVES.items():
        if n > 1 and name in results:
            values = "   ".join(f"@{k} {value:.1%}" for k, value in results[name].items())
            low, high = list(results["intervals"][name].values())[-1]
            lines.append(f"{label:10}  {values}   ({low:.1%} .. {high:.1%})")
    for kind in ("level", "subject"):
        for name, entry in results[f"by_{kind}"].items():
            low, high = entry["interval"]
            name = f"level {name}" if kind == "level" else name
            lines.append(
                f"{name:22} {entry['accuracy']:7.1%}   {low:.1%} .. {high:.1%}   of {entry['problems']}"
            )
    lines.append("outcomes    " + ", ".join(f"{count} {name}" for name, count in results["outcomes"].items()))
    length = "" if results["mean_tokens"] is None else f", {results['mean_tokens']:.0f} tokens on average"
    lines.append(
        f"samples     {results['samples']}, {results['never_sampled']} missing, "
        f"{results['truncated']} cut at the limit{length}"
    )
    if speed and speed.samples:
        lines.append(f"speed       {speed.tokens / speed.seconds:.0f} tokens/s over {speed.samples} samples")
    return "\n".join(lines)
