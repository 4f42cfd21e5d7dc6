import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dataset.prepare import main
from src.errors import UserError
from src.evaluation.grade import Grader

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared" / "data"
shared_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"published benchmark files are not at {SHARED}")

GSM8K = {"question": "Ann packs 3 bags of 400 nuts. How many nuts?",
         "answer": "She packs 3*400=<<3*400=1200>>1200 nuts.\n#### 1,200"}
MATH = {"problem": "Solve $2x=1$.", "solution": "Halve it: $x=\\boxed{\\frac{1}{2}}$.", "level": "Level 4",
        "type": "Algebra"}


def write(path: Path, *rows: dict[str, str] | str) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def prepared(task: str, raw_file: str, tmp_path: Path) -> list[dict[str, object]]:
    main(raw_file, str(tmp_path / "new" / "out.json"), task)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.json"]     # no temporary file stays
    return json.loads((tmp_path / "new" / "out.json").read_text())


def test_gsm8k_marks_go_and_the_last_line_stays(tmp_path: Path) -> None:
    rows = prepared("gsm8k", write(tmp_path / "raw.jsonl", GSM8K, ""), tmp_path)
    assert rows == [{"instruction": GSM8K["question"], "label": "1200",
                     "output": ["She packs 3*400=1200 nuts.\n#### 1,200"]}]


def test_gsm8k_parquet_reads_like_jsonl(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GSM8K]), tmp_path / "raw.parquet")
    from_parquet = prepared("gsm8k", str(tmp_path / "raw.parquet"), tmp_path)
    assert from_parquet == prepared("gsm8k", write(tmp_path / "raw.jsonl", GSM8K), tmp_path)


def test_math_row(tmp_path: Path) -> None:
    rows = prepared("math", write(tmp_path / "raw.jsonl", MATH), tmp_path)
    assert rows == [{"instruction": MATH["problem"], "output": [MATH["solution"]], "label": "\\frac{1}{2}",
                     "level": 4, "subject": "Algebra"}]


@pytest.mark.parametrize(("solution", "label"), [
    ("First $\\boxed{1}$, no: $\\boxed{\\{2, 3\\}}$", "\\{2, 3\\}"),
    ("So \\fbox{12}.", "12"),
    ("So $\\boxed 5$.", "5"),
])
def test_math_label_is_the_last_box(tmp_path: Path, solution: str, label: str) -> None:
    rows = prepared("math", write(tmp_path / "raw.jsonl", MATH | {"solution": solution}), tmp_path)
    assert rows[0]["label"] == label


def test_math_row_without_a_known_level(tmp_path: Path) -> None:
    rows = prepared("math", write(tmp_path / "raw.jsonl", MATH | {"level": "Level ?"}), tmp_path)
    assert "level" not in rows[0]


@pytest.mark.parametrize(("task", "row", "problem"), [
    ("gsm8k", "{not json", "not json"),
    ("gsm8k", "[1, 2]", "found list"),
    ("gsm8k", json.dumps({"question": "q"}), "'answer'"),
    ("gsm8k", json.dumps({"question": "q", "answer": "no mark"}), "#### number"),
    ("gsm8k", json.dumps({"question": "q", "answer": "#### many"}), "#### number"),
    ("math", json.dumps(MATH | {"solution": "cut at \\boxed{1"}), "closed"),
    ("math", json.dumps(MATH | {"level": "hard"}), "'hard'"),
])
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, task: str, row: str, problem: str) -> None:
    good = GSM8K if task == "gsm8k" else MATH
    raw_file = write(tmp_path / "raw.jsonl", good, row)
    old = tmp_path / "out.json"
    old.write_text("old")
    with pytest.raises(UserError, match=f"raw.jsonl line 2: .*{problem}"):
        main(raw_file, str(old), task)
    assert old.read_text() == "old"


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="raw.parquet: not a parquet file"):
        main(write(tmp_path / "raw.parquet", "x"), str(tmp_path / "out.json"), "gsm8k")


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "dataset/prepare.py", *arguments]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60, check=False)


def test_script_runs_from_the_repository_root(tmp_path: Path) -> None:
    raw_file, save_file = write(tmp_path / "raw.jsonl", GSM8K), str(tmp_path / "out.json")
    done = run_script("gsm8k", "--raw_file", raw_file, "--save_file", save_file)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())[0]["label"] == "1200"


@pytest.mark.parametrize("arguments", [(), ("gsm9k",), ("--raw_file", "x")])
def test_script_needs_a_known_benchmark(arguments: tuple[str, ...]) -> None:
    done = run_script(*arguments)
    assert done.returncode == 2
    assert "gsm8k or math" in done.stderr and "Traceback" not in done.stderr


def test_script_reports_a_missing_file_in_one_line(tmp_path: Path) -> None:
    done = run_script("math", "--raw_file", str(tmp_path / "absent.jsonl"), "--save_file", str(tmp_path / "out.json"))
    assert done.returncode == 1
    assert "absent.jsonl" in done.stderr and "Traceback" not in done.stderr


@shared_data
@pytest.mark.parametrize(("task", "raw_file", "count"), [
    ("gsm8k", "gsm8k/train.jsonl", 7473), ("gsm8k", "gsm8k/test.jsonl", 1319), ("math", "math/test_5000.jsonl", 5000),
])
def test_published_rows_grade_right_against_their_own_labels(
    tmp_path: Path, task: str, raw_file: str, count: int
) -> None:
    rows = prepared(task, str(SHARED / raw_file), tmp_path)
    with Grader(task) as grader:
        verdicts = grader.grade([row["output"][0] for row in rows], [row["label"] for row in rows])
    assert len(rows) == count
    assert [row["label"] for row, verdict in zip(rows, verdicts, strict=True) if verdict.outcome != "right"] == []
