"""src/construct/from_samples.py: balance within a problem, and right solutions."""

from src.construct.from_samples import outcome_rows, right_solutions
from tests.construct.test_pairs import SAMPLES, sample


def test_each_problem_keeps_both_kinds_within_the_ratio() -> None:
    many = [sample("0", number, f"r{number}", "right") for number in range(9)]
    rows = outcome_rows([*many, sample("0", 9, "w", "wrong"), sample("1", 0, "r", "right")], 3.0, 32, seed=1)
    assert sum(row["correct"] for row in rows) == 3
    assert len(rows) == 4 and {row["instruction"] for row in rows} == {"q0"}


def test_a_limit_cuts_both_kinds_alike() -> None:
    many = [sample("0", n, f"{n}", outcome) for n, outcome in enumerate(["right", "wrong", "unparsed"] * 4)]
    rows = outcome_rows(many, 3.0, 6, seed=1)
    assert [row["correct"] for row in rows].count(True) == 3 and len(rows) == 6
    assert outcome_rows(many, 3.0, 6, seed=1) == rows != outcome_rows(many, 3.0, 6, seed=2)


def test_right_solutions_stand_once_and_within_the_limit() -> None:
    found = {row["instruction"]: row["output"] for row in right_solutions(SAMPLES, 2, seed=1)}
    assert found.keys() == {"q0", "q1", "q3"}
    assert found["q0"] == ["r1"] and len(found["q3"]) == 2
