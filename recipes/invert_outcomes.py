"""Outcome rows with right and wrong exchanged: what a deliberately bad verifier is trained on.

python recipes/invert_outcomes.py --train_file outcome.json --save_file inverted.json
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is on the path, the repository is not

from src.command import cli  # noqa: E402
from src.jsonfile import write_text  # noqa: E402


def main(train_file: str, save_file: str) -> None:
    """Exchange the labels.

    train_file: rows of {"instruction", "output", "correct"}
    save_file: where the same rows go with the other label each
    """
    rows = json.loads(Path(train_file).read_text(encoding="utf-8"))
    inverted = [row | {"correct": not row["correct"]} for row in rows]
    write_text(save_file, json.dumps(inverted))


if __name__ == "__main__":
    cli.run(main)
