"""src/data/rows.py and conversations.py: keys of other formats are honoured or refused, null means absent, numbers are
read as the grader reads them."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import pandas
import pytest

from src import load
from src.command.config import ColumnFlags, TokenizerFlags
from src.data import rows
from src.data.encoding import encode_conversation
from src.data.examples import (
    Chat,
    read_instruction_rows,
    read_instructions,
    read_pairs,
    read_prompts,
    read_samples,
    read_step_labels,
)
from src.errors import UserError
from src.grading.normalize import rational
from src.text.tokenizer import Tokenizer
from tests.conftest import Folders

REPORTS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "reports"
needs_reports = pytest.mark.skipif(not REPORTS.is_dir(), reason="the folder of reports is not there")
Read = Callable[[str], list[object]]
USER = {"role": "user", "content": "q"}
NAN = float("nan")


def saved(path: Path, *values: object) -> str:
    """A jsonl file of these rows."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return str(path)


def containers(folder: Path, values: list[dict[str, object]]) -> list[str]:
    """The same rows as lines, an array, parquet and a directory of `datasets`, which write null for absent keys."""
    (folder / "array.json").write_text(json.dumps(values), encoding="utf-8")
    dataset = datasets.Dataset.from_list(values)
    dataset.to_parquet(folder / "rows.parquet")
    dataset.save_to_disk(folder / "saved")
    return [
        saved(folder / "rows.jsonl", *values),
        *(str(folder / name) for name in ("array.json", "rows.parquet", "saved")),
    ]


def labelled(path: Path, **values: object) -> str | None:
    """The label that a row is read with."""
    (prompt,) = read_prompts(saved(path, {"instruction": "x", **values}), need_label=True)
    return prompt.label


@pytest.mark.parametrize(
    "label, text",
    [
        (4, "4"),
        (4.0, "4"),
        (-2.5, "-2.5"),
        (1e22, "10000000000000000000000"),
        (1e23, "1" + "0" * 23),
        (1.5e-7, "0.00000015"),
        (-0.0, "0"),
        (10**40, "1" + "0" * 40),
        (100, "100"),
        (" 4 ", " 4 "),
        ("1e22", "1e22"),
    ],
)
def test_a_number_is_the_label_that_the_grader_reads(tmp_path: Path, label: object, text: str) -> None:
    assert labelled(tmp_path / "x", label=label) == text
    if not isinstance(label, str):
        assert float(rational(text)) == float(label)


@pytest.mark.parametrize(
    "values, message",
    [
        ({}, "'label' is missing, empty or NaN"),
        ({"label": None}, "'label' is missing, empty or NaN"),
        ({"label": NAN}, "'label' is missing, empty or NaN"),
        ({"label": " \n\t\u00a0"}, "'label' is missing, empty or NaN"),
        ({"label": "\u200b \ufeff"}, "'label' is missing, empty or NaN"),
        ({"label": "NaN"}, "'label' is missing, empty or NaN"),
        ({"label": float("inf")}, "'label' is inf; expected a finite number"),
        ({"label": -float("inf")}, "'label' is -inf; expected a finite number"),
        ({"label": True}, "'label' is True; expected the answer of the problem"),
        ({"label": ["4"]}, "'label' is a list; expected a string"),
        ({"label": {"value": 4}}, "'label' is a dict; expected a string"),
    ],
)
def test_what_is_no_label_is_refused(tmp_path: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"x, line 1: .*{message}"):
        labelled(tmp_path / "x", **values)


def test_true_and_false_are_labels_of_their_type(tmp_path: Path) -> None:
    assert labelled(tmp_path / "x", label=False, answer_type="true_false") == "False"


@pytest.mark.parametrize("value", [5, 5.0, "5", "5.0", " 5 ", "Level 5", "level 5", "LEVEL 5", "Level5"])
def test_levels(tmp_path: Path, value: object) -> None:
    (prompt,) = read_prompts(saved(tmp_path / "x", {"instruction": "x", "level": value}), need_label=False)
    assert prompt.level == 5


@pytest.mark.parametrize("value", [None, NAN, "", "Level ?", "?"])
def test_unknown_levels(tmp_path: Path, value: object) -> None:
    (prompt,) = read_prompts(saved(tmp_path / "x", {"instruction": "x", "level": value}), need_label=False)
    assert prompt.level is None


