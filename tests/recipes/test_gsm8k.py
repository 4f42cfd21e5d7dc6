"""recipes/gsm8k.sh and its table: settings that are not understood are refused, gains are over the stage before."""

import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from recipes import gsm8k_table as table
from src.errors import UserError
from tests.recipes.test_commands import check, script_of, started

RECIPE = Path(__file__).parents[2] / "recipes" / "gsm8k.sh"
RULES = {"extraction": "gsm8k/last-number@5", "equality": "exact@5"}
N = 60


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trian", "x"], "unknown setting --trian; known are --fresh, --train, --test, --model"),
        (["--train"], "--train has no value"),
        (["--train", "x"], "--train is 'x'; give the published jsonl file of GSM8K"),
        (["--train", __file__, "--test", __file__, "--size", "huge"], "--size is 'huge'; expected short or long"),
    ],
)
def test_settings_that_are_not_understood_are_refused(words: list[str], message: str) -> None:
    done = subprocess.run(["bash", str(RECIPE), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


@pytest.fixture
def commands(tmp_path: Path) -> list[list[str]]:
    """What the recipe starts."""
    raw = tmp_path / "raw.jsonl"
    raw.write_text("{}\n" * 300)
    words = ["--train", str(raw), "--test", str(raw), "--model", "model.gguf", "--seeds", "1 2", "--run", "out"]
    return started(tmp_path, "gsm8k.sh", *words)


def test_every_command_is_one_that_its_script_takes(commands: list[list[str]]) -> None:
    check(commands)
    counts = Counter(filter(None, map(script_of, commands)))
    assert counts == {"checkpoint_split": 1, "data_build": 2 + 2 * 4, "solver_evaluate": 2 + 2 * 7, "solver_train": 4,
                      "verifier_train": 4, "verifier_evaluate": 4, "ppo_train": 4, "preference_train": 2}
    assert commands[-1][1:] == ["recipes/gsm8k_table.py", "--run_dir", commands[-1][3], "--seeds", "1,2"]


def write(folder: Path, outcomes: list[list[str]], scores: list[list[float]] | None = None) -> None:
    """Samples with these outcomes, by problem, and scores of one step each; right answers are 7, wrong ones differ."""
    folder.mkdir(parents=True)
    rows = []
    for problem, row in enumerate(outcomes):
        for number, outcome in enumerate(row):
            score = {"step_scores": [scores[problem][number]]} if scores else {}
            answer = "7" if outcome == "right" else str(100 + number)
            rows.append({"id": str(problem), "sample": number, "prompt": "?", "response": f"#### {answer}",
                         "answer": answer, "outcome": outcome, **score})
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = {name: {"1": 0.1, "8": 0.5} for name in ("pass_at", "maj_at", "best_of_at")}
    (folder / "results.json").write_text(json.dumps({"rules": RULES, **curves}))


def greedy(right: int) -> list[list[str]]:
    return [["right" if problem < right else "wrong"] for problem in range(N)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """One of eight samples is right in half of the problems, and the process verifier alone knows which."""
    seed = tmp_path / "seed-3"
    write(tmp_path / "zero-shot", greedy(0))
    write(tmp_path / "few-shot", greedy(1))
    for name, right in (("lora", 1), ("sft", 10), ("grpo", 30), ("ppo", 11), ("dpo", 2)):
        write(seed / f"{name}-test", greedy(right))
    eight = [["wrong"] * 3 + ["right" if problem % 2 else "wrong"] + ["wrong"] * 4 for problem in range(N)]
    write(seed / "eight-test", eight)
    write(seed / "outcome-test", eight, [[0.9] + [0.1] * 7] * N)
    write(seed / "process-test", eight, [[0.1] * 3 + [0.9] + [0.1] * 4] * N)
    for name in ("grpo", "ppo"):
        (seed / name).mkdir()
        lines = [{"step": step, "graded_right": 0.1 * step} for step in range(1, 5)]
        (seed / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_gains_are_over_the_stage_before(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    table.main(str(run), [3])
    lines = {line[:34].strip(): line for line in capfd.readouterr().out.splitlines()}
    assert "60 test problems, 1 seeds" in lines and (run / "gsm8k.png").stat().st_size > 1000
    assert "over" not in lines["zero-shot"]
    assert lines["zero-shot"].split()[1:] == ["0.0%", "0.0%", "..", "6.0%"]  # none of 60 is no certainty
    for name, share, verdict in (
        ("SFT", "16.7%", "over zero-shot: beyond it"),
        ("LoRA", "1.7%", "over zero-shot: within it"),
        ("majority of 8", "6.2%", "over SFT: below it"),  # a tie of eight in every second problem
        ("best of 8, outcome verifier", "0.0%", "over SFT: below it"),
        ("best of 8, process verifier", "50.0%", "over SFT: beyond it"),
        ("weighted vote, process verifier", "50.0%", "over SFT: beyond it"),
        ("GRPO, grader", "50.0%", "over SFT: beyond it"),
        ("PPO, grader", "18.3%", "over SFT: within it"),
        ("DPO", "3.3%", "over SFT: below it"),
    ):
        assert f" {share} " in lines[name] and lines[name].endswith(verdict), lines[name]


def test_a_seed_that_did_not_run_is_named(run: Path) -> None:
    with pytest.raises(UserError, match="seed-4/lora-test/samples.jsonl does not exist"):
        table.main(str(run), [3, 4])
