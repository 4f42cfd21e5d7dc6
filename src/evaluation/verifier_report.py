"""What a verifier is worth: how well its scores tell right from wrong, and what choosing by them gains."""

import math
from collections.abc import Sequence

import numpy as np

from src.data.examples import StepLabels
from src.errors import UserError
from src.evaluation import metrics
from src.evaluation.report import Graded, right_and_classes, score_array


def report_samples(problems: Sequence[Sequence[Graded]]) -> dict[str, object]:
    """The numbers on samples, some of each problem, with votes: accuracy on pairs, AUC, calibration, length, curves.
    Samples without a score are counted as too_long; they count in the curves alone, chosen last and without weight."""
    everyone = [sample for problem in problems for sample in problem]
    pooled = [sample for sample in everyone if sample.score is not None]
    scores = np.array([sample.score for sample in pooled])
    right = np.array([sample.verdict.outcome == "right" for sample in pooled])
    lengths = np.array([sample.token_count or math.nan for sample in pooled])
    error, bins = metrics.calibration(scores, right)
    return {"too_long": len(everyone) - len(pooled), "pair_accuracy": pair_accuracy(problems),
            "auc": metrics.auc(scores, right), "calibration_error": error, "calibration": bins,
            "length_correlation": correlation(scores, lengths), "curves": choice_curves(problems)}


def pair_accuracy(problems: Sequence[Sequence[Graded]]) -> float:
    """Share of the pairs of a right and a wrong sample of one problem in which the right one scores higher; a tie
    counts half. Every problem with both kinds weighs the same; nan if there is none."""
    scored = ([sample for sample in problem if sample.score is not None] for problem in problems)
    shares = [metrics.auc(np.array([sample.score for sample in problem]),
                          np.array([sample.verdict.outcome == "right" for sample in problem]))
              for problem in scored if problem]
    return float(np.nanmean(shares)) if not np.isnan(shares).all() else math.nan


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation where both are numbers; nan if one does not vary."""
    known = ~(np.isnan(first) | np.isnan(second))
    first, second = first[known], second[known]
    return float(np.corrcoef(first, second)[0, 1]) if len(first) > 1 and first.std() and second.std() else math.nan


def choice_curves(problems: Sequence[Sequence[Graded]]) -> dict[str, dict[str, list[float]]]:
    """Accuracy over n with 95% intervals, {"n", "accuracy", "low", "high"} for each way of choosing. Step scores choose
    in every aggregation. A missing sample is wrong and comes last, as does one without a score."""
    n = max(map(len, problems))
    scored = [sample for problem in problems for sample in problem if sample.score is not None]
    if all(sample.step_scores for sample in scored):
        scores = {name: score_array(problems, n, lambda sample, aggregate=aggregate: (
            None if sample.score is None else aggregate(sample.step_scores)))
            for name, aggregate in metrics.AGGREGATIONS.items()}
    else:
        scores = {"score": score_array(problems, n, lambda sample: sample.score)}
    report = {}
    for name, curve in metrics.curves(*right_and_classes(problems, n), scores).items():
        low, high = zip(*(metrics.interval(chances.tolist()) for chances in curve.values()), strict=True)
        accuracy = [float(chances.mean()) for chances in curve.values()]
        report[name] = {"n": list(curve), "accuracy": accuracy, "low": list(low), "high": list(high)}
    return report


def report_steps(
    rows: Sequence[StepLabels], found: Sequence[Sequence[float] | None], threshold: float | None = None
) -> dict[str, object]:
    """Count the numbers on labelled steps: accuracy at one half, on each kind of label, AUC, and ProcessBench's F1.

    Solutions of which nothing was found are counted as too_long, and not among the others.
    threshold: below it a step counts as wrong in F1; default one half. F1 is null where no row, or every row, has a
    wrong step.
    """
    too_long = sum(scores is None for scores in found)
    rows, found = _scored(rows, found)
    pairs = [(score, label >= 0.5) for row, scores in zip(rows, found, strict=True)
             for score, label in zip(scores, row.labels, strict=True) if label is not None]
    scores, right = np.array([score for score, _ in pairs]), np.array([label for _, label in pairs])
    agree = (scores >= 0.5) == right
    threshold = 0.5 if threshold is None else threshold
    expected = first_wrong(rows)
    wrong_steps = [metrics.first_wrong_step(scores, threshold) for scores in found]
    both = min(expected) < 0 <= max(expected)
    return {
        "solutions": len(rows), "too_long": too_long, "steps": len(pairs),
        "step_accuracy": float(agree.mean()),
        "step_accuracy_on_right": float(agree[right].mean()) if right.any() else None,
        "step_accuracy_on_wrong": float(agree[~right].mean()) if not right.all() else None,
        "step_auc": metrics.auc(scores, right),
        "f1": metrics.processbench_f1(wrong_steps, expected) if both else None,
        "f1_threshold": threshold}


def first_wrong(rows: Sequence[StepLabels]) -> list[int]:
    """The number of each row's first step that is labelled wrong; -1 for none."""
    return [next((place for place, label in enumerate(row.labels) if label is not None and label < 0.5), -1)
            for row in rows]


