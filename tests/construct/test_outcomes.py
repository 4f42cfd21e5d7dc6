"""src/construct/from_samples.py: balance within a problem, right solutions, problems of middling difficulty."""

import datetime
import json
import math
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet

from src.construct.from_rows import SelectConfig, select
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


def test_problems_are_selected_that_some_samples_solve(tmp_path: Path) -> None:
    outcomes = {"0": ["right", "right"], "1": ["right", "wrong"], "2": ["wrong", "wrong"], "3": ["unparsed", "right"]}
    rows = [{"id": id, "sample": number, "prompt": f"q{id}", "response": f"r{number}", "outcome": outcome}
            for id, found in outcomes.items() for number, outcome in enumerate(found)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = [{"instruction": f"q{id}", "output": "", "label": id} for id in range(5)]
    (tmp_path / "all.json").write_text(json.dumps(problems))
    select(SelectConfig(train_file=str(tmp_path / "all.json"), samples_file=str(tmp_path / "samples.jsonl"),
                        save_file=str(tmp_path / "some.json")))
    assert [row["label"] for row in json.loads((tmp_path / "some.json").read_text())] == [1, 3]


def test_what_json_has_no_kind_for_is_written_as_text(tmp_path: Path) -> None:
    row = {"instruction": "1+1?", "day": datetime.date(2024, 7, 26), "sum": Decimal("1.50"), "gone": math.nan}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    select(SelectConfig(train_file=str(tmp_path / "rows.parquet"), save_file=str(tmp_path / "rows.json")))
    assert json.loads((tmp_path / "rows.json").read_text()) == [
        {"instruction": "1+1?", "day": "2024-07-26", "sum": "1.50", "gone": None}]