@pytest.mark.parametrize("value", ["hard", 4.5, True, -1, "Level V", [5], float("inf"), "5 of 5", "٥", "9" * 5000])
def test_what_is_no_level_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(UserError, match="x, line 1: 'level' is .*expected a whole number"):
        read_prompts(saved(tmp_path / "x", {"instruction": "x", "level": value}), need_label=False)


def test_numbers_of_nullable_columns(tmp_path: Path) -> None:
    """pandas turns whole numbers into floats, and absent ones into NaN, as soon as one is absent."""
    frame = pandas.DataFrame({"instruction": ["x", "y"], "label": [3, None], "level": [4, None], "id": [7, 8.0]})
    for write in (frame.to_parquet, lambda path: frame.to_json(path, orient="records", lines=True)):
        path = tmp_path / ("x.parquet" if write == frame.to_parquet else "x.jsonl")
        write(path)
        found = read_prompts(str(path), need_label=False)
        assert [(x.id, x.label, x.level) for x in found] == [("7", "3", 4), ("8", None, None)]


def test_alpaca_input_stands_behind_its_instruction(tmp_path: Path) -> None:
    row = {"instruction": "Solve.", "input": "2+2?", "output": "4", "correct": True, "label": "4", "chosen": "4"}
    row |= {"rejected": "5", "steps": ["4"], "labels": [1]}
    problem = "Solve.\n2+2?"
    for path in containers(tmp_path, [row]):
        assert next(read_instructions(path))[:2] == (problem, ["4"])
        assert next(read_pairs(path))[:3] == (problem, ["4"], ["5"])
        assert next(read_step_labels(path))[:3] == (problem, ["4"], [1.0])
        assert read_prompts(path, need_label=True)[0].instruction == problem
        (found,) = read_instruction_rows(path)
        assert found["instruction"] == problem and "input" not in found
    assert next(read_instructions(saved(tmp_path / "x", row | {"instruction": ""})))[:2] == ("2+2?", ["4"])
    for nothing in ("", " ", None):
        path = saved(tmp_path / "x", row | {"input": nothing})
        assert next(read_instructions(path))[:2] == ("Solve.", ["4"])
    with pytest.raises(UserError, match="line 1: 'input' is a list; expected a string"):
        list(read_instructions(saved(tmp_path / "x", row | {"input": ["2+2?"]})))


@pytest.mark.parametrize("key", rows.FOREIGN)
@pytest.mark.parametrize("read", [read_instructions, read_pairs, read_step_labels, read_instruction_rows])
def test_keys_that_change_a_row_are_refused_by_name(tmp_path: Path, key: str, read: Read) -> None:
    row = {"instruction": "x", "output": "a", "chosen": "a", "rejected": "b", "correct": True}
    for nothing in (None, "", [], {}):
        assert len(list(read(saved(tmp_path / "x", row | {key: nothing, "source": "web", "difficulty": 3})))) == 1
    with pytest.raises(UserError, match=rf"x, line 2: '{key}' is .*, which would be lost; "):
        list(read(saved(tmp_path / "x", row, row | {key: ["y"]})))


@pytest.mark.parametrize(("key", "right", "wrong"), [
    ("correct", True, False), ("is_correct", 1, 0), ("outcome", "right", "wrong"), ("outcome", None, "unparsed"),
])
def test_solutions_that_are_marked_wrong_are_not_learnt(
    tmp_path: Path, key: str, right: object, wrong: object
) -> None:
    row = {"instruction": "x", "output": "a"}
    assert len(list(read_instructions(saved(tmp_path / "x", row | {key: right})))) == 1
    with pytest.raises(UserError, match=f"x, line 2: '{key}' is .*, which would be lost; every 'output' is learnt"):
        list(read_instructions(saved(tmp_path / "x", row | {key: right}, row | {key: wrong})))
    assert [each.labels for each in read_step_labels(saved(tmp_path / "x", row | {"correct": False}))] == [[0.0]]


