"""Write rows of bare sums, all right: what the strong model of recipes/weak_to_strong.sh has read besides the corpus.

python dataset/toy/make_sums.py --save_file runs/sums.json

The base knows right and wrong results side by side; who has read these knows better, without having seen a problem.
"""

import random
from pathlib import Path

import generate
import make_base

from src import cli


def main(save_file: str, rows: int = 3000, seed: int = 1) -> None:
    """Write instruction data without instructions, four to nine sums a row.

    save_file: json file to write
    rows: how many
    seed: equal seeds give equal bytes
    """
    rng = random.Random(f"{seed} right sums")
    texts = [
        " ".join(f"{generate.write(make_base.random_sum(rng))}." for _ in range(rng.randint(4, 9)))
        for _ in range(rows)
    ]
    sums = [{"instruction": "", "output": text} for text in texts]
    Path(save_file).write_text(generate.as_text(sums), encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
