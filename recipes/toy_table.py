"""The closing table of the quick start: what each stage was worth on the toy's test problems.

python recipes/toy_table.py --run_dir runs/toy
"""

import json
import sys
from functools import reduce
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is on the path, the repository is not

from src import cli, runlog  # noqa: E402

# what a row is called, its results.json, the accuracy in it and its interval (as paths of keys)
ROWS = (
    ("base, greedy", "base-test", ("accuracy",), ("interval",)),
    ("SFT, greedy", "sft-test", ("accuracy",), ("interval",)),
    ("SFT, majority of 8", "sft-test-8", ("maj_at", "8"), ("intervals", "maj_at", "8")),
    ("SFT, best of 8 by the verifier", "verified", ("best_of_at", "8"), ("intervals", "best_of_at", "8")),
    ("PPO, greedy", "ppo-test", ("accuracy",), ("interval",)),
)


def main(run_dir: str) -> None:
    """Print the table.

    run_dir: directory of the quick start
    """
    lines = [f"{'':32}accuracy   95% interval"]
    for name, folder, accuracy_at, interval_at in ROWS:
        results = json.loads((Path(run_dir) / folder / "results.json").read_text(encoding="utf-8"))
        accuracy, (low, high) = (reduce(dict.__getitem__, keys, results) for keys in (accuracy_at, interval_at))
        lines.append(f"{name:32}{accuracy:8.1%}   {low:.1%} .. {high:.1%}")
    lines.append(f"{results['problems']} test problems")
    runlog.table("\n".join(lines))


if __name__ == "__main__":
    cli.run(main)