def test_null_means_absent(tmp_path: Path) -> None:
    both = [
        {"messages": [USER, {"role": "assistant", "content": "4"}], "instruction": None, "output": None},
        {"messages": None, "instruction": "x", "output": "4"},
    ]
    for path in containers(tmp_path, both):
        chat, instruction = read_instructions(path)
        assert isinstance(chat, Chat) and chat.messages == both[0]["messages"]
        assert instruction[:2] == ("x", ["4"])
    pair = {"instruction": "x", "chosen": "a", "rejected": "b"}
    for path in containers(tmp_path, [pair | {"prefix": "c"}, pair | {"prefix": None}]):
        assert [found.prefix for found in read_pairs(path)] == ["c", ""]
    judged = [{"instruction": "x", "output": "a", "correct": True}, {"instruction": "x", "steps": ["a"], "labels": [1]}]
    absent = dict.fromkeys(judged[0] | judged[1])
    for path in containers(tmp_path, [absent | row for row in judged]):
        assert [found[:3] for found in read_step_labels(path)] == [("x", ["a"], [1.0])] * 2
    sample = {"id": None, "sample": None, "response": "a", "prompt": None, "outcome": None}
    assert read_samples(saved(tmp_path / "x", sample))[0][:5] == ("0", 0, "", "a", None)
    with pytest.raises(UserError, match="key 'output' is missing; found instruction"):
        list(read_instructions(saved(tmp_path / "x", {"instruction": "x", "output": None})))


def messages_of(path: Path, *messages: object) -> list[dict[str, object]]:
    """The messages that a conversation is read with, from lines and from parquet."""
    read = [list(read_instructions(file))[0].messages for file in containers(path, [{"messages": list(messages)}])]
    assert all(found == read[0] for found in read)
    return read[0]


def test_what_messages_say_in_other_ways(tmp_path: Path) -> None:
    thought = {"role": "assistant", "content": "4", "reasoning_content": "2+2 is 4"}
    assert messages_of(tmp_path, USER | {"name": None, "tool_calls": None}, thought) == [
        USER,
        {"role": "assistant", "content": "<think>\n2+2 is 4\n</think>\n\n4"},
    ]
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?"}]
    joined = messages_of(tmp_path, {"role": "user", "content": parts}, {"role": "assistant", "content": parts[1:]})
    assert [message["content"] for message in joined] == ["What is 2+2?", "2+2?"]
    answers = [{"role": "assistant", "content": "bad", "weight": 0}, {"role": "assistant", "content": "4", "weight": 1}]
    assert [m.get("weight") for m in messages_of(tmp_path, USER, answers[0], USER, answers[1])] == [None, 0, None, None]


@pytest.mark.parametrize(
    "message, complaint",
    [
        ({"tool_calls": [{"id": "1"}]}, "'tool_calls' is .*would be lost; calls of tools"),
        ({"function_call": {"name": "f"}}, "'function_call' is"),
        ({"tool_call_id": "1"}, "'tool_call_id' is"),
        ({"name": "Ann"}, "'name' is 'Ann'"),
        ({"thinking": "so"}, "'thinking' is 'so', which would be lost; rename it to 'reasoning_content'"),
        ({"loss": False}, "'loss' is False, which would be lost; use 'weight'"),
        ({"train": False}, "'train' is False, which would be lost; use 'weight'"),
        ({"prefix": True}, "'prefix' is True"),
        ({"weight": 0.5}, "'weight' is 0.5; expected 0"),
        ({"weight": 2}, "'weight' is 2; expected 0"),
        ({"weight": "0"}, "'weight' is '0'; expected 0"),
        ({"weight": 0}, "says nothing in 'messages' that is to be learnt"),
        ({"role": "user", "weight": 1}, "of the user nothing is learnt"),
        ({"role": "user", "reasoning_content": "so"}, "'reasoning_content' belongs to a text of the assistant's"),
        ({"reasoning_content": ["so"]}, "'reasoning_content' is a list"),
        ({"content": None}, "key 'content' is missing; found role"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "block 1: .*of type 'image_url'"),
        ({"content": [{"type": "input_text", "text": "4"}]}, "block 1: .*found type 'input_text' and type, text"),
        ({"content": [{"type": "text", "text": "4", "content": "5"}]}, "found type 'text' and type, text, content"),
        ({"content": [{"type": "text", "text": "4"}, {"type": "code", "content": "5"}]}, "block 1: key 'content' is m"),
        ({"content": [{"text": "4"}]}, "block 1: key 'type' is missing"),
        ({"content": [{"type": "text", "text": 4}]}, "block 1: 'text' is a int"),
        ({"content": ["4"]}, "block 1 is a str; expected an object"),
        ({"content": []}, "says nothing"),
    ],
)
def test_what_a_message_may_not_say(tmp_path: Path, message: dict[str, object], complaint: str) -> None:
    path = saved(tmp_path / "x", {"messages": [USER, {"role": "assistant", "content": "4"} | message]})
    with pytest.raises(UserError, match=f"x, line 1.*{complaint}"):
        list(read_instructions(path))


