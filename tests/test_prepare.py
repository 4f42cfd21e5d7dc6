import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from dataset.prepare import main, read_levels
from src import jsonfile
from src.data.examples import read_prompts
from src.errors import UserError
from src.evaluation.report import type_of
from src.grading.grader import Grader
from src.grading.tasks import find_task

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared" / "data"
REPORTS = SHARED / "reports"
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


def test_w2s_01_gsm8k_marks_go_and_the_last_line_stays(tmp_path: Path) -> None:
    rows = prepared("gsm8k", write(tmp_path / "raw.jsonl", GSM8K, ""), tmp_path)
    assert rows == [{"instruction": GSM8K["question"], "label": "1200", "level": 1,  # steps
                     "output": ["She packs 3*400=1200 nuts.\n#### 1,200"]}]


def test_gsm8k_parquet_reads_like_jsonl(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GSM8K]), tmp_path / "raw.parquet")
    from_parquet = prepared("gsm8k", str(tmp_path / "raw.parquet"), tmp_path)
    assert from_parquet == prepared("gsm8k", write(tmp_path / "raw.jsonl", GSM8K), tmp_path)


def test_math_row(tmp_path: Path) -> None:
    rows = prepared("math", write(tmp_path / "raw.jsonl", MATH), tmp_path)
    assert rows == [{"instruction": MATH["problem"], "output": [MATH["solution"]], "label": "\\frac{1}{2}",
                     "level": 4, "subject": "Algebra"}]


def test_w2s_01_math_solutions_end_with_their_answer(tmp_path: Path) -> None:
    raw_file = write(tmp_path / "raw.jsonl", MATH, MATH | {"unique_id": "test/1.json"})
    main(raw_file, str(tmp_path / "out.json"), "math", say_answer=True)
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["output"] for row in rows] == [[MATH["solution"] + " The answer is: \\frac{1}{2}"]] * 2
    with Grader(find_task("MATH-weak-to-strong")) as grader:
        assert all(grader.grade_one(row["output"][0], row["label"]).outcome == "right" for row in rows)
    with pytest.raises(UserError, match="--say_answer is for math, .* found gsm8k"):
        main(write(tmp_path / "raw.jsonl", GSM8K), str(tmp_path / "out.json"), "gsm8k", say_answer=True)


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
    ("gsm8k", "{not json", "not valid json"),
    ("gsm8k", "[1, 2]", "found a list"),
    ("gsm8k", json.dumps({"question": "q"}), "'answer'"),
    ("gsm8k", json.dumps({"question": "q", "answer": "no mark"}), "#### number"),
    ("gsm8k", json.dumps({"question": "q", "answer": "#### many"}), "#### number"),
    ("math", json.dumps(MATH | {"solution": "cut at \\boxed{1"}), "closed"),
    ("math", json.dumps(MATH | {"level": "hard"}), "'hard'"),
])
def test_a_bad_row_is_named_by_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, row: str, problem: str
) -> None:
    """It is left out and counted, or with --strict the end."""
    good = GSM8K if task == "gsm8k" else MATH
    raw_file = write(tmp_path / "raw.jsonl", good, row)
    old = tmp_path / "out.json"
    old.write_text("old")
    with pytest.raises(UserError, match=f"raw.jsonl, line 2: .*{problem}"):
        main(raw_file, str(old), task, strict=True)
    assert old.read_text() == "old"
    main(raw_file, str(old), task)
    said = capsys.readouterr().out
    assert re.search(
        rf"^1 rows written to .*, 1 that cannot be read left out \(the first is .*line 2: .*{problem}", said
    )
    assert len(json.loads(old.read_text())) == 1


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="raw.parquet cannot be read as a table"):
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
    assert "expected one of gsm8k, math" in done.stderr and "Traceback" not in done.stderr


def test_script_reports_a_missing_file_in_one_line(tmp_path: Path) -> None:
    done = run_script("math", "--raw_file", str(tmp_path / "absent.jsonl"), "--save_file", str(tmp_path / "out.json"))
    assert done.returncode == 1
    assert "absent.jsonl" in done.stderr and "Traceback" not in done.stderr


def completion(text: str, rating: int | None) -> dict[str, object]:
    return {"text": text, "rating": rating, "flagged": False}


