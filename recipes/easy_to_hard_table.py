"""The closing tables of easy_to_hard.sh: what verifiers that learnt from easy problems are worth on hard ones.

python recipes/easy_to_hard_table.py --run_dir runs/easy_to_hard --seeds 1,2,3

Differences come with 95% intervals of a paired bootstrap: each seed is a solver and verifiers of its own on the same
problems, a problem's difference is its mean over the seeds, and whole problems are drawn again 10,000 times.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, the repository is not

from dataset.toy.generate import Problem, check_steps  # noqa: E402
from src import runlog  # noqa: E402
from src.command import cli  # noqa: E402
from src.construct.solver import grader_of  # noqa: E402
from src.data.encoding import split_steps  # noqa: E402
from src.data.examples import Sample, read_instruction_rows, read_samples  # noqa: E402
from src.evaluation.metrics import AGGREGATIONS, answer_classes, auc, best_of_n, vote  # noqa: E402

# A verifier -> what makes one score of its steps for voting and for best-of-n: prod and min are the paper's choice
# (section 3.3), an outcome verifier judges the whole solution at its end.
VERIFIERS = {"process": ("prod", "min"), "outcome": ("last", "last"), "mixed": ("prod", "min")}
TOY = ROOT / "dataset" / "toy"
PAPER = """Sun et al. 2024, Easy-to-Hard Generalization (arXiv 2403.09472v2), 7b models, PRM800K, of 1024 samples:
MATH500 levels 4-5  majority 19.2%   weighted vote: process 22.8%, outcome 21.2%, mixed 24.1%
MATH500, all        majority 37.1%   weighted vote: process 40.5%, outcome 40.0%, mixed 42.7%
                    SFT, greedy 19.8%   best of n: process 31.6%, outcome 32.8%, mixed 36.7%
step accuracy       process 80.4%, outcome 64.3%, mixed 79.8%"""


def by_problem(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The samples of each problem, in the order of the file."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.id, []).append(sample)
    return list(groups.values())


def ways_to_choose(
    folder: Path, sampled: str, scored: str, verifiers: Mapping[str, tuple[str, str]]
) -> dict[str, np.ndarray]:
    """The chance that one of a problem's samples is right: any, by majority, by a verifier's weighted vote and best.

    sampled, scored: places in the folder, scored with {} for a verifier's name. verifiers: as VERIFIERS. -> [P] each.
    """
    rules = json.loads((folder / sampled / "results.json").read_text(encoding="utf-8"))["rules"]
    with grader_of(rules) as grader:

        def read(place: str) -> tuple[list[list[Sample]], np.ndarray, list[list[int | None]]]:
            groups = by_problem(read_samples(str(folder / place / "samples.jsonl")))
            right = np.array([[sample.outcome == "right" for sample in group] for group in groups])
            return groups, right, [answer_classes([sample.values.get("answer") for sample in group], grader.equal)
                                   for group in groups]

        _, right, classes = read(sampled)
        n = right.shape[1]
        ways = {"pass": right.any(1).astype(float), "majority": vote(right, classes, np.ones(right.shape), n)}
        for name, aggregations in verifiers.items():
            groups, right, classes = read(scored.format(name))
            weights, scores = (np.array([[AGGREGATIONS[by](sample.values["step_scores"]) for sample in group]
                                         for group in groups]) for by in aggregations)
            ways[f"weighted vote, {name}"] = vote(right, classes, weights, n)
            ways[f"best of n, {name}"] = best_of_n(right, scores, n)
    return ways


def first_right(folder: Path) -> np.ndarray:
    """1 where the first sample of a problem is right. -> [P]."""
    return np.array([group[0].outcome == "right" for group in by_problem(read_samples(str(folder / "samples.jsonl")))],
                    dtype=float)


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """The 95% interval of a mean over problems, which are drawn again. [P] -> low, high."""
    places = np.random.default_rng(1).integers(len(values), size=(10_000, len(values)))
    low, high = np.quantile(values[places].mean(1), (0.025, 0.975))
    return float(low), float(high)


def choices_table(seeds: Sequence[Mapping[str, np.ndarray]]) -> str:
    """Accuracy of every way, for each seed and in the mean, with its difference from what it should beat."""
    mean = {name: np.mean([seed[name] for seed in seeds], axis=0) for name in seeds[0]}
    heads = "".join(f"   seed {number}" for number in range(1, len(seeds) + 1))
    lines = [f"{len(mean['greedy'])} hard problems{'':11}{heads}     mean   difference (95% interval)"]
    for name, values in mean.items():
        baseline = {"weighted vote": "majority", "best of n": "greedy"}.get(name.split(",")[0])
        cells = "".join(f"{seed[name].mean():9.1%}" for seed in seeds)
        gain = ""
        if baseline:
            gained = values - mean[baseline]
            low, high = bootstrap(gained)
            verdict = "beats it" if low > 0 else "does not beat it"
            gain = f"   {gained.mean():+.1%} ({low:+.1%} .. {high:+.1%}) from {baseline}: {verdict}"
        lines.append(f"{name:27}{cells}{values.mean():9.1%}{gain}")
    return "\n".join(lines)


def toy_problems() -> dict[str, Problem]:
    """The bundled problems by their text, with the true steps."""
    rows = [row for name in ("train", "test") for row in read_instruction_rows(str(TOY / f"{name}.json"))]
    return {row["instruction"]: Problem(row["instruction"], split_steps(row["output"][0])[:-1], row["label"],
                                        row["level"]) for row in rows}


def agreement(pairs: Sequence[tuple[float, bool]]) -> str:
    """How often a label or score of at least one half says what is true, on right and on wrong steps, and the AUC."""
    said, true = np.array([score for score, _ in pairs]), np.array([truth for _, truth in pairs])
    agree = (said >= 0.5) == true
    return (f"{agree.mean():6.1%} of {len(agree)} (right steps {agree[true].mean():.1%}, wrong ones "
            f"{agree[~true].mean():.1%}; AUC {auc(said, true):.3f})")


def truths(problem: Problem, steps: Sequence[str]) -> list[bool]:
    """Whether each step is right by the domain's exact truth."""
    return check_steps(problem, "\n\n".join(steps))


