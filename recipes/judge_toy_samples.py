"""What the verifiers of ppo_toy.sh learn from: a solver's samples, judged by their answers and step by step.

python recipes/judge_toy_samples.py --samples_file samples.jsonl --outcome_file outcome.json --steps_file steps.json

A verifier that has never seen a solution stop early lets one pass, and a policy that it rewards learns to leave steps
out. So some right samples are there a second time, cut behind one of their steps, with its result as the answer.
"""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is on the path, the repository is not

from dataset.toy.generate import read_step  # noqa: E402
from recipes.easy_to_hard_table import toy_problems, truths  # noqa: E402
from src import runlog  # noqa: E402
from src.command import cli  # noqa: E402
from src.construct.from_samples import outcome_rows  # noqa: E402
from src.construct.samples import by_problem  # noqa: E402
from src.data.encoding import STEP_END, split_steps  # noqa: E402
from src.data.examples import Sample, read_samples  # noqa: E402
from src.jsonfile import write_text  # noqa: E402


def cut_short(sample: Sample, label: str, generator: random.Random) -> Sample | None:
    """A right sample without its last steps, and wrong for that; None where no cut makes it so."""
    steps = split_steps(sample.response)[:-1]
    if len(steps) < 2:
        return None
    kept = steps[: generator.randint(1, len(steps) - 1)]
    last = read_step(kept[-1].strip())
    if last is None or str(last.result) == label:
        return None
    response = STEP_END.join([*kept, f"#### {last.result}"])
    return sample._replace(response=response, outcome="wrong")


def with_cut_samples(samples: Sequence[Sample], copies: int, seed: int) -> list[Sample]:
    """The samples, and of each problem at most so many right ones cut short."""
    generator, problems = random.Random(seed), toy_problems()
    cut = [cut_short(sample, problems[problem.instruction].label, generator)
           for problem in by_problem(samples).values() for sample in problem.right[:copies]]
    return [*samples, *(sample for sample in cut if sample is not None)]


def step_rows(samples: Sequence[Sample], seed: int) -> list[dict[str, object]]:
    """Rows `{"instruction", "steps", "labels"}` of distinct samples in the seed's order, labelled by the truth."""
    problems, rows = toy_problems(), []
    for problem in by_problem(samples).values():
        for sample in (*problem.right, *problem.wrong, *problem.unparsed):
            steps = split_steps(sample.response)
            if all(step.strip() for step in steps):
                labels = [int(true) for true in truths(problems[problem.instruction], steps)]
                rows.append({"instruction": problem.instruction, "steps": steps, "labels": labels})
    random.Random(seed).shuffle(rows)
    return rows


def main(
    samples_file: str, outcome_file: str, steps_file: str, cut_copies: int = 2, rows: int = 7000, seed: int = 1
) -> None:
    """Write training files for an outcome and a process verifier.

    samples_file: graded samples of bundled toy problems
    outcome_file: where rows of {"instruction", "output", "correct"} go
    steps_file: where rows of {"instruction", "steps", "labels"} go
    cut_copies: right samples of each problem, at most, that are there again cut short
    rows: of each file at most
    seed: seed of cuts, choice and order
    """
    samples = with_cut_samples(read_samples(samples_file), cut_copies, seed)
    for path, found in ((outcome_file, outcome_rows(samples, max_ratio=3.0, rows_per_problem=32, seed=seed)),
                        (steps_file, step_rows(samples, seed))):
        write_text(path, json.dumps(found[:rows]))
        runlog.table(f"{min(rows, len(found))} of {len(found)} judged solutions in {path}")


if __name__ == "__main__":
    cli.run(main)
