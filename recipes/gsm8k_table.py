"""The closing table and picture of gsm8k.sh: what each stage made of a pretrained model on GSM8K's test problems.

python recipes/gsm8k_table.py --run_dir runs/gsm8k --seeds 1,2
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is on the path, the repository is not

from recipes.easy_to_hard_table import first_right, ways_to_choose  # noqa: E402
from recipes.ppo_toy_table import gain, metrics, plot_curves  # noqa: E402
from recipes.seeds_table import Floats, accuracy_interval, resampled  # noqa: E402
from src import runlog  # noqa: E402
from src.command import cli  # noqa: E402

# A stage, its samples of the test problems, and the stage that it should be better than.
GREEDY = {"zero-shot": ("zero-shot", ""), "8 demonstrations": ("few-shot", ""), "LoRA": ("lora-test", "zero-shot"),
          "SFT": ("sft-test", "zero-shot")}
REINFORCED = {"GRPO, grader": ("grpo-test", "SFT"), "PPO, grader": ("ppo-test", "SFT"), "DPO": ("dpo-test", "SFT")}
# A verifier -> what makes one score of its steps' scores, as a weight of votes and for best-of-n.
VERIFIERS = {"outcome": ("last", "last"), "process": ("min", "min")}


def choices(folder: Path) -> dict[str, tuple[Floats, str]]:
    """What one of eight samples was right by each way of choosing it, and the stage it should be better than."""
    ways = ways_to_choose(folder, "eight-test", "{}-test", VERIFIERS)
    shown = {"majority of 8": "majority"}
    for name in VERIFIERS:
        shown[f"best of 8, {name} verifier"] = f"best of n, {name}"
        shown[f"weighted vote, {name} verifier"] = f"weighted vote, {name}"
    return {name: (ways[way], "SFT") for name, way in shown.items()}


def stages(run: Path, seed: int) -> dict[str, tuple[Floats, str]]:
    """Every stage of a seed: whether it was right, by test problem, and the stage it should be better than."""

    def greedy(rows: dict[str, tuple[str, str]]) -> dict[str, tuple[Floats, str]]:
        places = {name: [run / folder, run / f"seed-{seed}" / folder] for name, (folder, _) in rows.items()}
        return {name: (first_right(next(filter(Path.is_dir, found), found[-1])), rows[name][1])
                for name, found in places.items()}

    return greedy(GREEDY) | choices(run / f"seed-{seed}") | greedy(REINFORCED)


def table(seeds: Sequence[dict[str, tuple[Floats, str]]]) -> str:
    """Accuracies with 95% intervals over draws of seeds and problems, and the gain over the stage before."""
    right = {name: np.stack([seed[name][0] for seed in seeds]) for name in seeds[0]}
    draws = resampled(right)
    problems = f"{next(iter(right.values())).shape[1]} test problems, {len(seeds)} seeds"
    lines = [f"{problems:34}accuracy   95% interval          gain, 95% interval"]
    for name, values in right.items():
        line = f"{name:34}{values.mean():8.1%}  {accuracy_interval(values, draws[name]):20}"
        if before := seeds[0][name][1]:
            rise, low, high = gain(right[before], values)
            word = "beyond it" if low > 0 else "below it" if high < 0 else "within it"
            line += f"   {rise:+.1%} [{low:+.1%}, {high:+.1%}] over {before}: {word}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def draw(run: Path, seeds: Sequence[int], path: Path) -> None:
    """Draw accuracy over the number of samples, and what the grader said while GRPO and PPO learned, by seed."""
    by_samples: dict[str, list[tuple[float, float]]] = {}
    while_learning: dict[str, list[tuple[float, float]]] = {}
    for seed in seeds:
        folder, end = run / f"seed-{seed}", f", seed {seed}" if len(seeds) > 1 else ""
        for source, key, label in (("eight-test", "pass_at", "any right"), ("eight-test", "maj_at", "majority"),
                                   ("outcome-test", "best_of_at", "best by outcome"),
                                   ("process-test", "best_of_at", "best by process")):
            found = json.loads((folder / source / "results.json").read_text(encoding="utf-8"))[key]
            by_samples[label + end] = [(int(k), share) for k, share in found.items()]
        for name in ("grpo", "ppo"):
            rows = [row for row in metrics(folder / name) if "graded_right" in row]
            while_learning[name.upper() + end] = [(row["step"], row["graded_right"]) for row in rows]
    panels = {"accuracy by samples of a problem": by_samples, "right in training by buffer": while_learning}
    plot_curves(panels, "", path)


def main(run_dir: str, seeds: list[int]) -> None:
    """Print the table and draw the picture.

    run_dir: directory of gsm8k.sh
    seeds: the seeds that it ran
    """
    run = Path(run_dir)
    text = table([stages(run, seed) for seed in seeds])
    picture = run / "gsm8k.png"
    draw(run, seeds, picture)
    runlog.table(f"{text}\ncurves in {picture}")


if __name__ == "__main__":
    cli.run(main)
