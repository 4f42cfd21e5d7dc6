"""src/training/user_reward.py with real processes."""

import json
from pathlib import Path

import pytest

from src.data.examples import Prompt, read_prompts
from src.errors import UserError
from src.training.user_reward import UserReward

CODE = """
import os, time
print("loading")

def reward(prompt, response, label):
    print("called", response)
    if response == "hang":
        time.sleep(60)
    if response == "die":
        os._exit(3)
    if response == "raise":
        raise KeyError("no such thing")
    if response == "nan":
        return float("nan")
    return len(prompt) + len(response) + (label is None) / 4
"""


BATCH = """
import os, time

def grouped(completions, label, colour, **others):
    assert {"id", "instruction", "level", "prompts", "subject"} <= others.keys(), others
    if "die" in completions:
        os._exit(3)
    best = max(map(len, completions))
    return [len(text) / best for text in completions], {"longest": best, "red": colour.count("red")}

def few(completions):
    return [1.0]

def lost(completions, color):
    return [1.0] * len(completions)

def endless(completions):
    return [1.0] * len(completions), {"a": float("inf")}
"""


RESPONSES = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Verdict:
    size: int

def turned(response, prompt, label, strict=True):
    assert (prompt, label, strict) == ("pp", "7", True)
    return Verdict(len(response)).size

def alone(response):
    return len(response)

def renamed(question, response, answer):
    assert (question, answer) == ("pp", "7")
    return len(response)
"""


def prompts(n: int, label: str | None = None) -> list[Prompt]:
    return [Prompt(str(index), "pp", label, None, None, others={"colour": "red"} if index else {})
            for index in range(n)]


def test_a_function_sees_the_whole_batch_and_every_column(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mine.py").write_text(BATCH)
    with UserReward(f"{tmp_path}/mine.py:grouped", seconds=2.0) as reward:
        assert reward.score(prompts(3), ["a", "bb", "cccc"]) == ([0.25, 0.5, 1.0], 0, {"longest": 4.0, "red": 2.0})
        assert not caplog.records
        # the batch ends the process: it is asked again for each
        assert reward.score(prompts(3), ["a", "die", "cccc"]) == ([1.0, 0.0, 1.0], 1, {})
        assert "ended with status 3; it is asked for one response at a time" in caplog.text
    for name, message in (
        ("few", "gave 1 numbers for 2 responses; expected one each"),
        ("lost", r"raised TypeError: .*'color'; it is called with lists under .* prompts, .*, tolerance, colour"),
        ("endless", "inf for 'a' of the log; expected a finite number"),
    ):
        with UserReward(f"{tmp_path}/mine.py:{name}") as reward, pytest.raises(UserError, match=message):
            reward.score(prompts(2), ["a", "b"])


def test_what_a_row_lacks_is_none(tmp_path: Path) -> None:
    rows = [{"instruction": "1+1?"}, {"instruction": "2+2?", "answer_type": "number", "tolerance": 0, "colour": "red"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "mine.py").write_text("def mine(**columns):\n    raise ValueError(columns)\n")
    with UserReward(f"{tmp_path}/mine.py:mine") as reward, pytest.raises(UserError) as raised:
        reward.score(read_prompts(str(tmp_path / "rows.json"), need_label=False), ["a", "b"])
    for name, values in {"id": ["0", "1"], "label": [None, None], "answer_type": [None, "number"],
                         "tolerance": [None, 0.0], "colour": [None, "red"]}.items():
        assert f"{name!r}: {values}" in str(raised.value)


def test_a_file_may_import_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("WORTH = 0.5")
    code = "import beside\ndef mine(completions):\n    return [beside.WORTH for _ in completions]"
    (tmp_path / "mine.py").write_text(code)
    with UserReward(f"{tmp_path}/mine.py:mine", seconds=2.0) as reward:
        assert reward.score(prompts(2), ["a", "b"]).values == [0.5, 0.5]


def test_calls_survive_hanging_and_dying_functions(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CODE)
    with UserReward(f"{tmp_path}/mine.py:reward", seconds=1.0) as reward:
        texts = ["a", "hang", "bc", "die", ""]
        labels = ["1", None, None, None, "2"]
        asked = [prompt._replace(label=label) for prompt, label in zip(prompts(5), labels, strict=True)]
        assert reward.score(asked, texts) == ([3.0, 0.0, 4.25, 0.0, 2.0], 2, {})
        with pytest.raises(UserError, match="raised KeyError: 'no such thing'"):
            reward.score(prompts(1), ["raise"])
        with pytest.raises(UserError, match="nan for the response 'nan'; expected a finite number"):
            reward.score(prompts(1), ["nan"])


def test_its_process_is_started_again_in_less_than_torch_takes(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import sys\n\ndef reward(prompts):\n    return ['torch' in sys.modules] * 2\n")
    with UserReward(f"{tmp_path}/mine.py:reward") as reward:
        assert reward.score(prompts(2), ["a", "b"]).values == [0.0, 0.0]


def test_a_file_that_does_not_load_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "other.py").write_text("x = 1\n")
    with UserReward(f"{tmp_path}/bad.py:reward") as reward:
        with pytest.raises(UserError, match="No module named 'nothing_of_this_name'"):
            reward.score(prompts(1), ["r"])
    with UserReward(f"{tmp_path}/other.py:reward") as reward:
        with pytest.raises(UserError, match="has no attribute 'reward'"):
            reward.score(prompts(1), ["r"])
    for place in (f"{tmp_path}/none.py:reward", f"{tmp_path}/bad.py", "rules"):
        with pytest.raises(UserError, match="is neither verifier, rule nor code, nor FILE.py:FUNCTION"):
            UserReward(place)


def test_a_file_may_hold_dataclasses_and_names_of_responses_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(RESPONSES)
    found = {}
    for name in ("turned", "alone", "renamed"):
        with UserReward(f"{tmp_path}/mine.py:{name}") as reward:
            found[name] = reward.score(prompts(2, "7"), ["a", "bbb"]).values
    assert found == {"turned": [1.0, 3.0], "alone": [1.0, 3.0], "renamed": [1.0, 3.0]}
