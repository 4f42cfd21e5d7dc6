"""src/construct/from_rows.py: another problem's solution in front, and what it makes of the labels."""

import json
from pathlib import Path

import pytest

from src.construct.from_rows import concatenate, concatenated
from src.data.examples import StepLabels, read_step_labels
from src.errors import UserError
from tests.tiny import build

RIGHT = StepLabels("1+1?", ["1+1=2", "#### 2"], [1.0, 1.0])
WRONG = StepLabels("2+3?", ["2=2", "2+3=6", "#### 6"], [1.0, 0.0, 0.0])
ROW = StepLabels("4+4?", ["4+4=8", "8=9", "#### 9"], [0.7, None, 0.0])


def test_steps_behind_a_right_solution_keep_their_labels() -> None:
    steps = ["1+1=2", "4+4=8", "8=9", "#### 9"]
    assert concatenate(RIGHT, ROW) == StepLabels("1+1? 4+4?", steps, [1.0, 0.7, None, 0.0])


def test_all_is_wrong_behind_a_wrong_solution() -> None:
    assert concatenate(WRONG, RIGHT) == StepLabels(
        "2+3? 1+1?", ["2=2", "2+3=6", "1+1=2", "#### 2"], [1.0, 0.0, 0.0, 0.0]
    )


def test_a_solution_that_is_wrong_in_its_last_step_keeps_it() -> None:
    """PRM800K's rows end with the first mistake, and of an alternative step only that one is judged."""
    ended = StepLabels("6?", ["6=6", "6=7"], [1.0, 0.0])
    assert concatenate(ended, RIGHT) == StepLabels("6? 1+1?", ["6=6", "6=7", "1+1=2", "#### 2"], [1.0, 0.0, 0.0, 0.0])
    alternative = StepLabels("6?", ["6=6", "6=7"], [None, 0.0])
    assert concatenate(alternative, RIGHT).labels == [None, 0.0, 0.0, 0.0]


def test_in_front_stand_right_solutions_and_lost_ones() -> None:
    unknown = StepLabels("7?", ["7=7", "#### 7"], [1.0, None])
    lucky = StepLabels("8?", ["8=9", "#### 8"], [0.0, 1.0])
    rows = [RIGHT, WRONG, unknown, lucky, ROW]
    for wrong_share, fronts in ((0.0, {"1+1?"}), (1.0, {"2+3?", "4+4?"})):
        made = [row for seed in range(20) for row in concatenated(rows, 1.0, wrong_share, seed, "rows.json")]
        assert {row.instruction.split(" ")[0] for row in made if " " in row.instruction} == fronts


def test_share_and_wrong_share_are_met() -> None:
    rows = [
        row._replace(instruction=f"{n} {row.instruction}") for n in range(1000) for row in (RIGHT, WRONG, ROW)
    ]
    made = concatenated(rows, share=0.6, wrong_share=0.3, seed=1, source="rows.json")
    assert len(made) == len(rows)
    behind = [row for row in made if row.instruction.count("?") == 2]
    assert len(behind) / len(made) == pytest.approx(0.6, abs=0.03)
    lost = [row for row in behind if not row.instruction.split("? ")[0].endswith("1+1")]
    assert len(lost) / len(behind) == pytest.approx(0.3, abs=0.03)
    assert all(label == 0 for row in lost for label in row.labels[-2:])
    assert concatenated(rows, 0.6, 0.3, seed=1, source="a") == made != concatenated(rows, 0.6, 0.3, seed=2, source="a")


def test_no_row_stands_behind_its_own_problem() -> None:
    assert concatenated([RIGHT, RIGHT], share=1.0, wrong_share=0.0, seed=1, source="rows.json") == [RIGHT, RIGHT]


def test_a_kind_that_is_asked_for_must_be_there() -> None:
    with pytest.raises(
        UserError, match="rows.json has no wrong solution to put in front of others; set --wrong_share 0"
    ):
        concatenated([RIGHT], share=0.5, wrong_share=0.3, seed=1, source="rows.json")
    with pytest.raises(
        UserError, match="rows.json has no right solution to put in front of others; set --wrong_share 1"
    ):
        concatenated([WRONG, ROW], share=0.5, wrong_share=0.3, seed=1, source="rows.json")


def test_the_command_writes_rows_that_a_verifier_learns_from(tmp_path: Path) -> None:
    source, target = tmp_path / "steps.json", tmp_path / "joined.json"
    source.write_text(json.dumps([row.values for row in (RIGHT, WRONG, ROW)]))
    build.join(str(source), str(target), share=1.0, wrong_share=0.0)
    rows = [row._replace(where="") for row in read_step_labels(str(target))]
    assert rows[1:] == [concatenate(RIGHT, WRONG), concatenate(RIGHT, ROW)]


def test_outcomes_are_joined_whole(tmp_path: Path) -> None:
    source, target = tmp_path / "outcome.json", tmp_path / "joined.json"
    rows = [{"instruction": "1+1?", "output": "1+1=2\n\n\n#### 2", "correct": True},
            {"instruction": "2+3?", "output": "2+3=6\n\n#### 6", "correct": False}]
    source.write_text(json.dumps(rows))
    build.join(str(source), str(target), share=1.0, wrong_share=1.0)
    right, wrong = json.loads(target.read_text())
    text = "2+3=6\n\n#### 6\n\n1+1=2\n\n\n#### 2"
    assert right == {"instruction": "2+3? 1+1?", "output": text, "correct": False} and wrong == rows[1]
    build.join(str(source), str(target), share=1.0, wrong_share=0.0)
    right, wrong = json.loads(target.read_text())
    text = "1+1=2\n\n\n#### 2\n\n2+3=6\n\n#### 6"
    assert wrong == {"instruction": "1+1? 2+3?", "output": text, "correct": False} and right == rows[0]


def test_judged_steps_stay_so_even_when_each_solution_has_one(tmp_path: Path) -> None:
    source, target = tmp_path / "steps.json", tmp_path / "joined.json"
    rows = [{"instruction": f"{n}?", "steps": [f"{n}"], "labels": [0.7]} for n in range(2)]
    source.write_text(json.dumps(rows))
    build.join(str(source), str(target), share=0.0, wrong_share=0.0)
    assert json.loads(target.read_text()) == rows


def test_of_a_file_with_both_each_row_stays_of_its_kind(tmp_path: Path) -> None:
    source, target = tmp_path / "both.json", tmp_path / "joined.json"
    outcome = {"instruction": "1+1?", "output": "2", "correct": True}
    steps = {"instruction": "2+2?", "steps": ["2+2=4", "so 4"], "labels": [1.0, None]}
    for rows in ([outcome, steps], [steps, outcome]):
        source.write_text(json.dumps(rows))
        build.join(str(source), str(target), share=0.0, wrong_share=0.0)
        assert json.loads(target.read_text()) == rows