def _scored(
    rows: Sequence[StepLabels], found: Sequence[Sequence[float] | None]
) -> tuple[list[StepLabels], list[Sequence[float]]]:
    """The rows that have scores, and these."""
    kept = [(row, scores) for row, scores in zip(rows, found, strict=True) if scores is not None]
    return [row for row, _ in kept], [scores for _, scores in kept]


def choose_threshold(rows: Sequence[StepLabels], found: Sequence[Sequence[float] | None]) -> float:
    """The threshold with the best F1 on these solutions, as far as they have scores. Raises UserError where none of
    these, or all, have a wrong step."""
    rows, found = _scored(rows, found)
    n_wrong = sum(place >= 0 for place in first_wrong(rows))
    if n_wrong in (0, len(rows)):
        raise UserError(f"--threshold_file: {n_wrong} of its {len(rows)} solutions have a wrong step; F1 needs some "
                        "with one and some without")
    return metrics.best_threshold(found, first_wrong(rows))


def report_table(report: dict[str, object]) -> str:
    """The report as a person reads it."""
    lines = [
        f"pairs       {report['pair_accuracy']:7.1%} right before wrong; AUC {report['auc']:.3f}; calibration error "
        f"{report['calibration_error']:.3f}; correlation with length {report['length_correlation']:+.2f}"]
    if report["too_long"]:
        lines.append(f"{report['too_long']} samples are too long for the verifier: they come last and have no weight")
    width = max(map(len, report["curves"]))
    for name, curve in report["curves"].items():
        values = "  ".join(f"@{n} {value:.1%}" for n, value in zip(curve["n"], curve["accuracy"], strict=True))
        lines.append(f"{name:{width}}  {values}   ({curve['low'][-1]:.1%} .. {curve['high'][-1]:.1%})")
    return "\n".join(lines)


def steps_table(report: dict[str, object]) -> str:
    """The report on steps as a person reads it."""
    f1 = "none (one kind of solution is absent)" if report["f1"] is None else f"{report['f1']:.1%}"
    kinds = {"right": report["step_accuracy_on_right"], "wrong": report["step_accuracy_on_wrong"]}
    parts = ", ".join(f"{value:.1%} of {kind} steps" for kind, value in kinds.items() if value is not None)
    return (
        f"steps       {report['step_accuracy']:7.1%} of {report['steps']} ({parts}); AUC {report['step_auc']:.3f}\n"
        f"first error F1 {f1} at threshold {report['f1_threshold']:.3f}, {report['solutions']} solutions"
        + f"; {report['too_long']} more are too long for the verifier" * bool(report["too_long"]))
