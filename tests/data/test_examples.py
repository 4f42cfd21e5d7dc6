"""src/data/examples.py: what the files may hold, and complaints that name file, row and key."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from src.construct.weak_to_strong import answer_of
from src.data.examples import (
    Instruction,
    Pair,
    Prompt,
    match_samples,
    read_instructions,
    read_pairs,
    read_prompts,
    read_rows,
    read_samples,
)
from src.errors import UserError

Reader = Callable[[str], object]
ROWS = [{"instruction": "1+1", "output": "2"}, {"instruction": "", "output": ["a", "b"]}]


def graded_prompts(path: str) -> list[Prompt]:
    """Prompts that need a label."""
    return read_prompts(path, need_label=True)


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], str]:
    """Write a text to a file; its path."""

    def write(text: str) -> str:
        (tmp_path / "data.json").write_text(text, encoding="utf-8")
        return str(tmp_path / "data.json")

    return write


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        "\n " + json.dumps(ROWS, indent=2) + "\n",
        "\n".join(map(json.dumps, ROWS)),
        "\r\n".join(map(json.dumps, ROWS)) + "\r\n\r\n",
    ],
)
def test_array_and_lines_hold_the_same(file: Callable[[str], str], text: str) -> None:
    found = [row._replace(where="") for row in read_instructions(file(text))]
    assert found == [Instruction("1+1", ["2"]), Instruction("", ["a", "b"])]


def test_a_line_separator_inside_a_text_ends_no_line(file: Callable[[str], str]) -> None:
    path = file(json.dumps({"instruction": "a\u2028b\x85c", "output": "x"}, ensure_ascii=False))
    assert list(read_instructions(path))[0].instruction == "a\u2028b\x85c"


def test_pairs_and_prompts(file: Callable[[str], str]) -> None:
    path = file('{"instruction": "q", "chosen": "a", "rejected": ["b", "c"]}')
    assert list(read_pairs(path)) == [Pair("q", ["a"], ["b", "c"], where=f"{path}, line 1")]
    step_controlled = '{"instruction": "q", "chosen": "a", "rejected": "b", "prefix": "c"}'
    assert list(read_pairs(file(step_controlled))) == [Pair("q", ["a"], ["b"], "c", f"{path}, line 1")]
    rows = [
        {"instruction": "q", "label": 0, "level": 3, "subject": "algebra"},
        {"instruction": "r", "label": "1/2", "id": "x", "level": "Level 5"},
        {"instruction": "s"},
    ]
    assert read_prompts(file(json.dumps(rows)), need_label=False) == [
        Prompt("0", "q", "0", 3, "algebra", where=f"{path}, row 1"),
        Prompt("x", "r", "1/2", 5, None, where=f"{path}, row 2"),
        Prompt("2", "s", None, None, None, where=f"{path}, row 3"),
    ]


@pytest.mark.parametrize(
    "read, text, message",
    [
        (read_rows, "", "data.json holds no rows"),
        (read_rows, "[]", "data.json holds no rows"),
        (read_rows, "\n\n", "data.json holds no rows"),
        (read_rows, '{"a": 1}\n{"a": \n{"a": 1}', "data.json, line 2: not valid json"),
        (read_rows, '[\n{"a": 1},\n{"a": }\n]', "data.json, row 2, line 3: not valid json"),
        (read_rows, '{"a": 1}\n\n[1]', "data.json, line 3: found a list; expected a json object"),
        (read_rows, '[{"a": 1}, "b"]', "data.json, row 2: found a str; expected a json object"),
        (read_instructions, '{"instruction": "q"}', "line 1: key 'output' is missing; found instruction"),
        (read_instructions, "[{}]", "row 1: key 'instruction' is missing; found no keys"),
        (
            read_instructions,
            '{"instruction": 1, "output": "a"}',
            "line 1: 'instruction' is a int; expected a string",
        ),
        (
            read_instructions,
            '{"instruction": "q", "output": []}',
            "line 1: 'output' must be a non-empty string",
        ),
        (read_instructions, '{"instruction": "q", "output": " \\n"}', "line 1: 'output' must be a non-empty string"),
        (
            read_instructions,
            '{"instruction": "q", "output": ["a", ""]}',
            "line 1: 'output' must be a non-empty",
        ),
        (
            read_instructions,
            '{"instruction": "q", "output": "\\ud800"}',
            'line 1: a lone surrogate, which is no Unicode, stands behind',
        ),
        (
            read_pairs,
            '{"instruction": "q", "chosen": ["a", "b"], "rejected": "b"}',
            "line 1: the same text is chosen and rejected: 'b'",
        ),
        (
            graded_prompts,
            '[{"instruction": "q", "label": "1"}, {"instruction": "r"}]',
            "row 2: key 'label' is missing",
        ),
        (graded_prompts, '{"instruction": "q", "label": ""}', "line 1: key 'label' is missing, empty"),
        (
            graded_prompts,
            '{"instruction": "q", "label": [1]}',
            "line 1: 'label' is a list; expected a string",
        ),
        (
            graded_prompts,
            '{"instruction": "q", "label": "1", "id": 1}\n{"instruction": "r", "label": "1"}',
            "line 2: id '1' stands already at",
        ),
        (
            read_samples,
            '{"response": "a"}\n{"id": "0", "response": "b"}',
            "line 2: id '0', sample 0 stands twice",
        ),
        (read_samples, '{"id": "0"}', "line 1: key 'response' is missing; found id"),
        (read_samples, '{"response": "a", "score": Infinity}', "line 1: 'score' is inf; expected a number"),
        (read_samples, '{"response": "a", "step_scores": [1, NaN]}', "line 1: 'step_scores[1]' is nan; expected a num"),
    ],
)
def test_mistake(file: Callable[[str], str], read: Reader, text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        list(read(file(text)))


def test_a_missing_and_a_binary_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing.json does not exist"):
        list(read_rows(str(tmp_path / "nothing.json")))
    (tmp_path / "binary.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match=r"binary.json, line 1: not UTF-8 \(byte 7\)"):
        list(read_rows(str(tmp_path / "binary.json")))


PROMPTS = [Prompt("x", "q", "1", None, None), Prompt("y", "r", "2", None, None)]


def test_samples_find_their_problem_by_id_or_by_place(file: Callable[[str], str]) -> None:
    by_id = read_samples(file('{"id": "y", "response": "b"}\n{"id": "x", "response": "a", "prompt": "own\\n q"}'))
    assert [(s.id, s.prompt) for s in match_samples(by_id, PROMPTS, "f")] == [("y", "r"), ("x", "own\n q")]
    by_place = read_samples(file('{"response": "a"}\n{"response": "b"}'))
    assert [(s.id, s.prompt) for s in match_samples(by_place, PROMPTS, "f")] == [("x", "q"), ("y", "r")]


def test_a_sample_stands_once_by_id_and_by_place_together(file: Callable[[str], str]) -> None:
    with pytest.raises(UserError, match="f: sample 0 of problem 'x' stands there twice, one time without an id"):
        match_samples(read_samples(file('{"response": "a"}\n{"id": "x", "response": "b"}')), PROMPTS, "f")


def test_samples_of_another_problem_with_the_same_id_are_refused(file: Callable[[str], str]) -> None:
    others = read_samples(file('{"id": "x", "response": "a", "prompt": "another"}'))
    with pytest.raises(UserError, match="f: sample 'x'/0 is of the prompt 'another', but problem 'x' of the label"):
        match_samples(others, PROMPTS, "f")


def test_nan_and_null_in_a_column_of_a_reward_are_none(file: Callable[[str], str]) -> None:
    (prompt,) = read_prompts(file('{"instruction": "a", "colour": NaN, "size": null, "n": 0}\n'), need_label=False)
    assert prompt.others == {"colour": None, "size": None, "n": 0}


def test_nan_and_null_in_a_sample_say_nothing(file: Callable[[str], str]) -> None:
    rows = read_samples(file('{"id": "x", "response": "a", "score": NaN, "finish": null}\n'
                             '{"id": "y", "response": "a", "finish": "length"}'))
    assert rows[0].values["score"] is None and [row.finished for row in rows] == [True, False]


def test_numbers_stand_for_texts_in_a_sample(file: Callable[[str], str]) -> None:
    """pandas.read_json makes numbers of texts that look like them."""
    (sample,) = read_samples(file('{"id": 1, "response": "a", "answer": 5.0, "label": 12, "outcome": "right"}'))
    assert (sample.id, sample.values["answer"], sample.values["label"]) == ("1", "5", "12")
    assert answer_of(sample) == "5"


@pytest.mark.parametrize("text", ['{"id": "z", "response": "a"}', '{"response": "a"}\n' * 3])
def test_samples_of_no_problem_are_refused(file: Callable[[str], str], text: str) -> None:
    with pytest.raises(UserError, match="f: sample id '[z2]' is not among the 2 problems"):
        match_samples(read_samples(file(text)), PROMPTS, "f")