def toy_truth_table(run: Path, seeds: Sequence[int]) -> str:
    """Rollout labels and verifiers' step scores against the exact truth, over all seeds."""
    problems, folders = toy_problems(), [run / f"seed-{seed}" for seed in seeds]
    rows = (row for folder in folders for row in read_instruction_rows(str(folder / "steps.json")))
    labels = [(label, true) for row in rows for label, true in zip(
        row["labels"], truths(problems[row["instruction"]], row["steps"]), strict=True) if label is not None]
    lines = [f"labels by rollouts, easy problems {agreement(labels)}"]
    for name in VERIFIERS:
        samples = (sample for folder in folders
                   for sample in read_samples(str(folder / f"{name}-hard" / "samples.jsonl")))
        pairs = [pair for sample in samples for pair in zip(
            sample.values["step_scores"], truths(problems[sample.prompt], split_steps(sample.response)), strict=True)]
        lines.append(f"{name:8} verifier, hard problems   {agreement(pairs)}")
    return "\n".join(lines)


def main(run_dir: str, seeds: list[int], toy: bool = True) -> None:
    """Print the tables, the paper's last.

    run_dir: directory of the recipe
    seeds: the seeds it ran with
    toy: whether the problems are the bundled ones, of whose steps the exact truth is known
    """
    run = Path(run_dir)
    folders = [run / f"seed-{seed}" for seed in seeds]
    tables = [choices_table([{"greedy": first_right(folder / "greedy")}
                             | ways_to_choose(folder, "hard", "{}-hard", VERIFIERS) for folder in folders])]
    if toy:
        tables.append("steps said right or wrong as they truly are\n" + toy_truth_table(run, seeds))
    runlog.table("\n\n".join([*tables, PAPER]))


if __name__ == "__main__":
    cli.run(main)
