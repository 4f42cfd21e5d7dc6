"""The quick start's closing table: its verdicts follow from the intervals, not from the accuracies."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "toy_table.py"
SFT = {"accuracy": 0.5, "interval": [0.45, 0.55], "problems": 400}


def write_results(run_dir: Path, best_of_interval: list[float]) -> None:
    """The results of a run whose best of 8 is at 60% with this interval and whose PPO is as good as SFT."""
    majority = {"maj_at": {"8": 0.5}, "intervals": {"maj_at": {"8": [0.45, 0.55]}}, "problems": 400}
    best_of = {
        "best_of_at": {"8": 0.6},
        "intervals": {"best_of_at": {"8": best_of_interval}},
        "problems": 400,
    }
    for folder, results in (
        ("base-test", SFT), ("sft-test", SFT), ("sft-test-8", majority), ("verified", best_of), ("ppo-test", SFT)
    ):
        (run_dir / folder).mkdir()
        (run_dir / folder / "results.json").write_text(json.dumps(results))


@pytest.mark.parametrize(
    ("low", "verdict"), [(0.56, "beats"), (0.55, "does not beat"), (0.5, "does not beat")]
)
def test_only_an_interval_above_the_other_beats_it(tmp_path, capfd, low, verdict):
    write_results(tmp_path, [low, 0.65])
    runpy.run_path(str(SCRIPT))["main"](str(tmp_path))
    text = capfd.readouterr().out
    assert f"SFT, best of 8 by the verifier {verdict} SFT, greedy beyond the interval" in text
    assert "PPO, greedy does not beat SFT, greedy beyond the interval" in text
    assert "60.0%" in text and "400 test problems" in text
