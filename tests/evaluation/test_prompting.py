"""src/evaluation/prompting.py: templates, demonstrations, parts of a file."""

import json
from pathlib import Path

import pytest

from src.data.examples import read_prompts
from src.errors import UserError
from src.evaluation.prompting import BUNDLED, make_prompting, select_prompts
from src.grading.grader import Grader
from src.grading.tasks import find_task

GSM8K = find_task("GSM8K")


def test_a_task_speaks_its_own_words() -> None:
    assert make_prompting(GSM8K).text("2+2=") == "2+2="
    assert make_prompting(find_task("GSM8K-weak-to-strong")).text("2+2?") == "Question: 2+2?\nAnswer:"


def test_a_template_from_the_command_line_and_from_a_file(tmp_path: Path) -> None:
    assert make_prompting(GSM8K, "", "Q: {instruction}\\nA:").text("a {b}") == "Q: a {b}\nA:"
    path = tmp_path / "template.txt"
    path.write_text("Solve:\n{instruction}\n")
    assert make_prompting(GSM8K, "", str(path)).text("x") == "Solve:\nx\n"


def test_demonstrations_stand_before_the_problem(tmp_path: Path) -> None:
    path = tmp_path / "shots.json"
    path.write_text(json.dumps({
        "prompt": "Q: {instruction}\nA:", "stop": ["Q:"],
        "demonstrations": [{"instruction": "1+1", "output": "2"}, {"instruction": "{instruction}", "output": "3"}],
    }))
    prompting = make_prompting(GSM8K, str(path))
    assert prompting.text("5+5") == "Q: 1+1\nA: 2\n\nQ: {instruction}\nA: 3\n\nQ: 5+5\nA:"
    assert prompting.stop == ("Q:",)
    assert make_prompting(GSM8K, str(path), "{instruction}\n").text("5+5").endswith("{instruction}\n3\n\n5+5\n")


@pytest.mark.parametrize(("name", "task", "count"), [("gsm8k8", "GSM8K", 8), ("minerva4", "MATH", 4)])
def test_bundled_demonstrations_hold_an_answer_and_stop_behind_it(name: str, task: str, count: int) -> None:
    prompting = make_prompting(find_task(task), name)
    rows = json.loads((BUNDLED / f"{name}.json").read_text())["demonstrations"]
    assert len(rows) == count
    with Grader(task) as grader:
        for row in rows:
            label = row["output"].split("answer is ")[-1].split(". I hope")[0].strip("$.")
            assert grader.grade_one(row["output"], label).outcome == "right", row
    assert all(stop in prompting.text("") for stop in prompting.stop)
    assert not any(stop in row["output"] for stop in prompting.stop for row in rows)


def test_what_samples_depend_on_changes_with_the_words() -> None:
    plain, shots = make_prompting(GSM8K).facts(), make_prompting(GSM8K, "gsm8k8").facts()
    assert plain == make_prompting(GSM8K, "", "{instruction}").facts()
    assert plain["prompting"] != shots["prompting"] and shots["stop"] == ["Question:"]


@pytest.mark.parametrize(("text", "message"), [
    ("{", "not valid json"),
    ("[]", "found a list; expected a json object"),
    ('{"demonstrations": []}', "expected {\"prompt\""),
    ('{"demonstrations": [{"instruction": "a"}]}', "demonstration 1: key 'output' is missing; found instruction"),
    ('{"demonstrations": [{"instruction": "a", "output": null}]}', "demonstration 1: key 'output' is missing"),
    ('{"demonstrations": [{"instruction": "a", "output": "b", "system": "c"}]}', "demonstration 1: 'system' is 'c'"),
    ('{"demonstrations": ["a"]}', "expected {\"prompt\""),
    ('{"stop": "Q:", "demonstrations": [{"instruction": "a", "output": "b"}]}', "expected {\"prompt\""),
    ('{"prompt": 1, "demonstrations": [{"instruction": "a", "output": "b"}]}', "expected {\"prompt\""),
    ('{"prompt": "Q:", "demonstrations": [{"instruction": "a", "output": "b"}]}', "holds {instruction} 0 times"),
])
def test_bad_demonstrations_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "shots.json"
    path.write_text(text)
    with pytest.raises(UserError) as problem:
        make_prompting(GSM8K, str(path))
    assert message in str(problem.value) and "shots.json" in str(problem.value)


def test_what_is_null_is_absent_and_input_belongs_to_the_problem(tmp_path: Path) -> None:
    path, shot = tmp_path / "shots.json", {"instruction": "Add.", "input": "1+1", "output": "2"}
    path.write_text(json.dumps({"prompt": None, "stop": None, "demonstrations": [shot, shot | {"input": None}]}))
    prompting = make_prompting(GSM8K, str(path))
    assert "Add.\n1+1" in prompting.text("x") and prompting.stop == GSM8K.stop


def test_unknown_demonstrations_and_a_template_without_a_place() -> None:
    with pytest.raises(UserError, match="gsm9k is neither a file nor one of gsm8k8, minerva4"):
        make_prompting(GSM8K, "gsm9k")
    with pytest.raises(UserError, match="--prompt_template holds {instruction} 0 times"):
        make_prompting(GSM8K, "", "Solve it.")
    with pytest.raises(UserError, match="--prompt_template holds {instruction} 0 times"):
        make_prompting(GSM8K, "", "Solve it. " * 100)  # too long a name for a file


def test_a_template_in_a_file_is_text(tmp_path: Path) -> None:
    path = tmp_path / "template.txt"
    path.write_bytes(b"\xef\xbb\xbfSolve {instruction}")  # some editors put a byte order mark first
    assert make_prompting(GSM8K, "", str(path)).text("x") == "Solve x"
    path.write_bytes(b"Solve {instruction}\xff")
    with pytest.raises(UserError, match=r"template.txt: not UTF-8 \(byte 19\)"):
        make_prompting(GSM8K, "", str(path))


ROWS = [
    {"instruction": "a", "level": 1, "subject": "Algebra", "split": "dev"},
    {"instruction": "b", "level": 3, "subject": "Number Theory"},
    {"instruction": "c", "level": 5, "subject": "Algebra"},
    {"instruction": "d"},
]


@pytest.mark.parametrize(("split", "chosen"), [
    ("", "abcd"), ("dev", "a"), ("split=DEV", "a"), ("level=1-3", "ab"), ("level=3|5", "bc"), ("level=1-2 | 5", "ac"),
    ("subject=algebra", "ac"), ("subject=Algebra,level=4-5", "c"), ("subject=number theory|algebra", "abc"),
])
def test_parts_of_a_file(tmp_path: Path, split: str, chosen: str) -> None:
    path = tmp_path / "problems.json"
    path.write_text(json.dumps(ROWS))
    prompts = read_prompts(str(path), need_label=False)
    assert "".join(prompt.instruction for prompt in select_prompts(prompts, split)) == chosen


@pytest.mark.parametrize(("split", "message"), [
    ("level=9", "no problem has level 9; found 1, 3, 5, None"),
    ("subject=Algebra|Geomtry", "no problem has subject Geomtry; found Algebra, None, Number Theory"),
    ("subject=Algebra,level=3", "no problem meets all these conditions"),
    ("test", "no problem has split test; found None, dev"),
    ("size=4", "'size=4' is no condition"),
    ("level=", "'level=' is no condition"),
])
def test_a_part_that_is_not_there(tmp_path: Path, split: str, message: str) -> None:
    path = tmp_path / "problems.json"
    path.write_text(json.dumps(ROWS))
    with pytest.raises(UserError, match=message):
        select_prompts(read_prompts(str(path), need_label=False), split)
