"""src/training/user_reward.py with real processes."""

from pathlib import Path

import pytest

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


def test_calls_survive_hanging_and_dying_functions(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CODE)
    with UserReward(f"{tmp_path}/mine.py:reward", seconds=1.0) as reward:
        texts = ["a", "hang", "bc", "die", ""]
        found, n_failed = reward.score(["pp"] * 5, texts, ["1", None, None, None, "2"])
        assert found == [3.0, 0.0, 4.25, 0.0, 2.0] and n_failed == 2
        with pytest.raises(UserError, match="raised KeyError: 'no such thing' for the response 'raise'"):
            reward.score(["p"], ["raise"], [None])
        with pytest.raises(UserError, match="nan for the response 'nan'; expected a finite number"):
            reward.score(["p"], ["nan"], [None])


def test_a_file_that_does_not_load_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "other.py").write_text("x = 1\n")
    with UserReward(f"{tmp_path}/bad.py:reward") as reward:
        with pytest.raises(UserError, match="No module named 'nothing_of_this_name'"):
            reward.score(["p"], ["r"], [None])
    with UserReward(f"{tmp_path}/other.py:reward") as reward:
        with pytest.raises(UserError, match="has no attribute 'reward'"):
            reward.score(["p"], ["r"], [None])
    for place in (f"{tmp_path}/none.py:reward", f"{tmp_path}/bad.py", "rules"):
        with pytest.raises(UserError, match="is neither verifier nor rule nor FILE.py:FUNCTION"):
            UserReward(place)