PRM800K = {
    "question": {"problem": "What is 2+2*3?", "ground_truth_answer": "8"},
    "is_quality_control_question": False, "is_initial_screening_question": False,
    "label": {"finish_reason": "solution", "steps": [
        {"completions": [completion("2*3=6.", 1), completion("2+2=4.", -1)], "human_completion": None,
         "chosen_completion": 0},
        {"completions": [completion("So 12.", -1), completion("Hm.", 0)],
         "human_completion": completion("2+6=8.", None), "chosen_completion": None},
        {"completions": [completion("# Answer\n\n8", 1)], "human_completion": None, "chosen_completion": 0},
    ]},
}


def test_prm800k_gives_the_path_and_every_alternative_step(tmp_path: Path) -> None:
    other = PRM800K | {"question": {"problem": "What is 2*3+2?"}}
    screening = PRM800K | {"is_initial_screening_question": True, "question": {"problem": "seen by all"}}
    raw_file = write(tmp_path / "raw.jsonl", *(json.dumps(row) for row in (PRM800K, PRM800K, other, screening)))
    rows = prepared("prm800k", raw_file, tmp_path)
    assert [(row["steps"], row["labels"]) for row in rows[:4]] == [
        (["2+2=4."], [0]),
        (["2*3=6.", "So 12."], [None, 0]),
        (["2*3=6.", "Hm."], [None, 1]),
        (["2*3=6.", "2+6=8.", "# Answer\n\n8"], [1, None, 1]),
    ]
    # a row that stands twice counts once, the same steps of another problem count again
    assert [row["instruction"] for row in rows] == 4 * ["What is 2+2*3?"] + 4 * ["What is 2*3+2?"]


def test_prm800k_solutions_are_good_to_the_end(tmp_path: Path) -> None:
    problem = {"problem": "What is 2+2*3?", "ground_truth_answer": "8"}
    steps = [*PRM800K["label"]["steps"]]
    steps[-1] = {"completions": [completion("So 8.\n# Answer\n\n8", 1), completion("# Answer\n\n9", -1),
                                 completion("# Answer\n\n8", 1)], "human_completion": None, "chosen_completion": 0}
    neutral = {"completions": [completion("Hm.", 0)], "human_completion": None, "chosen_completion": 0}
    raws = [{"question": problem, "label": {"steps": each}} for each in (steps, [neutral, *steps], steps[:-1])]
    rows = prepared("prm800k_solutions", write(tmp_path / "raw.jsonl", *map(json.dumps, raws)), tmp_path)
    assert rows == [{"instruction": "What is 2+2*3?", "label": "8", "output": [
        "2*3=6.\n\n2+6=8.\n\nSo 8.\n\n# Answer\n\n8", "2*3=6.\n\n2+6=8.\n\n# Answer\n\n8"]}]
    with Grader("MATH") as grader:
        assert [each.outcome for each in grader.grade(rows[0]["output"], ["8", "8"])] == ["right", "right"]


def test_metamath_becomes_steps_and_what_is_of_gsm8k_counts_as_easy(tmp_path: Path) -> None:
    math = "Mr. Po has $a = 2.5. b$ apples. Then\n\\[ a.\n b \\] follows: $b=3.$ So it is 3.\nThe answer is: 3"
    found = [("Hard", "MATH_AnsAug", math), ("g", "GSM_SV", "She has 1.5. It is 2.\n#### 2\nThe answer is: 2"),
             ("Easy", "MATH_FOBAR", "So.\nThe answer is: x"), ("g", "GSM_SV", "I do not know."),
             ("g", "GSM_SV", "The answer is a sum. It is 3. The answer is: 3")]
    raws = [{"query": f"q{n}", "original_question": name, "type": kind, "response": response}
            for n, (name, kind, response) in enumerate(found)]
    levels = [MATH | {"problem": name, "level": level} for name, level in (("Easy", "Level 2"), ("Hard", "Level 5"))]
    main(write(tmp_path / "math.jsonl", *levels), str(tmp_path / "levels.json"), "math")
    raw_file, out = write(tmp_path / "raw.jsonl", *map(json.dumps, raws)), str(tmp_path / "out.json")
    main(raw_file, out, "metamath_steps", strict=True)
    assert [row["output"] for row in json.loads(Path(out).read_text())] == [
        ["Mr. Po has $a = 2.5. b$ apples.\n\nThen\n\n\\[ a. b \\]\n\nfollows: $b=3.$\n\nSo it is 3.\n\n# Answer\n\n3"],
        ["She has 1.5.\n\nIt is 2.\n\n# Answer\n\n2"], ["So.\n\n# Answer\n\nx"],
        ["The answer is a sum.\n\nIt is 3.\n\n# Answer\n\n3"]]
    main(raw_file, out, "metamath_steps", levels=[1, 2, 3], level_file=str(tmp_path / "levels.json"))
    assert [row["instruction"] for row in json.loads(Path(out).read_text())] == ["q1", "q2", "q4"]


