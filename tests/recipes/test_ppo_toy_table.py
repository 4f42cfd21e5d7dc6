"""recipes/ppo_toy_table.py: gains in pairs of answers, and the buffer at which a hacked verifier is noticed; what that
verifier learnt from, by recipes/invert_outcomes.py."""

import json
from pathlib import Path

import numpy as np
import pytest

from recipes import invert_outcomes
from recipes import ppo_toy_table as table


def test_a_gain_is_paired_by_problem_and_its_interval_holds_it() -> None:
    before, after = np.zeros((2, 100)), np.zeros((2, 100))
    before[0, :50] = before[1, :40] = after[0, :70] = after[1, :50] = 1
    rise, low, high = table.gain(before, after)
    assert rise == pytest.approx(0.15) and 0.05 < low < 0.15 < high < 0.27
    assert table.gain(before, before) == (0.0, 0.0, 0.0)


def test_the_alarm_is_the_panel_s() -> None:
    worse = [{"reward_verifier": 0.01 * i, "graded_right": 0.9 - 0.01 * i} for i in range(30)]
    assert table.alarm(worse) == 20
    assert table.alarm([row | {"graded_right": 0.01 * i} for i, row in enumerate(worse)]) is None
    assert table.alarm([{"reward": 1.0}] * 30) is None


def test_the_ends_of_a_run_are_of_its_buffers() -> None:
    start = {"step": 0, "eval_accuracy": 0.5}
    run = [{"step": i, "reward_verifier": 0.1 * (i > 6), "graded_right": 0.25} for i in range(1, 13)]
    assert "verifier +0.000 to +0.100, right 25.0% to 25.0%" in table.watched([[start, *run]])[0]


def test_the_table_is_of_the_seeds_asked_for_and_names_an_arm_that_is_not_finished(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def write(path: Path, rows: list[dict[str, object]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    for seed in (1, 2, 3):
        folder = tmp_path / f"seed-{seed}"
        for row, right in (("sft", 40 * (seed < 3)), *((arm, 80) for arm in table.ARMS)):
            if row == "grpo" or (seed > 1 and row == table.BAD):  # the bad verifier meets the first seed alone
                continue
            write(folder / f"{row}-test" / "samples.jsonl", [
                {"id": str(n), "sample": 0, "prompt": "q", "response": "r",
                 "outcome": "right" if n < right else "wrong"} for n in range(100)])
            write(folder / f"{row}-test" / "results.json", [{"accuracy": right / 100}])
            start = {"step": 0, "eval_accuracy": 0.4}
            write(folder / row / "actor" / "metrics.jsonl", [start, *(
                {"step": n, "reward": 0.1 * n, "reward_verifier": 0.1 * n, "graded_right": 0.4} for n in range(1, 9))])
        write(folder / "outcome-held" / "results.json", [{"verifier": {"auc": 0.75 + seed / 100}}])
    table.main(str(tmp_path), [1, 2])
    lines = {line[:36].strip(): line for line in capfd.readouterr().out.splitlines()}
    assert lines["SFT"].split() == ["SFT", "40.0%"] and lines["GRPO, grader"].endswith("not finished")
    assert all("80.0%   +40.0%" in lines[name] and lines[name].endswith("beyond it")
               for arm, name in table.ARMS.items() if arm != "grpo")
    assert "outcome verifier, AUC on problems held back: 0.760 0.770" in "\n".join(lines.values())
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_bad_verifier_learns_the_opposite(tmp_path: Path) -> None:
    rows = [{"instruction": "q", "output": output, "correct": output == "r"} for output in ("r", "s")]
    (tmp_path / "outcome.json").write_text(json.dumps(rows), encoding="utf-8")
    invert_outcomes.main(str(tmp_path / "outcome.json"), str(tmp_path / "inverted.json"))
    inverted = json.loads((tmp_path / "inverted.json").read_text(encoding="utf-8"))
    assert inverted == [rows[0] | {"correct": False}, rows[1] | {"correct": True}]
