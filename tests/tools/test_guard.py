"""tools/guard.py: its commands are those that the scripts take, and a record says what they left."""

import json
from pathlib import Path

import pytest

from src.errors import UserError
from tests.recipes.test_commands import check
from tools import guard


def test_every_command_is_taken_by_its_script() -> None:
    commands = [run.words.split() for run in guard.runs() if run.words]
    assert len(commands) > 40
    check(commands)


def test_a_record_equals_itself_and_not_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = guard.runs()[:1]
    monkeypatch.setattr(guard, "runs", lambda: first)
    before, after = str(tmp_path / "before.json"), tmp_path / "after.json"
    guard.record(before)
    guard.compare(before, before)
    found = json.loads(Path(before).read_text(encoding="utf-8"))
    found["base"]["base/consolidated.00.pth"]["norm.weight"] = "another"
    del found["flags"]["solver_train"]["lr"]
    after.write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(UserError, match="2 differences between"):
        guard.compare(before, str(after))
    assert "/flags/solver_train/lr: only before" in caplog.text
    assert "/base/base/consolidated.00.pth/norm.weight: " in caplog.text
