"""src/construct/self_made.py: second attempts and new problems, by hand."""

import json
from pathlib import Path

import pytest

from src.errors import UserError
from tests.tiny import build


def write(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def sample(name: str, number: int, response: str, outcome: str, **values: object) -> dict[str, object]:
    return {"id": name, "sample": number, "prompt": f"P{name}", "response": response, "outcome": outcome, "label": "4",
            "finish": "stop"} | values


def read(path: Path) -> list[dict[str, object]]:
    return json.loads(path.read_text())


def test_attempts_get_a_verdict_and_a_right_solution(tmp_path: Path) -> None:
    samples = [sample("a", 0, "#### 5", "wrong", score=0.7), sample("a", 1, "2+2\n#### 4\n", "right", score=0.2),
               sample("a", 2, "2+2\n#### 4", "right", score=0.2), sample("b", 0, "", "unparsed", score=0.1)]
    file = write(tmp_path / "samples.jsonl", *samples)
    build.revise(samples_file=file, save_file=str(tmp_path / "train.json"))
    rows = {row["id"]: row for row in read(tmp_path / "train.json")}
    assert rows["a/0"] == {"id": "a/0", "instruction": "Pa\n\n#### 5\n\nVerdict: wrong.\n\n", "label": "4",
                           "output": ["2+2\n#### 4"]}
    assert rows["a/1"]["instruction"] == "Pa\n\n2+2\n#### 4\n\nVerdict: right.\n\n" and len(rows) == 2
    # at a test the verifier says it, and a problem without an attempt stays
    build.revise(samples_file=file, save_file=str(tmp_path / "test.json"), threshold=0.5, keep_unsolved=True)
    rows = {row["id"]: row for row in read(tmp_path / "test.json")}
    assert rows.keys() == {"a/0", "a/1", "b"} and "output" not in rows["b"]
    assert [rows[name]["instruction"][-8:-3] for name in ("a/0", "a/1", "b")] == ["right", "wrong", "wrong"]
    # the grader failed at the first, and the second never ended: neither has a verdict, nor is the second an example
    file = write(tmp_path / "odd.jsonl", sample("a", 0, "#### 4", "timeout", score=0.7),
                 sample("a", 1, "2+2 #### 4 and", "right", score=0.2, finish="length"), sample("a", 2, "4", "wrong"))
    build.revise(samples_file=file, save_file=str(tmp_path / "odd.json"), keep_unsolved=True)
    assert [(row["id"], "output" in row) for row in read(tmp_path / "odd.json")] == [("a", False)]
    with pytest.raises(UserError, match="sample 'c'/0 has no score"):
        build.revise(samples_file=write(tmp_path / "raw.jsonl", sample("c", 0, "x", "wrong")),
                     save_file=str(tmp_path / "no.json"), threshold=0.5)


def test_the_type_of_an_answer_stays_with_its_label(tmp_path: Path) -> None:
    typed = {"answer_type": "number", "tolerance": 0.5}
    file = write(tmp_path / "samples.jsonl", sample("a", 0, "#### 4.2", "right", **typed))
    build.revise(samples_file=file, save_file=str(tmp_path / "train.json"))
    build.agree(samples_file=file, task="toy", save_file=str(tmp_path / "agreed.json"))
    for name in ("train.json", "agreed.json"):
        assert [{key: row[key] for key in typed} for row in read(tmp_path / name)] == [typed]


def test_samples_without_their_problem_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "samples.jsonl", sample("a", 0, "#### 4", "right", prompt=None))
    for command, more in ((build.revise, {}), (build.agree, {"task": "toy"})):
        with pytest.raises(UserError, match="sample 'a'/0 has no key 'prompt'"):
            command(samples_file=file, save_file=str(tmp_path / "no.json"), **more)


def test_new_problems_are_distinct_and_known_to_nobody(tmp_path: Path) -> None:
    old = write(tmp_path / "old.json", *({"instruction": f"Old {n}?"} for n in range(4)))
    build.invent(train_file=old, save_file=str(tmp_path / "invent.json"), rows_a_problem=2)
    rows = read(tmp_path / "invent.json")
    assert len(rows) == 8 and {row["output"][0] for row in rows} == {f" Old {n}?" for n in range(4)}
    assert all(row["output"][0].strip() not in row["instruction"] for row in rows)
    assert rows[0]["instruction"].startswith("Problem: Old ") and rows[0]["instruction"].endswith("?\n\nProblem:")
    said = [sample("0", n, text, "") | {"finish": finish} for n, (text, finish) in enumerate(
        [(" New 1?", "stop"), (" new  1?", "stop"), (" Old 2?", "stop"), (" New 2", "length"), (" New 3?", "stop")])]
    build.problems(samples_file=write(tmp_path / "said.jsonl", *said), save_file=str(tmp_path / "new.json"),
                   known_files=[old])
    assert [row["instruction"] for row in read(tmp_path / "new.json")] == ["new  1?", "New 3?"]
    with pytest.raises(UserError, match="holds 4 problems; --shots 4 needs more"):
        build.invent(train_file=old, save_file=str(tmp_path / "no.json"), shots=4)


def test_agreed_answers_become_labels_and_no_label_is_read(tmp_path: Path) -> None:
    samples = [sample(name, n, response, "") | {"label": None} for name, responses in
               {"a": ["1+1\n#### 2", "#### 2.0", "#### 3", "?"], "b": ["#### 1", "#### 2", "#### 3", "?"]}.items()
               for n, response in enumerate(responses)]
    samples[1]["finish"] = "length"  # it votes, but is no example
    file = write(tmp_path / "samples.jsonl", *samples)
    build.agree(samples_file=file, task="toy", save_file=str(tmp_path / "agreed.json"))
    assert read(tmp_path / "agreed.json") == [
        {"id": "a", "instruction": "Pa", "label": "2", "output": ["1+1\n#### 2"]}]
    with pytest.raises(UserError, match="on the answer of none do 75% agree"):
        build.agree(samples_file=file, task="toy", save_file=str(tmp_path / "no.json"), share=0.75)
