"""Graded samples to numbers: results.json and the table on the screen. Every problem is in every denominator."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from src.code_solutions.tool_hook import CONTEXT_FULL, MAX_ROUNDS, MAX_TOKENS
from src.data.examples import OUTCOMES, Prompt
from src.errors import UserError
from src.evaluation.metrics import Bools, Floats, curves, interval
from src.grading.answer_types import KINDS, AnswerType
from src.grading.grader import GRADER_VERSION, Verdict
from src.grading.tasks import Task

# ways to choose among k samples: their names in metrics.py, in results.json and in tables
KEYS = {
    "pass": "pass_at", "majority": "maj_at", "best of n, score": "best_of_at", "weighted vote, score": "weighted_at",
}
CURVES = {"pass_at": "pass", "maj_at": "majority", "best_of_at": "best of", "weighted_at": "weighted"}
CUT = ("length", MAX_TOKENS, CONTEXT_FULL, MAX_ROUNDS)  # ends of samples that were not done


class Graded(NamedTuple):
    """One sample of a problem with its verdict; scores are a verifier's, finish and token_count the sampler's."""

    verdict: Verdict
    score: float | None = None
    step_scores: list[float] | None = None
    finish: str | None = None
    token_count: int | None = None
    vote: int | None = None  # the class of equal answers among the problem's samples; None has no vote


class Speed(NamedTuple):
    """What decoding took in this start of the program; a rerun that only finishes a file decodes less."""

    samples: int
    tokens: int
    seconds: float


def type_of(prompt: Prompt) -> AnswerType:
    """How the label of a problem is compared. Raises UserError for an answer type that is not known."""
    kind = prompt.answer_type or ""
    if kind not in KINDS:
        raise UserError(f"problem {prompt.id!r} has the answer_type {prompt.answer_type!r}; "
                        f"expected {', '.join(filter(None, KINDS))}")
    return AnswerType(kind, prompt.tolerance or 0.0)


def summarize(task: Task, prompts: Sequence[Prompt], problems: Mapping[str, Sequence[Graded]]) -> dict[str, object]:
    """Count the numbers of results.json. accuracy = mean over problems of the share of right samples.

    n samples a problem is the most any problem has; one with fewer is filled up with misses. metrics.curves() says how
    pass_at, maj_at, best_of_at and weighted_at use k of them. Intervals are 95%.
    """
    rows = [problems.get(prompt.id, ()) for prompt in prompts]
    given = [graded for samples in problems.values() for graded in samples]
    n = max([1, *map(len, rows)])
    outcomes = Counter(graded.verdict.outcome for samples in rows for graded in samples)
    outcomes["unparsed"] += n * len(prompts) - outcomes.total()
    right, classes = right_and_classes(rows, n)
    shares = (right.sum(1) / n).tolist()
    lengths = [graded.token_count for graded in given if graded.token_count is not None]
    results: dict[str, object] = {
        "task": task.name, "rules": task.rules(), "grader": GRADER_VERSION,
        "accuracy": _mean(shares), "interval": interval(shares),
        "problems": len(prompts), "samples": len(given), "samples_a_problem": n,
        "missing": outcomes["unparsed"], "never_sampled": n * len(prompts) - len(given),
        "truncated": sum(graded.finish in CUT for graded in given),
        "mean_tokens": _mean(lengths) if lengths else None,
        "outcomes": {name: outcomes[name] for name in OUTCOMES}}
    # choosing by score only where every sample has one
    scored = all(graded.score is not None for graded in given)
    scores = {"score": score_array(rows, n, lambda graded: graded.score)} if scored else {}
    found = {KEYS[name]: curve for name, curve in curves(right, classes, scores).items() if n > 1 or name == "pass"}
    for name, curve in found.items():
        results[name] = {k: _mean(chances.tolist()) for k, chances in curve.items()}
    results["intervals"] = {
        name: {k: interval(chances.tolist()) for k, chances in curve.items()} for name, curve in found.items()}
    levels, subjects = [prompt.level for prompt in prompts], [prompt.subject for prompt in prompts]
    return results | {"by_level": _by(levels, shares), "by_subject": _by(subjects, shares)}


def right_and_classes(rows: Sequence[Sequence[Graded]], n: int) -> tuple[Bools, list[list[int | None]]]:
    """Lay out P problems of at most n samples: which are right [P, n], and what each votes for; missing = wrong."""
    right = np.zeros((len(rows), n), dtype=bool)
    for place, samples in enumerate(rows):
        right[place, : len(samples)] = [graded.verdict.outcome == "right" for graded in samples]
    return right, [[graded.vote for graded in samples] + [None] * (n - len(samples)) for samples in rows]


def score_array(rows: Sequence[Sequence[Graded]], n: int, score: Callable[[Graded], float | None]) -> Floats:
    """Lay out the scores of P problems of at most n samples; -inf where there is none. -> [P, n]."""
    scores = np.full((len(rows), n), -np.inf)
    for place, samples in enumerate(rows):
        for number, graded in enumerate(samples):
            if (value := score(graded)) is not None:
                scores[place, number] = value
    return scores


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _by(names: Sequence[Hashable], shares: Sequence[float]) -> dict[Hashable, dict[str, object]]:
    """Accuracy, interval and count of each level or subject that problems name."""
    groups: dict[Hashable, list[float]] = defaultdict(list)
    for name, share in zip(names, shares, strict=True):
        if name is not None:
            groups[name].append(share)
    return {name: {"accuracy": _mean(values), "interval": interval(values), "problems": len(values)}
            for name, values in sorted(groups.items())}


def curves_of(results: Mapping[str, object]) -> dict[str, list[tuple[int, float, float, float]]]:
    """Of each way to use k samples, by its label, the points (k, accuracy, low, high); none of one sample a problem."""
    shown = CURVES.items() if results.get("samples_a_problem", 1) > 1 else ()
    return {label: [(int(k), value, *results["intervals"][key][k]) for k, value in results[key].items()]
            for key, label in shown if key in results}


def results_table(results: dict[str, object], speed: Speed | None = None) -> str:
    """results.json as a person reads it, and the speed of this start."""
    low, high = results["interval"]
    n, rules = results["samples_a_problem"], results["rules"]
    lines = [f"{results['task']}: {results['problems']} problems, {n} samples each; {rules['extraction']}, "
             f"{rules['equality']}",
             f"accuracy    {results['accuracy']:7.1%}   95% interval {low:.1%} .. {high:.1%}"]
    if "acc_norm" in results:
        low, high = results["acc_norm_interval"]
        lines.append(f"acc_norm    {results['acc_norm']:7.1%}   95% interval {low:.1%} .. {high:.1%}")
    for label, points in curves_of(results).items():
        values = "   ".join(f"@{k} {value:.1%}" for k, value, *_ in points)
        *_, low, high = points[-1]
        lines.append(f"{label:10}  {values}   ({low:.1%} .. {high:.1%})")
    for kind in ("level", "subject"):
        for name, entry in results[f"by_{kind}"].items():
            low, high = entry["interval"]
            name = f"level {name}" if kind == "level" else name
            lines.append(f"{name:22} {entry['accuracy']:7.1%}   {low:.1%} .. {high:.1%}   of {entry['problems']}")
    lines.append("outcomes    " + ", ".join(f"{count} {name}" for name, count in results["outcomes"].items()))
    length = "" if results["mean_tokens"] is None else f", {results['mean_tokens']:.0f} tokens on average"
    lines.append(f"samples     {results['samples']}, {results['never_sampled']} missing, {results['truncated']} cut at "
                 f"the limit{length}")
    if speed and speed.samples:
        lines.append(f"speed       {speed.tokens / speed.seconds:.0f} tokens/s over {speed.samples} samples")
    return "\n".join(lines)
