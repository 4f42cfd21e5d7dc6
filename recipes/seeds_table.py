"""The closing table of a recipe of several seeds: mean accuracies with intervals, and what they show.

python recipes/seeds_table.py --run_dir runs/weak_to_strong --rows weak pro ceiling --names "weak" "stage II" "gold" \\
    --claim pro --baseline weak --floor weak --ceiling ceiling
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is on the path, the repository is not

from src import runlog  # noqa: E402
from src.command import cli  # noqa: E402
from src.data.examples import read_samples  # noqa: E402
from src.errors import UserError  # noqa: E402
from src.evaluation.metrics import wilson_interval  # noqa: E402

RESAMPLES = 4000
Floats = NDArray[np.float64]


def outcomes(run_dir: Path, row: str, seeds: Sequence[int | str]) -> Floats:
    """1 where a seed's model was right, by seed and test problem. -> [seeds, problems]."""
    files = [run_dir / f"seed-{seed}" / f"{row}-test" / "samples.jsonl" for seed in seeds]
    found = [[sample.outcome == "right" for sample in sorted(read_samples(str(file)), key=lambda sample: sample.id)]
             for file in files]
    if not found or len({len(right) for right in found}) > 1:
        raise UserError(f"{run_dir} holds {len(found)} finished seeds of {row}; expected at least one, and equal ones")
    return np.array(found, dtype=np.float64)


def resampled(right: dict[str, Floats]) -> dict[str, Floats]:
    """Mean accuracies of every row on the same draws of seeds and of problems. -> [RESAMPLES] each."""
    generator = np.random.default_rng(0)
    n_seeds, n_problems = next(iter(right.values())).shape
    means: dict[str, list[float]] = {row: [] for row in right}
    for _ in range(RESAMPLES):
        drawn = np.ix_(generator.integers(n_seeds, size=n_seeds), generator.integers(n_problems, size=n_problems))
        for row, values in right.items():
            means[row].append(values[drawn].mean())
    return {row: np.array(values) for row, values in means.items()}


def interval(draws: Floats) -> str:
    """The middle 95% of bootstrap draws, in percent."""
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{low:7.1%} .. {high:.1%}"


def accuracy_interval(right: Floats, draws: Floats) -> str:
    """The 95% interval of the mean of right [seeds, problems], in percent: of its draws, or where all are equal, so
    that draws see no spread, that of as many trials as problems."""
    if right.min() == right.max():
        low, high = wilson_interval(right[0].sum(), right.shape[1])
        return f"{low:7.1%} .. {high:.1%}"
    return interval(draws)


def main(
    run_dir: str, rows: list[str], names: list[str], claim: str, baseline: list[str], floor: str = "", ceiling: str = ""
) -> None:
    """Print accuracies on the test problems over the seeds that finished all rows, and whether the claim beats each
    baseline.

    Intervals are 95%, from drawing seeds and problems again; a difference is taken within each draw.

    run_dir: directory of the recipe, with seed-N/ROW-test
    rows: folders to show, without -test
    names: what to call them
    claim: row that should be better
    baseline: than these
    floor: row from which the recovered share of the gap is counted; default: no such column
    ceiling: row at which the gap is closed
    """
    if len(rows) != len(names):
        raise UserError(f"found {len(rows)} --rows and {len(names)} --names; give as many, a comma parts two")
    folders = sorted(Path(run_dir).glob("seed-*"))
    seeds = [folder.name.removeprefix("seed-") for folder in folders
             if all((folder / f"{row}-test" / "results.json").exists() for row in rows)]  # written when all is sampled
    right = {row: outcomes(Path(run_dir), row, seeds) for row in rows}
    draws = resampled(right)
    n_seeds, n_problems = right[rows[0]].shape
    lines = [f"{f'{n_problems} test problems, {n_seeds} seeds':34}accuracy   95% interval      "
             f"{'of the gap   95% interval' if floor else ''}"]
    for row, name in zip(rows, names, strict=True):
        line = f"{name:34}{right[row].mean():8.1%}  {accuracy_interval(right[row], draws[row]):20}"
        if floor and row not in (floor, ceiling):  # the share of the gap (Burns et al. 2023, section 3)
            share = (right[row].mean() - right[floor].mean()) / (right[ceiling].mean() - right[floor].mean())
            spread = (draws[row] - draws[floor]) / (draws[ceiling] - draws[floor])
            line += f"{f'{share:8.0%}  {interval(spread)}':28}"
        elif floor:
            line += " " * 28
        lines.append(f"{line}   seeds {' '.join(f'{mean:.1%}' for mean in right[row].mean(1))}")
    named = dict(zip(rows, names, strict=True))
    for other in baseline:
        difference, rise = draws[claim] - draws[other], right[claim].mean() - right[other].mean()
        beats = "beats" if np.quantile(difference, 0.025) > 0 else "does not beat"
        lines.append(f"{named[claim]} {beats} {named[other]}: {rise:+.1%}, 95% interval{interval(difference)}")
    runlog.table("\n".join(lines))


if __name__ == "__main__":
    cli.run(main)
