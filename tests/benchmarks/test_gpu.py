"""benchmarks/gpu.py on a CPU: every part finds what it says, and what there is no time for is named."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import gpu

ROOT = Path(__file__).resolve().parents[2]
WORDS = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device=cpu", "--size=tiny"]


def test_every_part_runs(tmp_path: Path) -> None:
    """One in a process of its own, as the command does; that all are is no part of what they find."""
    words = [*WORDS, "--minutes=30", f"--folder={tmp_path}", "--parts", "score"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    logs = [path.read_text()[-2000:] for path in tmp_path.glob("*.log")]
    assert "failed" not in done.stdout and "left out" not in done.stdout, (done.stdout, logs)
    for part in gpu.PARTS:
        if part != "score":
            gpu.main(only=part, size="tiny", folder=str(tmp_path))
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [len([row for row in found if row["part"] == part]) for part in (
        "correct", "decode", "train", "checkpoint", "ppo", "score", "small")] == [6, 12, 8, 2, 3, 3, 3]
    by_name = {row["what"]: row for row in found}
    assert by_name["float32 off float32 on the CPU"]["gradients"] < 1e-5
    assert by_name["greedy text, float32"]["tokens until it parts from transformers'"] == 12
    assert by_name["a run resumed after 2 of 4 steps"]["largest difference of a weight"] == 0
    assert by_name["PPO"]["first_ratio_deviation"] < 0.1


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    words = [*WORDS, "--minutes=0", f"--folder={tmp_path}", "--parts", "decode", "train"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert [line.split()[:3] for line in done.stdout.splitlines()] == [
        ["decode", "left", "out:"], ["train", "left", "out:"]]
