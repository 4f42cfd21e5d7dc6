"""Judged samples to training files."""

import random
from collections import defaultdict
from collections.abc import Sequence

from src.data.examples import Sample
from src.errors import UserError


def pairs_from_samples(samples: Sequence[Sample], pairs_a_problem: int, seed: int) -> list[dict[str, object]]:
    """Right against wrong solutions of the same problem: rows `{"instruction", "chosen", "rejected"}`.

    Each row holds one text a side. Equal texts count once; the i-th of the shuffled right ones meets the i-th of the
    wrong ones, the shorter list repeating, at most pairs_a_problem times. Wrong answers come before missing ones
    (unparsed), which any verifier tells apart; each kind is shuffled. Samples without a verdict on their text (timeout,
    error) are left out. Rows come in a shuffled order. Raises UserError for a sample without its prompt.
    """
    problems: dict[str, dict[str, list[str]]] = defaultdict(lambda: {"right": [], "wrong": [], "unparsed": []})
    instructions: dict[str, str] = {}
    for sample in samples:
        if "prompt" not in sample.values:
            raise UserError(
                f"sample {sample.id!r}/{sample.sample} has no key 'prompt'; "
                f"grade the file with solver_evaluate.py --samples_file, which adds it"
            )
        if sample.outcome in ("right", "wrong", "unparsed") and sample.response:
            texts = problems[sample.id][sample.outcome]
            if sample.response not in texts:
                texts.append(sample.response)
            instructions[sample.id] = sample.prompt
    generator = random.Random(seed)
    rows = []
    for name, texts in problems.items():
        for kind in texts.values():
            generator.shuffle(kind)
        right, wrong = texts["right"], texts["wrong"] + texts["unparsed"]
        if not right or not wrong:
            continue
        rows += [
            {
                "instruction": instructions[name],
                "chosen": right[i % len(right)],
                "rejected": wrong[i % len(wrong)],
            }
            for i in range(min(pairs_a_problem, max(len(right), len(wrong))))
        ]
    generator.shuffle(rows)
    return rows
