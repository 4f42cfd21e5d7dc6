"""Build training files from graded samples.

python data_build.py pairs --samples_file log/samples.jsonl --save_file pairs.json
"""

import json
from pathlib import Path

from src import cli, runlog
from src.construct.outcomes import outcome_rows, right_solutions
from src.construct.pairs import pairs_from_samples, preferred_pairs
from src.data.examples import Sample, read_samples
from src.errors import UserError


def pairs(samples_file: str, save_file: str, pairs_a_problem: int = 4, seed: int = 1, dry_run: bool = False) -> None:
    """A right against a wrong solution of the same problem, for verifier_train.py.

    samples_file: samples.jsonl with outcomes, as solver_evaluate.py leaves it
    save_file: the json file to write
    pairs_a_problem: most pairs from one problem
    seed: seed of the matching and of the order of rows
    dry_run: count the rows without writing them
    """
    cli.check_numbers(locals())
    rows = pairs_from_samples(read_graded(samples_file, save_file), pairs_a_problem, seed)
    save(rows, "pairs", "no problem has both a right and a wrong sample", samples_file, save_file, dry_run)


def outcome(
    samples_file: str, save_file: str, max_ratio: float = 3.0, rows_a_problem: int = 32, seed: int = 1,
    dry_run: bool = False,
) -> None:
    """Solutions with the word whether they are right, for verifier_train.py --objective outcome.

    samples_file: samples.jsonl with outcomes, as solver_evaluate.py leaves it
    save_file: the json file to write
    max_ratio: within a problem, at most so many times as many of one kind as of the other
    rows_a_problem: most rows from one problem
    seed: seed of the choice and of the order of rows
    dry_run: count the rows without writing them
    """
    cli.check_numbers(locals())
    rows = outcome_rows(read_graded(samples_file, save_file), max_ratio, rows_a_problem, seed)
    save(rows, "solutions", "no problem has both a right and a wrong sample", samples_file, save_file, dry_run)


def reject(
    samples_file: str, save_file: str, solutions_a_problem: int = 10, seed: int = 1, dry_run: bool = False
) -> None:
    """Right samples as instruction data for solver_train.py (rejection sampling, ReST-EM).

    samples_file: samples.jsonl with outcomes, as solver_evaluate.py leaves it
    save_file: the json file to write
    solutions_a_problem: most solutions of one problem; equal texts count once
    seed: seed of the choice
    dry_run: count the rows without writing them
    """
    cli.check_numbers(locals())
    rows = right_solutions(read_graded(samples_file, save_file), solutions_a_problem, seed)
    save(rows, "problems with solutions", "no sample is right", samples_file, save_file, dry_run)


def prefer(
    samples_file: str, save_file: str, margin: float = 1.0, pairs_a_problem: int = 3, seed: int = 1,
    dry_run: bool = False,
) -> None:
    """Pairs that differ in the verifier's score and the answer together, for preference training.

    samples_file: scored samples.jsonl with outcomes, as verifier_evaluate.py leaves it with a verifier whose scores are
        probabilities (outcome or process)
    save_file: the json file to write
    margin: score (0 to 1) plus 1 for a right answer must differ by more than this
    pairs_a_problem: most pairs from one problem
    seed: seed of the choice and of the order of rows
    dry_run: count the rows without writing them
    """
    cli.check_numbers(locals())
    rows = preferred_pairs(read_graded(samples_file, save_file), margin, pairs_a_problem, seed)
    save(rows, "pairs", f"no two samples of a problem differ by more than {margin}", samples_file, save_file, dry_run)


def read_graded(samples_file: str, save_file: str) -> list[Sample]:
    """The samples of a graded file. Raises UserError, also when the rows could not be saved afterwards."""
    if Path(save_file).is_dir():
        raise UserError(f"--save_file {save_file} is a directory; expected the name of a json file")
    samples = read_samples(samples_file)
    if not any(sample.outcome for sample in samples):
        raise UserError(f"{samples_file} has no outcomes; grade it first with solver_evaluate.py --samples_file")
    return samples


def save(
    rows: list[dict[str, object]], what: str, why_none: str, samples_file: str, save_file: str, dry_run: bool
) -> None:
    """Write a json array, whole or not at all, and say what it holds. Raises UserError if there is nothing to write."""
    if not rows:
        raise UserError(f"{samples_file} gives no {what}: {why_none}; sample more a problem or at a higher temperature")
    target = Path(save_file)
    if not dry_run:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(target)
    problems = len({row["instruction"] for row in rows})
    runlog.logger().info("%d %s from %d problems%s", len(rows), what, problems, "" if dry_run else f" to {save_file}")


COMMANDS = {"pairs": pairs, "outcome": outcome, "reject": reject, "prefer": prefer}

if __name__ == "__main__":
    cli.run(COMMANDS)
