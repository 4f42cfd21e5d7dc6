"""benchmarks/grade.py: a file of answers in, verdicts out; and the published labels of model solutions."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import grade
from src.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
KNOWN_DISAGREEMENTS: list[str] = []  # rows of the published solutions on which we differ, with the reason; none so far
CASES = [
    {"id": "a", "task": "gsm8k", "prediction": "6 eggs.\n#### 6", "gold": "6", "form": "response", "correct": True},
    {"id": 2, "task": "math", "prediction": "\\frac12", "gold": "0.5", "form": "answer", "correct": True},
    {"id": "c", "task": "math", "prediction": "so x", "gold": "0.5", "form": "response", "correct": False},
    {"id": "d", "task": "math", "prediction": "(x+1)^2", "gold": "x^2+2x+1", "form": "answer", "correct": True},
]


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_file_is_graded_by_the_command(tmp_path: Path) -> None:
    cases, out = write(tmp_path / "cases.jsonl", CASES), tmp_path / "out.jsonl"
    done = subprocess.run([sys.executable, "benchmarks/grade.py", "--cases", cases, "--out", str(out)], cwd=ROOT,
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["id"], row["result"], row["outcome"]) for row in rows] == [
        ("a", True, "right"), ("2", True, "right"), ("c", False, "unparsed"), ("d", True, "right")]
    assert all(0 <= row["seconds"] < 60 for row in rows)


def test_the_table_stands_beside_math_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grade.main(cases=write(tmp_path / "cases.jsonl", CASES))
    shown = capsys.readouterr().out
    assert "4 labelled cases" in shown and "math-verify" in shown
    assert "all (4)                 100.00% fp   0 fn   0" in shown


@pytest.mark.parametrize(("row", "message"), [
    ({"id": 1, "task": "math"}, "line 1: key 'prediction' is missing"),
    (CASES[0] | {"form": "both"}, "line 1: 'form' is 'both'; expected answer or response"),
    (CASES[0] | {"task": "gsm9k"}, "no task 'gsm9k'"),
])
def test_a_bad_case_is_named(tmp_path: Path, row: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        grade.main(cases=write(tmp_path / "cases.jsonl", [row]), out=str(tmp_path / "out.jsonl"))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"published solutions are not at {SHARED}")
def test_published_verdicts_on_model_solutions_are_reproduced() -> None:
    head, *disagreements = grade.model_solutions_table(
        SHARED / "gsm8k/example_model_solutions.jsonl", SHARED / "gsm8k/test.jsonl").splitlines()
    assert "is_correct of 5276 of 5276 reproduced" in head
    assert disagreements == KNOWN_DISAGREEMENTS
