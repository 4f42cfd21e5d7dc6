"""The closing table of the quick start: what each stage was worth on the toy's test problems.

python recipes/toy_table.py --run_dir runs/toy
"""

import json
import sys
from functools import reduce
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is on the path, the repository is not

from src import runlog  # noqa: E402
from src.command import cli  # noqa: E402

# what a row is called, its results.json, the accuracy in it and its interval (as paths of keys)
ROWS = (
    ("base, greedy", "base-test", ("accuracy",), ("interval",)),
    ("SFT, greedy", "sft-test", ("accuracy",), ("interval",)),
    ("SFT, majority of 8", "sft-test-8", ("maj_at", "8"), ("intervals", "maj_at", "8")),
    ("SFT, best of 8 by the verifier", "verified", ("best_of_at", "8"), ("intervals", "best_of_at", "8")),
    ("PPO, greedy", "ppo-test", ("accuracy",), ("interval",)),
)
BASELINE = "SFT, greedy"
CLAIMS = ("SFT, best of 8 by the verifier", "PPO, greedy")  # should lie above it, interval and all


class Row(NamedTuple):
    """An accuracy and its 95% interval, as fractions, and the number of problems behind them."""

    accuracy: float
    low: float
    high: float
    problems: int


def verdict(name: str, claim: Row, baseline: Row) -> str:
    """Whether a row beats the baseline beyond the intervals: its lower end above the baseline's upper end."""
    beats, sign = ("beats", ">") if claim.low > baseline.high else ("does not beat", "<=")
    return f"{name} {beats} {BASELINE} beyond the interval: {claim.low:.1%} {sign} {baseline.high:.1%}"


def main(run_dir: str) -> None:
    """Print the table, and whether the verifier and PPO beat fine-tuning.

    run_dir: directory of the quick start
    """
    rows = {}
    for name, folder, *places in ROWS:
        results = json.loads((Path(run_dir) / folder / "results.json").read_text(encoding="utf-8"))
        accuracy, (low, high) = (reduce(dict.__getitem__, keys, results) for keys in places)
        rows[name] = Row(accuracy, low, high, results["problems"])
    lines = [f"{f'{rows[BASELINE].problems} test problems':32}accuracy   95% interval"]
    lines += [f"{name:32}{row.accuracy:8.1%}   {row.low:.1%} .. {row.high:.1%}" for name, row in rows.items()]
    lines += [verdict(name, rows[name], rows[BASELINE]) for name in CLAIMS]
    runlog.table("\n".join(lines))


if __name__ == "__main__":
    cli.run(main)
