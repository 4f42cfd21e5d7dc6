"""Build training files from graded samples.

python data_build.py --objective pairs --samples_file log/samples.jsonl --save_file pairs.json
"""

import json
from pathlib import Path
from typing import Literal

from src import cli, runlog
from src.construct import pairs_from_samples
from src.data.examples import read_samples
from src.errors import UserError


def main(
    samples_file: str, save_file: str, objective: Literal["pairs"] = "pairs", pairs_a_problem: int = 4, seed: int = 1,
    dry_run: bool = False,
) -> None:
    """Write a training file.

    samples_file: samples.jsonl with outcomes, as solver_evaluate.py leaves it
    save_file: the json file to write
    objective: pairs = a right against a wrong solution of the same problem, for verifier_train.py
    pairs_a_problem: most pairs from one problem
    seed: seed of the matching and of the order of rows
    dry_run: count the rows without writing them
    """
    cli.check_numbers(locals())
    target = Path(save_file)
    if target.is_dir():
        raise UserError(f"--save_file {save_file} is a directory; expected the name of a json file")
    samples = read_samples(samples_file)
    if not any(sample.outcome for sample in samples):
        raise UserError(f"{samples_file} has no outcomes; grade it first with solver_evaluate.py --samples_file")
    rows = pairs_from_samples(samples, pairs_a_problem, seed)
    if not rows:
        raise UserError(f"{samples_file} gives no pair: no problem has both a right and a wrong sample; "
                        f"sample more a problem or at a higher temperature")
    if not dry_run:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(target)
    problems = len({row["instruction"] for row in rows})
    runlog.logger().info("%d pairs from %d problems%s", len(rows), problems, "" if dry_run else f" to {save_file}")


if __name__ == "__main__":
    cli.run(main)
