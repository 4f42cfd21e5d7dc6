"""src/grading/tasks.py: names, rules and files of one's own."""

import json
from pathlib import Path

import pytest

from src.errors import UserError
from src.grading.grader import Grader
from src.grading.tasks import TASKS, find_task


@pytest.mark.parametrize("name", [
    "gsm8k", "GSM8K", "Math-500", "svamp", "ASDiv", "MAWPS", "AQuA", "choice", "olympiadbench",
])
def test_tasks_are_found_in_any_case_and_name_versioned_rules(name: str) -> None:
    task = find_task(name)
    assert task.name.lower() == name.lower()
    assert all(rule.rpartition("@")[2].isdigit() for rule in (task.extraction, task.equality))
    assert task.rules() == {"extraction": task.extraction, "equality": task.equality}


def test_only_none_is_not_graded() -> None:
    assert [name for name, task in TASKS.items() if not task.graded] == ["none"]


def test_w2s_05_no_stop_cuts_the_mark_of_an_answer() -> None:
    for task in TASKS.values():
        assert not any(stop in "#### 5" or stop in "The answer is: 5" for stop in task.stop), task.name


def test_a_misspelt_task_is_told_the_near_one() -> None:
    with pytest.raises(UserError, match="no task 'GSM9K'; known tasks: .*; did you mean GSM8K?"):
        find_task("GSM9K")


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "riddles.json"
    path.write_text(json.dumps({"prompt": "Riddle: {instruction}\nSay A or B.", "stop": ["Riddle:"],
                                "extraction": "choice/letter@5", "equality": "choice@5"}))
    task = find_task(str(path))
    assert (task.name, task.stop) == ("riddles", ("Riddle:",))
    with Grader(task) as grader:
        assert grader.grade_one("The answer is B.", "B").outcome == "right"


@pytest.mark.parametrize(("text", "message"), [
    ("{", "not valid json"),
    ("[]", "found a list; expected a json object"),
    ('{"extraction": null, "equality": null}', "holds nothing; expected extraction and equality"),
    ('{"extraction": "math/last-box@5"}', "holds extraction; expected extraction and equality"),
    ('{"extraction": "math/last-box@5", "equality": "exact@5", "stops": []}', "stops; expected"),
    ('{"extraction": "math/last-box", "equality": "exact@5"}', "no extraction rule 'math/last-box'; expected gsm8k"),
    ('{"extraction": "math/last-box@5", "equality": "fuzzy@1"}', "no equality rule 'fuzzy@1'"),
    ('{"extraction": "math/last-box@5", "equality": "exact@5", "stop": "Q:"}', "'stop' is 'Q:'"),
    ('{"extraction": "math/last-box@5", "equality": "exact@5", "prompt": 1}', "'prompt' is a int"),
    ('{"extraction": "math/last-box@5", "equality": "exact@5", "prompt": "Q:"}', "holds {instruction} 0 times"),
])
def test_a_bad_task_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message.replace("{", r"\{")):
        find_task(str(path))


def test_a_missing_task_file_is_named() -> None:
    with pytest.raises(UserError, match="absent.json does not exist"):
        find_task("absent.json")