def test_answers_of_hard_problems_are_hidden(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    raw_file = write(tmp_path / "raw.jsonl", MATH, MATH | {"problem": "Easy", "level": "Level 1"})
    main(raw_file, str(out), "math", levels=[1, 2, 3], hide_answers=True)
    hard, easy = json.loads(out.read_text())
    assert hard == {"instruction": MATH["problem"], "level": 4, "subject": "Algebra"}
    assert easy["label"] == "\\frac{1}{2}" and easy["output"]
    assert "2 rows written" in (said := capsys.readouterr().out) and "1 answers of other levels left out" in said
    with pytest.raises(UserError, match="give --levels with it"):
        main(raw_file, str(out), "math", hide_answers=True)
    with pytest.raises(UserError, match="--level_file has no effect: there are no --levels"):
        main(raw_file, str(out), "math", level_file=str(out))
    with pytest.raises(UserError, match="rows of prm800k hold judged ones alone"):
        main(raw_file, str(out), "prm800k", levels=[1], hide_answers=True)


@pytest.mark.parametrize("answer", ["answer", "solution"])
def test_abel_adds_problems_to_gsm8k(tmp_path: Path, answer: str) -> None:
    rows = [{"question": GSM8K["question"], answer: GSM8K["answer"]} | named
            for named in ({"id": "gsm8k_2"}, {"id": "aug_7"}, {"id": "aug_9"}, {})]
    found = prepared("abel", write(tmp_path / "raw.jsonl", *map(json.dumps, rows)), tmp_path)
    assert [row.get("split") for row in found] == ["original", "augmented", None]  # the same problem twice is one row
    assert all(row["label"] == "1200" and "<<" not in row["output"][0] for row in found)


@shared_data
def test_the_published_augmented_gsm8k(tmp_path: Path) -> None:
    rows = prepared("abel", str(SHARED / "weak_to_strong/gsm8k_train_2.jsonl"), tmp_path)
    assert 6800 < len(rows) <= 7000 and rows[0]["label"] == "72"


def test_math_shepherd_labels_the_step_that_each_mark_ends(tmp_path: Path) -> None:
    text = "How many? Step 1: 2*3=6. ки\nStep 2: 6 + 2 = 9. The answer is: 9 ки"
    judged = "How many? Step 1: 2*3=6. +\nStep 2: 6 + 2 = 9. The answer is: 9 -"
    rows = prepared("math_shepherd", write(tmp_path / "raw.jsonl", {"input": text, "label": judged}), tmp_path)
    assert rows == [{"instruction": "How many?", "labels": [1, 0],
                     "steps": ["Step 1: 2*3=6.", "Step 2: 6 + 2 = 9. The answer is: 9"]}]


def test_processbench_judges_up_to_the_first_wrong_step(tmp_path: Path) -> None:
    raws = [{"id": str(label), "problem": "q", "steps": ["a", "b", "c"], "label": label} for label in (1, -1)]
    (tmp_path / "raw.json").write_text(json.dumps(raws))
    rows = prepared("processbench", str(tmp_path / "raw.json"), tmp_path)
    assert [row["labels"] for row in rows] == [[1, 0, None], [1, 1, 1]]


def test_hh_rlhf_parts_the_last_answers_of_one_dialogue(tmp_path: Path) -> None:
    prompt = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 2+2?\n\nAssistant:"
    pairs = [{"chosen": f"{prompt} 4", "rejected": f"{prompt} {wrong}"} for wrong in ("5", "4")]
    rows = prepared("hh_rlhf", write(tmp_path / "raw.jsonl", *map(json.dumps, pairs)), tmp_path)
    assert rows == [{"instruction": prompt, "chosen": "4", "rejected": "5"}]


def test_levels_come_from_the_original_problem_of_another_file(tmp_path: Path) -> None:
    levels = (("Easy  one", "Level 2"), ("Hard", "Level 5"))
    easy, hard = (MATH | {"problem": name, "level": level} for name, level in levels)
    main(write(tmp_path / "math.jsonl", easy, hard), str(tmp_path / "levels.json"), "math")
    rephrased = [{"query": f"{name}, again", "original_question": name, "response": "So.\nThe answer is: $7$"}
                 for name in ("Easy one", "Hard", "Nowhere")]
    raw_file, out = write(tmp_path / "raw.jsonl", *map(json.dumps, rephrased)), str(tmp_path / "out.json")
    main(raw_file, out, "metamath", levels=[1, 2, 3], level_file=str(tmp_path / "levels.json"))
    assert json.loads(Path(out).read_text()) == [
        {"instruction": "Easy one, again", "output": ["So.\nThe answer is: $7$"], "label": "$7$"}]
    with pytest.raises(UserError, match="metamath with levels \\[1\\]: 3 of unknown level left out; give --level_file"):
        main(raw_file, out, "metamath", levels=[1])
    with pytest.raises(UserError, match="2 of other levels left out, 1 of unknown level .*; --level_file .*json has"):
        main(raw_file, out, "metamath", levels=[1], level_file=str(tmp_path / "levels.json"))
    assert read_levels("") == {}


@pytest.mark.parametrize(("task", "row", "problem"), [
    ("prm800k", {"question": {"problem": "q"}, "label": {}}, "expected 'question' and 'label' with 'steps'"),
    ("prm800k", {"question": {"problem": "q"}, "label": {"steps": [
        {"completions": [completion("a", 2)], "chosen_completion": 0}]}}, "step 0: rating 2; expected -1, 0, 1"),
    ("math_shepherd", {"input": "q Step 1: a ки", "label": "q Step 1: b +"}, "does not repeat 'input' .* mark 1"),
    ("math_shepherd", {"input": "q a ки", "label": "q a +"}, "to hold 'Step 1:'"),
    ("processbench", {"problem": "q", "steps": ["a"], "label": 1}, "'label' is 1; expected -1 or"),
    ("processbench", {"problem": "q", "steps": [""], "label": 0}, "a list of texts under 'steps'"),
    ("hh_rlhf", {"chosen": "Human: a", "rejected": "b"}, "'chosen' has no turn 'Assistant:'"),
    ("metamath", {"query": "q", "response": "r"}, "'original_question'"),
])
def test_a_bad_row_of_verifier_data_is_named(
    tmp_path: Path, task: str, row: dict[str, object], problem: str
) -> None:
    with pytest.raises(UserError, match=f"raw.jsonl, line 1.*{problem}"):
        main(write(tmp_path / "raw.jsonl", json.dumps(row)), str(tmp_path / "out.json"), task)


@shared_data
def test_processbench_file_gives_a_row_for_each_solution(tmp_path: Path) -> None:
    raw = json.loads((SHARED / "steps" / "processbench_gsm8k.json").read_text())
    rows = prepared("processbench", str(SHARED / "steps" / "processbench_gsm8k.json"), tmp_path)
    firsts = [row["labels"].index(0) if 0 in row["labels"] else -1 for row in rows]
    assert firsts == [row["label"] for row in raw] and len(rows) == 400


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


ASDIV = """<?xml version="1.0"?><Machine-Reading-Corpus-File><ProblemSet>
<Problem ID="nluds-1" Grade="1"><Body>Seven red apples and two green apples are in the basket.</Body>
<Question>How many apples are there?</Question><Solution-Type>Addition</Solution-Type>
<Answer>9 (apples)</Answer><Formula>7+2=9</Formula></Problem>
<Problem ID="nluds-2"><Body>A and B sum to 5 and differ by 1</Body><Question>What are they?</Question>
<Answer>3; 2</Answer></Problem></ProblemSet></Machine-Reading-Corpus-File>"""
AQUA = {"question": "What is 3*7?", "options": ["A)20", "B)21", "C)22"], "rationale": "3*7=21", "correct": "B"}
OLYMPIAD = {"id": 7, "question": "Find x.", "solution": ["Halve."], "final_answer": ["$\\frac{1}{2}$"],
            "subfield": "Algebra", "is_multiple_answer": False, "unit": None, "answer_type": "Numerical", "error": None}


@pytest.mark.parametrize(("task", "row", "expected"), [
    ("svamp", {"ID": "chal-1", "Body": "Ann has 3 hats", "Question": "How many hats?", "Answer": 3.0, "Type": "Sum"},
     {"instruction": "Ann has 3 hats. How many hats?", "label": "3", "id": "chal-1", "subject": "Sum"}),
    ("asdiv", {"body": "Two cats.", "question": "How many legs?", "answer": "8 (legs)", "solution_type": "Product"},
     {"instruction": "Two cats. How many legs?", "label": "8", "subject": "Product"}),
    ("mawps", {"iIndex": 4, "sQuestion": "How much is 1/2 of 5? ", "lEquations": ["X=2.5"], "lSolutions": [2.5]},
     {"instruction": "How much is 1/2 of 5?", "label": "2.5", "id": "4"}),
    ("mawps", {"sQuestion": "Which two?", "lSolutions": [3.0, 2.0]}, {"instruction": "Which two?", "label": "3, 2"}),
    ("aqua", AQUA, {"instruction": "What is 3*7?\nOptions: (A) 20 (B) 21 (C) 22", "label": "B",
                    "question": "What is 3*7?", "choices": ["20", "21", "22"],
                    "output": ["3*7=21\nThe answer is (B)."]}),
    ("olympiadbench", OLYMPIAD, {"instruction": "Find x.", "label": "\\frac{1}{2}", "output": ["Halve."], "id": "7",
                                 "answer_type": "number", "subject": "Algebra"}),
    ("olympiadbench", OLYMPIAD | {"final_answer": ["$1$", "$-1$"], "is_multiple_answer": True},
     {"instruction": "Find x.", "label": "1, -1", "output": ["Halve."], "id": "7", "answer_type": "set",
      "subject": "Algebra"}),
    ("olympiadbench", OLYMPIAD | {"final_answer": ["3.1"], "error": "1e-1"},
     {"instruction": "Find x.", "label": "3.1", "output": ["Halve."], "id": "7", "answer_type": "number",
      "tolerance": 0.1, "subject": "Algebra"}),
    ("math", {"problem": "p", "solution": "$\\boxed{1}$", "answer": "1", "subject": "Algebra", "level": 2,
              "unique_id": "test/algebra/1.json"},
     {"instruction": "p", "output": ["$\\boxed{1}$"], "label": "1", "level": 2, "subject": "Algebra",
      "id": "test/algebra/1.json"}),
])
def test_benchmarks_in_their_published_schemas(
    tmp_path: Path, task: str, row: dict[str, object], expected: dict[str, object]
) -> None:
    assert prepared(task, write(tmp_path / "raw.jsonl", row), tmp_path) == [expected]


def test_asdiv_is_read_from_xml(tmp_path: Path) -> None:
    (tmp_path / "ASDiv.xml").write_text(ASDIV)
    assert prepared("asdiv", str(tmp_path / "ASDiv.xml"), tmp_path) == [
        {"instruction": "Seven red apples and two green apples are in the basket. How many apples are there?",
         "label": "9", "id": "nluds-1", "subject": "Addition"},
        {"instruction": "A and B sum to 5 and differ by 1. What are they?", "label": "3, 2", "id": "nluds-2"},
    ]


@pytest.mark.parametrize(("task", "row", "problem"), [
    ("svamp", {"Body": "a", "Question": "b", "Answer": "many"}, "a number under 'Answer', found 'many'"),
    ("asdiv", {"body": "a", "question": "b", "answer": "(apples)"}, "'9 \\(apples\\)', found '\\(apples\\)'"),
    ("mawps", {"sQuestion": "a", "lSolutions": []}, "a list of numbers under 'lSolutions'"),
    ("aqua", AQUA | {"correct": "E"}, "with 'E' among them"),
    ("aqua", AQUA | {"options": "A)20"}, "a list of texts under 'options'"),
    ("olympiadbench", OLYMPIAD | {"final_answer": "1"}, "a list of texts under 'final_answer', found 1"),
    ("olympiadbench", OLYMPIAD | {"error": "small"}, "a number under 'error', found 'small'"),
])
def test_a_bad_row_of_a_benchmark_is_named(tmp_path: Path, task: str, row: dict[str, object], problem: str) -> None:
    with pytest.raises(UserError, match=f"raw.jsonl, line 1: .*{problem}"):
        main(write(tmp_path / "raw.jsonl", row), str(tmp_path / "out.json"), task)


def test_what_is_prepared_is_graded_by_its_task(tmp_path: Path) -> None:
    for task, row, response in (
        ("aqua", AQUA, "3*7=21\nThe answer is (B)."),
        ("olympiadbench", OLYMPIAD | {"final_answer": ["3.1"], "error": "1e-1"}, "So \\boxed{3.14}"),
    ):
        rows = prepared(task, write(tmp_path / "raw.jsonl", row), tmp_path)
        prompt = read_prompts(str(tmp_path / "new/out.json"), need_label=True)[0]
        with Grader(task) as grader:
            assert grader.grade_one(response, rows[0]["label"], type_of(prompt)).outcome == "right"


def said(capsys: pytest.CaptureFixture[str], tmp_path: Path, task: str, *rows: dict[str, object] | str) -> str:
    """What prepare.py says of a file with these rows, behind the name of the file it writes."""
    capsys.readouterr()
    main(write(tmp_path / "raw.jsonl", *map(json.dumps, rows)), str(tmp_path / "out.json"), task)
    return capsys.readouterr().out.replace(str(tmp_path / "out.json"), "F").strip()


def dialogue(*answers: str) -> str:
    return "".join(f"\n\nHuman: q\n\nAssistant: {answer}" for answer in answers)


def test_every_row_is_written_or_counted_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [("yes", "no"), ("same", "same"), ("same", "same "), ("", "no"), ("yes", " "), ("yes", "no")]
    rows: list[dict[str, object]] = [{"chosen": dialogue(a), "rejected": dialogue(b)} for a, b in pairs]
    rows += [{"chosen": dialogue("a", "b"), "rejected": dialogue("a")}]
    rows += [{"chosen": "x", "rejected": "y"}, {"chosen": None}]
    assert said(capsys, tmp_path, "hh_rlhf", *rows).startswith(
        "1 rows written to F, 2 with equal answers left out, 2 with an empty answer left out, 1 repeated left out, "
        "1 whose dialogues part before the last answer left out, 2 that cannot be read left out (the first is "
    )
    unrated = {"steps": [{"completions": [completion("a", None)], "chosen_completion": 0}]}
    rows = [PRM800K, PRM800K | {"is_quality_control_question": True}, PRM800K | {"label": unrated}]
    assert said(capsys, tmp_path, "prm800k", *rows) == (
        "4 rows written to F, 1 of quality control or screening left out, 1 without a rating left out"
    )
    others = {"final_answer": None}, {"modality": "Multimodal"}, {"image_1": "x"}
    rows = [OLYMPIAD, *(OLYMPIAD | other for other in others)]
    assert said(capsys, tmp_path, "olympiadbench", *rows) == (
        "1 rows written to F, 1 without a final answer, which are proofs, left out, 2 with a picture left out"
    )


def test_a_last_step_without_a_mark_is_kept_unjudged(tmp_path: Path) -> None:
    rows = [
        {"input": "q? Step 1: a ки\nStep 2: b", "label": "q? Step 1: a +\nStep 2: b"},
        {"input": "q? Step 1: a ки\nStep 2: b ки \n", "label": "q? Step 1: a -\nStep 2: b + \n"},
    ]
    found = prepared("math_shepherd", write(tmp_path / "raw.jsonl", *rows), tmp_path)
    assert [(row["steps"], row["labels"]) for row in found] == [
        (["Step 1: a", "Step 2: b"], [1, None]), (["Step 1: a", "Step 2: b"], [0, 1])]


@pytest.mark.parametrize(("task", "row", "problem"), [
    ("math_shepherd", {"input": "q Step 1: a ки b", "label": "q Step 1: a + c"}, "not repeat 'input' behind mark 1"),
    ("math_shepherd", {"input": "q Step 1: a ки ки", "label": "q Step 1: a + -"}, "a step in 'input' is empty"),
    ("prm800k", {"question": {"problem": "q"}, "label": {"steps": ["a"]}}, "step 0: expected an object with a list"),
    ("prm800k", {"question": {"problem": "q"}, "label": {"steps": [{"completions": [7]}]}}, "step 0: expected an obj"),
    ("prm800k", {"question": {"problem": "q"}, "label": {"steps": [
        {"completions": [completion("a", 1)], "chosen_completion": 3}]}}, "'chosen_completion' is 3; expected"),
    ("prm800k", {"question": {"problem": "q"}, "label": {"steps": [{"human_completion": "a"}]}}, "is a str; expected"),
    ("processbench", {"problem": "q", "steps": ["a"], "label": True}, "'label' is True"),
    ("processbench", {"problem": "q", "steps": ["a", " "], "label": 0}, "a list of texts under 'steps'"),
    ("olympiadbench", OLYMPIAD | {"final_answer": ["$$"]}, "a list of texts under 'final_answer'"),
    ("olympiadbench", OLYMPIAD | {"solution": [None]}, "a list of texts under 'solution'"),
    ("olympiadbench", OLYMPIAD | {"error": "inf"}, "a number under 'error', found 'inf'"),
    ("olympiadbench", OLYMPIAD | {"subfield": ["a"]}, "'subfield' is a list; expected a string"),
    ("aqua", AQUA | {"rationale": ["a"]}, "expected text under 'rationale'"),
    ("svamp", {"Body": "a", "Question": "b", "Answer": True}, "a number under 'Answer', found True"),
    ("gsm8k", {"question": "q", "answer": "9" * 5000}, "to end in a line '#### number'"),
])
def test_more_bad_rows(tmp_path: Path, task: str, row: dict[str, object], problem: str) -> None:
    with pytest.raises(UserError, match=f"no rows of {task}: 1 that cannot be read .*raw.jsonl, line 1.*{problem}"):
        main(write(tmp_path / "raw.jsonl", row), str(tmp_path / "out.json"), task)


def test_nullable_columns_of_parquet_and_directories(tmp_path: Path) -> None:
    """A label that was turned into a float, and fields that are null or NaN, read as what they were."""
    math = [MATH | {"level": 5.0, "unique_id": 7.0}, MATH | {"level": None, "unique_id": float("nan"), "type": None}]
    dataset = datasets.Dataset.from_list(math)
    dataset.to_parquet(tmp_path / "raw.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    for name in ("raw.parquet", "saved"):
        rows = prepared("math", str(tmp_path / name), tmp_path)
        assert [(row.get("level"), row.get("id"), row.get("subject")) for row in rows] == [
            (5, "7", "Algebra"), (None, None, None)]
    bench = [{"id": None, "problem": "q", "steps": ["a", "b"], "label": label} for label in (1.0, -1.0)]
    datasets.Dataset.from_list(bench).to_parquet(tmp_path / "raw.parquet")
    rows = prepared("processbench", str(tmp_path / "raw.parquet"), tmp_path)
    assert [row["labels"] for row in rows] == [[1, 0], [1, 1]] and all("id" not in row for row in rows)


def test_a_number_of_a_benchmark_is_written_as_the_grader_reads_it(tmp_path: Path) -> None:
    row = {"Body": "a", "Question": "b", "Answer": 1e22}
    assert prepared("svamp", write(tmp_path / "raw.jsonl", row), tmp_path)[0]["label"] == "1" + "0" * 22


@pytest.mark.parametrize("name", ["raw.jsonl", "raw.json"])
def test_one_bad_row_in_the_middle_loses_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(jsonfile, "MAX_ROW", 4000)
    rows = [json.dumps(GSM8K) for _ in range(100)]
    wrong = ["[1]", r'{"question": "\ud800"}', "[" * 200 + "]" * 200]
    if name == "raw.jsonl":
        wrong += ["{torn", json.dumps({"question": "x" * 9000}), "9" * 5000, '{"a": 1, "a": 2}']
    text = [*rows[:50], *wrong, *rows[50:]]
    (tmp_path / name).write_text("\n".join(text) if name == "raw.jsonl" else f"[{','.join(text)}]")
    main(str(tmp_path / name), str(tmp_path / "out.json"), "gsm8k")
    assert f"100 rows written to {tmp_path}/out.json, {len(wrong)} that cannot be read" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out.json").read_text())) == 100


@pytest.mark.skipif(not REPORTS.is_dir(), reason="the folder of reports is not there")
def test_reports_of_uncounted_rows(tmp_path: Path) -> None:
    save_file = str(tmp_path / "out.json")
    done = run_script("hh_rlhf", "--raw_file", str(REPORTS / "PR1_uncounted_rows/hh1.jsonl"), "--save_file", save_file)
    assert done.stdout == (
        f"1 rows written to {save_file}, 1 with equal answers left out, 1 whose dialogues part before the last answer "
        f"left out, 1 with an empty answer left out\n"
    )
    main(str(REPORTS / "PR1_uncounted_rows/sh2.jsonl"), save_file, "math_shepherd")
    (row,) = json.loads(Path(save_file).read_text())
    assert row == {"instruction": "q?", "steps": ["Step 1: a", "Step 2: b"], "labels": [1, None]}
