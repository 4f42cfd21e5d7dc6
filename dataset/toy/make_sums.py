"""Write rows of bare sums: what a strong model of the toy's recipes has read besides the corpus.

python dataset/toy/make_sums.py --save_file runs/sums.json
python dataset/toy/make_sums.py --save_file runs/judged_sums.json --judged

The base knows right and wrong results side by side; who has read right ones alone knows better, and who has judged
some looks at the result and not at how hard the sum is. No problem is among them, and the problems of every level have
numbers of the same size, so sums of that size are no hint at hard problems.
"""

import random

import generate
import make_base

from src.command import cli
from src.jsonfile import write_text

NEAR = (-20, -10, -3, -2, -1, 1, 2, 3, 10, 20)  # how far a wrong result lies off that is no typical slip


def main(save_file: str, rows: int = 3000, judged: bool = False, seed: int = 1) -> None:
    """Write rows of four to nine sums each, as instruction data without instructions or as judged steps.

    save_file: json file to write
    rows: how many
    judged: for verifier_train.py --objective process: half of the sums are wrong, and each has its label
    seed: equal seeds give equal bytes
    """
    rng = random.Random(f"{seed} {'judged' if judged else 'right'} sums")
    sums = [judged_row(rng, number) if judged else right_row(rng) for number in range(rows)]
    write_text(save_file, generate.as_text(sums))


def right_row(rng: random.Random) -> dict:
    """Right sums as one text."""
    text = " ".join(f"{generate.write(make_base.random_sum(rng))}." for _ in range(rng.randint(4, 9)))
    return {"instruction": "", "output": text}


def judged_row(rng: random.Random, number: int) -> dict:
    """Sums as steps, under a number that tells the rows apart."""
    truths = [make_base.random_sum(rng) for _ in range(rng.randint(4, 9))]
    found = [wrong(truth, rng) if rng.random() < 0.5 else truth for truth in truths]
    return {
        "instruction": str(number),
        "steps": [f"{generate.write(e)}." for e in found],
        "labels": [int(e == truth) for e, truth in zip(found, truths, strict=True)],
    }


def wrong(truth: generate.Equation, rng: random.Random) -> generate.Equation:
    """The equation with a wrong result: a typical slip, or a little off."""
    slipped = generate.slip(truth, rng)
    if slipped.operation == truth.operation and rng.random() < 0.5:  # a slip that takes + for - makes a right sum
        return slipped
    return truth._replace(result=abs(truth.result + rng.choice(NEAR)))


if __name__ == "__main__":
    cli.run(main)
