"""Solutions with the word whether they are right, and right solutions to learn from."""

import random
from collections.abc import Sequence

from src.construct.problems import by_problem
from src.data.examples import Sample

Row = dict[str, object]


def outcome_rows(samples: Sequence[Sample], max_ratio: float, rows_a_problem: int, seed: int) -> list[Row]:
    """Rows `{"instruction", "output", "correct"}` to train an outcome verifier (Sun et al. 2024, section 4.1).

    In each problem there are at most max_ratio times as many of one kind as of the other, so a problem without
    both kinds gives none: from it a verifier would learn the problem, not the solution. At most rows_a_problem rows;
    which ones, and their order, follow from the seed.
    """
    generator = random.Random(seed)
    rows: list[Row] = []
    for problem in by_problem(samples).values():
        right, wrong = problem.right, problem.wrong + problem.unparsed
        fewer = min(len(right), len(wrong))
        for kind in (right, wrong):
            generator.shuffle(kind)
            del kind[int(max_ratio * fewer) :]
        kept = _interleaved(right, wrong)[:rows_a_problem]
        rows += [
            {
                "instruction": problem.instruction,
                "output": sample.response,
                "correct": sample.outcome == "right",
            }
            for sample in kept
        ]
    generator.shuffle(rows)
    return rows


def _interleaved(first: Sequence[Sample], second: Sequence[Sample]) -> list[Sample]:
    """The two lists in turns, so that any prefix is as balanced as can be; what the longer has left follows."""
    both = min(len(first), len(second))
    turns = [sample for pair in zip(first, second, strict=False) for sample in pair]
    return turns + [*first[both:], *second[both:]]


def right_solutions(samples: Sequence[Sample], solutions_a_problem: int, seed: int) -> list[Row]:
    """Instruction data of right samples (rejection sampling; the E-step of ReST-EM, Singh et al. 2023, section 4):
    each problem once, with at most solutions_a_problem different solutions."""
    generator = random.Random(seed)
    rows: list[Row] = []
    for problem in by_problem(samples).values():
        picked = generator.sample(problem.right, min(solutions_a_problem, len(problem.right)))
        if picked:
            rows.append(
                {"instruction": problem.instruction, "output": [sample.response for sample in picked]}
            )
    return rows
