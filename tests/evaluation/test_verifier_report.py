"""src/evaluation/verifier_report.py: numbers by hand."""

import math
from pathlib import Path

import pytest

from src.data.examples import StepLabels
from src.errors import UserError
from src.evaluation.report import Graded
from src.evaluation.verifier_report import (
    choose_threshold,
    report_samples,
    report_steps,
    report_table,
    steps_table,
)
from src.grading.grader import Verdict
from src.plot import plot_verifier


def sample(right: bool, score: float, steps: list[float] | None = None, tokens: int = 5) -> Graded:
    outcome = "right" if right else "wrong"
    return Graded(Verdict(outcome, "1"), score, steps, token_count=tokens, vote=0 if right else 1)


PROBLEMS = [
    [
        sample(True, 0.9, [0.9, 1.0], 4),
        sample(False, 0.5, [0.5, 1.0], 6),
        sample(False, 0.95, [0.95, 1.0], 8),
    ],
    [sample(True, 0.7, [0.7], 4), sample(True, 0.6, [0.6], 5)],
    [],
]


def test_report_on_samples_by_hand(tmp_path: Path) -> None:
    report = report_samples(PROBLEMS)
    assert (
        report["pair_accuracy"] == 0.5
    )  # one problem has both kinds: right before one wrong, behind the other
    assert report["auc"] == pytest.approx((1 + 0 + 1 + 0 + 1 + 0) / 6)
    curves = report["curves"]
    assert curves["pass"]["n"] == [1, 2, 3]
    # of all three samples: problem 0 takes the wrong 0.95, problem 1 is right, problem 2 has none
    assert curves["best of n, prod"]["accuracy"][-1] == pytest.approx(1 / 3)
    # 0.9 stands against 0.5 + 0.95
    assert curves["weighted vote, prod"]["accuracy"][-1] == pytest.approx(1 / 3)
    assert curves["pass"]["accuracy"][-1] == pytest.approx(2 / 3)
    assert "weighted vote, min" in curves and "best of n, sum_logit" in curves
    assert "pass " in report_table(report) and "@3" in report_table(report)
    plot_verifier(report, tmp_path / "verifier.png")
    assert (tmp_path / "verifier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("steps", [None, [0.9, 0.8]])
def test_samples_without_a_score_are_counted_come_last_and_weigh_nothing(steps: list[float] | None) -> None:
    long = sample(False, 0.0)._replace(score=None)
    problems = [[sample(True, 0.9, steps), long, long], [long, long, sample(True, 0.2, steps)]]
    report = report_samples(problems)
    assert report["too_long"] == 4 and "4 samples are too long for the verifier" in report_table(report)
    alone = report_samples([[sample(True, 0.9, steps)], [sample(True, 0.2, steps)]])
    assert report["calibration"] == alone["calibration"] and alone["too_long"] == 0
    curves, name = report["curves"], "prod" if steps else "score"
    assert curves["majority"]["accuracy"][-1] == 0.0  # they still vote, and still count in pass at 1
    assert curves["pass"]["accuracy"][0] == pytest.approx(1 / 3)
    assert curves[f"best of n, {name}"]["accuracy"][-1] == 1.0
    assert curves[f"weighted vote, {name}"]["accuracy"][-1] == 1.0
    none = report_samples([[long], [sample(True, 0.9, steps)]])
    assert none["curves"][f"best of n, {name}"]["accuracy"] == [0.5]


def test_scores_of_whole_solutions_give_one_curve_each() -> None:
    problems = [[sample(True, 0.9), sample(False, 0.1)]]
    curves = report_samples(problems)["curves"]
    assert curves.keys() == {"pass", "majority", "best of n, score", "weighted vote, score"}
    assert curves["best of n, score"]["accuracy"] == [0.5, 1.0]


ROWS = [
    StepLabels("q", ["a", "b", "c"], [1.0, 0.0, None]),
    StepLabels("q", ["a", "b"], [1.0, 1.0]),
]


def test_report_on_steps_by_hand() -> None:
    report = report_steps(ROWS, [[0.9, 0.6, 0.1], [0.4, 0.8]])
    assert report["steps"] == 4 and report["step_accuracy"] == 0.5
    assert (
        report["step_accuracy_on_right"] == pytest.approx(2 / 3) and report["step_accuracy_on_wrong"] == 0.0
    )
    assert report["f1"] == 0.0  # first errors found: step 2 and step 0
    with_long = report_steps([*ROWS, StepLabels("q", ["d"], [0.0])], [[0.9, 0.6, 0.1], [0.4, 0.8], None])
    assert with_long == report | {"too_long": 1} and "1 more are too long" in steps_table(with_long)
    perfect = [[0.9, 0.6, 0.1], [0.7, 0.8]]
    threshold = choose_threshold(ROWS, perfect)
    for found, n in (([None, perfect[1]], 0), ([perfect[0], None], 1)):
        with pytest.raises(UserError, match=f"--threshold_file: {n} of its 1 solutions have a wrong step"):
            choose_threshold(ROWS, found)
    assert 0.6 < threshold <= 0.7
    assert report_steps(ROWS, perfect, threshold)["f1"] == 1.0
    assert "F1 100.0%" in steps_table(report_steps(ROWS, perfect, threshold))


def test_f1_needs_both_kinds_of_solutions() -> None:
    report = report_steps(ROWS[1:], [[0.4, 0.8]])
    assert report["f1"] is None and report["step_accuracy_on_wrong"] is None
    assert math.isnan(report["step_auc"]) and "one kind of solution is absent" in steps_table(report)
