"""benchmarks/drill.py with one trouble: what is said, by whom, and that the run ends as if nothing had been."""

from pathlib import Path

import pytest

from benchmarks import drill, kill


def test_a_run_whose_directory_vanishes_says_so_and_ends_bit_equal_when_it_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kill, "STEPS", 10)
    monkeypatch.setattr(drill, "CASE", kill.Case("dp 2", -1, background=False))  # half the processes
    drill.prepare(tmp_path)
    said, equal = drill.drill("vanished", tmp_path)
    # once, where a thread of TensorBoard's may have begun the line; torchrun's report says it again
    errors = [line for _, line in said.lines if "error: /" in line and "traceback" not in line]
    assert said.status == 1 and equal
    assert len(errors) == 1 and "vanished: the run's directory, or a file in it, is gone" in errors[0], said.lines