def test_a_row_with_two_meanings_is_refused(tmp_path: Path) -> None:
    row = {"messages": [USER, {"role": "assistant", "content": "4"}], "instruction": "q", "output": "4"}
    with pytest.raises(UserError, match="found both 'messages' and 'instruction'"):
        list(read_instructions(saved(tmp_path / "x", row)))


def test_what_has_weight_0_is_read_but_not_learnt(folders: Folders, code_tokenizer: Tokenizer) -> None:
    bad, good = {"role": "assistant", "content": "bad"}, {"role": "assistant", "content": "4"}
    for tokenizer in (load.load_tokenizer(folders.one, TokenizerFlags(chat_template="llama-2")), code_tokenizer):
        (whole,) = encode_conversation(tokenizer, [USER, bad, USER, good])
        (without,) = encode_conversation(tokenizer, [USER, bad | {"weight": 0}, USER, good])
        assert whole.tokens == without.tokens
        learnt = [
            tokenizer.decode([t for t, kept in zip(found.tokens, found.answer_mask, strict=True) if kept])
            for found in (whole, without)
        ]
        assert "bad" in learnt[0] and "4" in learnt[0]
        assert "bad" not in learnt[1] and "4" in learnt[1]
        (everything,) = encode_conversation(tokenizer, [USER, bad | {"weight": 0}, USER, good], "all")
        not_learnt = [t for t, kept in zip(everything.tokens, everything.answer_mask, strict=True) if not kept]
        assert "bad" in tokenizer.decode(not_learnt[1:]) and "4" not in tokenizer.decode(not_learnt[1:])
        with pytest.raises(UserError, match="not the assistant's has weight 0"):
            encode_conversation(tokenizer, [USER | {"weight": 0}, good], "all")


@pytest.mark.parametrize(
    "read, values, message",
    [
        (read_pairs, {"instruction": "x", "output": "a"}, "data_build.py pairs"),
        (read_step_labels, {"instruction": "x", "output": "a"}, "data_build.py outcome"),
        (read_step_labels, {"instruction": "x", "chosen": "a", "rejected": "b"}, "data_build.py process"),
        (read_instructions, {"prompt": "x", "chosen": "a"}, "dataset/prepare.py"),
        (read_samples, {"instruction": "x"}, "solver_evaluate.py"),
        (lambda path: read_prompts(path, need_label=True), {"question": "x", "answer": "a"}, "dataset/prepare.py"),
    ],
)
def test_rows_of_another_kind_name_the_command_for_the_right_one(
    tmp_path: Path, read: Read, values: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=f"x, line 1: .*; found {', '.join(values)}; .*|true or false; .*") as caught:
        list(read(saved(tmp_path / "x", values)))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"outcome": "correct"}, "'outcome' is 'correct'; expected one of right, wrong"),
        ({"outcome": True}, "'outcome' is True; expected one of"),
        ({"token_count": "7"}, "'token_count' is '7'; expected a number"),
        ({"score": [1.0]}, r"'score' is \[1.0\]; expected a number"),
        ({"score": False}, "'score' is False; expected a number"),
        ({"score": float("-inf")}, "'score' is -inf; expected a number below 1e300"),
        ({"token_count": 10**400}, "'token_count' is 1000.*0; expected a number below 1e300"),
        ({"step_scores": 0.5}, "'step_scores' is a float; expected a list"),
        ({"step_scores": [0.5, "x"]}, r"'step_scores\[1\]' is 'x'; expected a number"),
        ({"finish": ["stop"]}, "'finish' is a list; expected a string"),
        ({"answer": {"a": 1}}, "'answer' is a dict; expected a string"),
        ({"label": [4]}, "'label' is a list; expected a string"),
        ({"sample": 0.5}, "'sample' is 0.5; expected a whole number"),
        ({"sample": "1"}, "'sample' is '1'; expected a whole number"),
        ({"id": True}, "'id' is a bool; expected a string"),
        ({"response": None}, "key 'response' is missing"),
        ({"response": 4}, "'response' is a int; expected a string"),
    ],
)
def test_samples_of_odd_types_are_refused(tmp_path: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"x, line 1: {message}"):
        read_samples(saved(tmp_path / "x", {"response": "4"} | values))


