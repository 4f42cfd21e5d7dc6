"""Pairs of solutions to the same problem, one to be preferred."""

import random
from collections.abc import Sequence

from src.construct.problems import by_problem
from src.data.examples import Sample
from src.errors import UserError

Row = dict[str, object]


def pairs_from_samples(samples: Sequence[Sample], pairs_a_problem: int, seed: int) -> list[Row]:
    """Right against wrong solutions of the same problem: rows `{"instruction", "chosen", "rejected"}`.

    Each row holds one text a side. The i-th of the shuffled right ones meets the i-th of the wrong ones, the shorter
    list repeating, at most pairs_a_problem times. Wrong answers come before missing ones (unparsed), which any verifier
    tells apart; each kind is shuffled. Rows come in a shuffled order. Raises UserError for a sample without its prompt.
    """
    generator = random.Random(seed)
    rows: list[Row] = []
    for problem in by_problem(samples).values():
        for kind in (problem.right, problem.wrong, problem.unparsed):
            generator.shuffle(kind)
        right, wrong = problem.right, problem.wrong + problem.unparsed
        if right and wrong:
            rows += [
                _pair(problem.instruction, right[i % len(right)], wrong[i % len(wrong)])
                for i in range(min(pairs_a_problem, max(len(right), len(wrong))))
            ]
    generator.shuffle(rows)
    return rows


def preferred_pairs(samples: Sequence[Sample], margin: float, pairs_a_problem: int, seed: int) -> list[Row]:
    """Pairs whose worth differs by more than `margin`, worth being the verifier's score in [0, 1] plus 1 for a right
    answer (Sun et al. 2024, Easy-to-Hard, iterative DPO: margin 1, at most 3 a problem).

    The pairs of a problem are drawn from all that qualify. Raises UserError for a sample without such a score.
    """
    generator = random.Random(seed)
    rows: list[Row] = []
    for problem in by_problem(samples).values():
        pool = [(_worth(sample), sample) for sample in (*problem.right, *problem.wrong, *problem.unparsed)]
        fitting = [(a, b) for worth_a, a in pool for worth_b, b in pool if worth_a - worth_b > margin]
        drawn = generator.sample(fitting, min(pairs_a_problem, len(fitting)))
        rows += [_pair(problem.instruction, chosen, rejected) for chosen, rejected in drawn]
    generator.shuffle(rows)
    return rows


def mixed_pairs(
    ordinary: Sequence[Row], branched: Sequence[Row], share: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """All step-controlled pairs with so many ordinary ones that these are `share` of the mix, and a control: as many
    ordinary pairs alone as the mix has, those of the mix among them (Lu et al. 2024, section 4.1, "data-equal").

    Which ordinary pairs, and both orders, follow from the seed. Raises UserError when there are too few.
    """
    total = round(len(branched) / (1 - share)) if share < 1 else 0
    if not len(branched) < total <= len(ordinary):
        raise UserError(
            f"{len(branched)} step-controlled pairs and a --share {share} of ordinary ones make {total} rows, and the "
            f"control needs as many ordinary pairs; found {len(ordinary)}: sample more, or take another share"
        )
    generator = random.Random(seed)
    control = generator.sample(list(ordinary), total)
    mix = [*control[: total - len(branched)], *branched]
    generator.shuffle(mix)
    generator.shuffle(control)
    return mix, control


def _pair(instruction: str, chosen: Sample, rejected: Sample) -> Row:
    return {"instruction": instruction, "chosen": chosen.response, "rejected": rejected.response}


def _worth(sample: Sample) -> float:
    score = sample.values.get("score")
    if not isinstance(score, int | float) or not 0 <= score <= 1:
        raise UserError(
            f"sample {sample.id!r}/{sample.sample} has the score {score!r}; expected a probability: score the "
            f"samples with verifier_evaluate.py and an outcome or process verifier"
        )
    return score + (sample.outcome == "right")
