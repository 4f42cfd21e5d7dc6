"""dataset/readers.py: rows in the published schemas become prompts that a task of the same name grades."""

import csv
from pathlib import Path

import pytest

from dataset.prepare import build, save
from dataset.readers import READERS
from src.data.examples import read_prompts
from src.errors import UserError
from src.evaluation.report import type_of
from src.grading.grader import Grader
from tests.test_prepare import write

ARC = {"id": "M_1", "question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "2"}
MMLU = {"question": "2+2?", "subject": "algebra", "choices": ["3", "4", "5", "6"], "answer": 1}
GPQA = {"Question": "Which?", "Correct Answer": "right", "Incorrect Answer 1": "w1", "Incorrect Answer 2": "w2",
        "Incorrect Answer 3": "w3", "Record ID": "rec1", "High-level domain": "Physics"}
OLYMPIC = {"id": "Math_1", "problem": "Is it?", "answer": ["False"], "answer_type": "TF", "subject": "Math"}
ROWS = {  # a row of the published file, what is made of it, a right and a wrong response
    "aime24": [({"id": 60, "problem": "P", "answer": "204"}, {"label": "204", "id": "60"},
                "\\boxed{204}", "\\boxed{24}")],
    "aime25": [({"question": "P", "answer": "70"}, {"label": "70"}, "\\boxed{70}", "\\boxed{7}")],
    "amc23": [({"id": 0, "problem": "P", "answer": 27.0, "url": "u"}, {"label": "27"}, "\\boxed{27}", "\\boxed{2}")],
    "hmmt": [({"problem_idx": 1, "problem": "P", "answer": "\\frac{1}{2}", "problem_type": ["A"]},
              {"label": "\\frac{1}{2}", "id": "1"}, "\\boxed{0.5}", "\\boxed{2}")],
    "minerva": [({"problem": "P", "solution": "so \\boxed{4.5e33}", "type": "Physics", "idx": 0},
                 {"label": "4.5e33", "subject": "Physics"}, "\\boxed{4.5e33}", "\\boxed{4.5}"),
                ({"question": "P", "answer": "3"}, {"label": "3"}, "\\boxed{3}", "\\boxed{4}")],
    "mmlu": [(MMLU, {"instruction": "2+2?\nOptions: (A) 3 (B) 4 (C) 5 (D) 6", "label": "B", "subject": "algebra"},
              "The answer is (B).", "The answer is (C).")],
    "arc": [(ARC, {"instruction": "Hot?\nOptions: (A) ice (B) fire", "label": "B", "id": "M_1"},
             "The answer is (B).", "The answer is (A).")],
    "commonsenseqa": [(ARC | {"choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "A"},
                       {"label": "A"}, "The answer is A.", "The answer is B.")],
    "bbh": [({"input": "Q", "target": target}, {"label": target, "answer_type": kind}, f"The answer is {right}.",
             f"The answer is {wrong}.")
            for target, kind, right, wrong in (("(B)", "choice", "(B)", "(A)"), ("valid", "valid_invalid", "valid",
            "invalid"), ("No", "yes_no", "no", "yes"), ("False", "true_false", "False", "True"))]
           + [({"input": "Q", "target": "-12"}, {"label": "-12"}, "The answer is -12.", "The answer is 12.")],
    "agieval": [({"passage": "Text.", "question": "Q?", "options": ["(A)x", "(B)y"], "label": "B", "answer": None},
                 {"instruction": "Text.\nQ?\nOptions: (A) x (B) y", "label": "B", "answer_type": "choice"},
                 "The answer is B.", "The answer is A."),
                ({"passage": None, "question": "Q?", "options": None, "label": None, "answer": "$\\frac{1}{2}$"},
                 {"instruction": "Q?", "label": "\\frac{1}{2}"}, "\\boxed{0.5}", "\\boxed{5}")],
    "olympicarena": [(OLYMPIC, {"label": "False", "answer_type": "true_false", "subject": "Math"},
                      "The answer is False.", "The answer is True."),
                     (OLYMPIC | {"answer_type": "NV", "answer": ["7"]}, {"label": "7", "answer_type": "number"},
                      "\\boxed{7}", "\\boxed{8}")],
}


def test_every_reader_is_tested() -> None:
    assert {*ROWS, "gpqa"} == {*READERS}


@pytest.mark.parametrize("name", ROWS)
def test_published_rows_become_prompts_that_the_task_grades(tmp_path: Path, name: str) -> None:
    for number, (raw, expected, right, wrong) in enumerate(ROWS[name]):
        report = build(Path(write(tmp_path / f"{number}.jsonl", raw)), name, [], {}, strict=True)
        (row,) = report.rows
        assert expected.items() <= row.items()
        save(report.rows, tmp_path / "out.json")
        (prompt,) = read_prompts(str(tmp_path / "out.json"), need_label=True)
        with Grader(name) as grader:
            verdicts = grader.grade([right, wrong], [prompt.label] * 2, [type_of(prompt)] * 2)
        assert [verdict.outcome for verdict in verdicts] == ["right", "wrong"], verdicts


def test_gpqa_is_a_csv_whose_choices_stand_in_an_order_of_their_own(tmp_path: Path) -> None:
    questions = [GPQA | {"Question": f"Which, {n}?"} for n in range(40)]
    with (tmp_path / "gpqa.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, GPQA.keys())
        writer.writeheader()
        writer.writerows(questions)
    found = [build(tmp_path / "gpqa.csv", "gpqa", [], {}, strict=True).rows for _ in range(2)]
    assert found[0] == found[1] and len({row["label"] for row in found[0]}) == 4
    assert all(f"({row['label']}) right" in row["instruction"] for row in found[0])
    assert found[0][0]["id"] == "rec1" and found[0][0]["subject"] == "Physics"
    (tmp_path / "twice.csv").write_text("Question,Question\nA?,B?\n")
    with pytest.raises(UserError, match="twice.csv has the column 'Question' twice, of which any reader would lose"):
        build(tmp_path / "twice.csv", "gpqa", [], {}, strict=True)


@pytest.mark.parametrize(("name", "row", "complaint"), [
    ("mmlu", MMLU | {"answer": 4}, "line 1: expected a place or one of A, B, C, D under 'answer', found 4"),
    ("mmlu", MMLU | {"answer": "E"}, "found 'E'"),
    ("mmlu", MMLU | {"choices": "3 4"}, "expected 2 to 10 texts under 'choices', found 3 4"),
    ("arc", ARC | {"answerKey": "A"}, "one of 1, 2 under 'answerKey', found 'A'"),
    ("arc", ARC | {"choices": {"text": ["ice", "fire"], "label": ["1"]}}, "expected 2 to 10 texts"),
    ("minerva", {"problem": "P", "solution": "4"}, "expected a closed"),
    ("gpqa", GPQA | {"Incorrect Answer 3": None}, "expected text under 'Incorrect Answer 3'"),
    ("aime24", {"text": "P", "answer": "1"}, "expected text under 'problem' or 'Problem' or 'question'"),
])
def test_rows_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, name: str, row: dict[str, object], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        build(Path(write(tmp_path / "raw.jsonl", row)), name, [], {}, strict=True)


def test_answers_that_are_not_published_or_of_no_kind_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "raw.jsonl", OLYMPIC | {"answer": None}, OLYMPIC | {"answer_type": "CODE"})
    assert build(Path(path), "olympicarena", [], {}, strict=True).left_out == {
        "without a published answer": 1, "with answers of kind CODE": 1,
    }