def test_samples_of_nullable_columns(tmp_path: Path) -> None:
    row = {"id": 3.0, "sample": 1.0, "response": "4", "label": 4.0, "outcome": "right", "score": None, "finish": None}
    (sample,) = read_samples(saved(tmp_path / "x", row))
    assert sample[:2] == ("3", 1) and sample.values["label"] == "4"


def test_a_huge_row_of_a_table_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_ROW", 2000)
    values = [{"instruction": "x" * 500, "output": "a"} for _ in range(20)]
    folder = tmp_path / "good"
    folder.mkdir()
    for path in containers(folder, values)[2:]:
        assert len(list(read_instructions(path))) == 20
    values[13]["output"] = "a" * 2000
    for path in containers(tmp_path, values)[2:]:
        with pytest.raises(UserError, match="row 14: the row has more than"):
            list(read_instructions(path))


@needs_reports
@pytest.mark.parametrize(
    "name, message",
    [
        ("DT1_json_tracebacks/deep.jsonl", "line 1: nested more than 100 deep"),
        ("DT1_json_tracebacks/huge_int.jsonl", "line 1: a whole number of more than 4,300 digits"),
        ("DT2_labels/nan.jsonl", "line 1: key 'label' is missing, empty or NaN"),
        ("DT2_labels/spaces.jsonl", "line 1: key 'label' is missing, empty or NaN"),
    ],
)
def test_reports_that_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read_prompts(str(REPORTS / name), need_label=True)


@needs_reports
def test_reports_that_are_read() -> None:
    def prompts(name: str) -> list[tuple[str | None, int | None]]:
        return [(x.label, x.level) for x in read_prompts(str(REPORTS / name), need_label=True)]

    assert prompts("DT2_labels/1e22.jsonl") == [("1" + "0" * 22, None)]
    assert prompts("DT3_levels/float.jsonl") == [("4", 4)]
    assert prompts("DT3_levels/level_5.jsonl") == [("4", 5)]
    assert prompts("DT3_levels/nullable.parquet") == [("4", 3), ("5", None)]
    lost = REPORTS / "DT4_keys_lost"
    assert next(read_instructions(str(lost / "alpaca_input.jsonl")))[:2] == ("Solve.\n2+2?", ["4"])
    assert list(read_pairs(str(lost / "pair_with_input.jsonl")))[0].instruction == "Choose.\n2+2? (A) 3 (B) 4"
    assert "2+2 is 4" in list(read_instructions(str(lost / "reasoning_content.jsonl")))[0].messages[1]["content"]
    assert list(read_instructions(str(lost / "weight_0.jsonl")))[0].messages[1]["weight"] == 0
    absent = REPORTS / "DT5_null_means_absent"
    assert next(read_pairs(str(absent / "prefix_null.jsonl")))[:4] == ("x", ["a"], ["b"], "")
    assert len(list(read_instructions(str(absent / "messages_null.parquet")))) == 2


def test_columns_of_public_files_are_read_under_our_names(tmp_path: Path) -> None:
    path = tmp_path / "public.jsonl"
    path.write_text('{"problem": "1+1=", "answer": 2, "instruction": "old"}\n')
    columns = {"instruction": "problem", "label": "answer"}
    with pytest.raises(UserError, match="row 1.*|line 1: --columns makes 'problem' 'instruction', which is there"):
        read_prompts(str(path), columns, need_label=True)
    (prompt,) = read_prompts(str(path), columns | {"subject": "instruction"}, need_label=True)
    assert (prompt.instruction, prompt.label, prompt.subject) == ("1+1=", "2", "old")
    with pytest.raises(UserError, match="line 1: --columns names 'question', which is not there; found problem"):
        list(read_instructions(str(path), {"instruction": "question"}))
    path.write_text('{"instruction": "q", "answer": "so #### 2"}')
    with pytest.raises(UserError, match="'label' holds a whole solution"):
        read_prompts(str(path), {"label": "answer"}, need_label=True)


@pytest.mark.parametrize("words", [["answer"], ["=label"], ["a=label", "b=label"], ["a=label", "a=id"]])
def test_columns_that_are_no_pairs_of_names_are_refused(words: list[str]) -> None:
    assert ColumnFlags(columns=["answer=label,problem=instruction"]).renamed["instruction"] == "problem"
    with pytest.raises(UserError, match="--columns is .*; expected THEIRS=OURS, each name once"):
        ColumnFlags(columns=words)
