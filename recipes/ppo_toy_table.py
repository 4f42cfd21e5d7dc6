"""The closing table of ppo_toy.sh: what each way of reinforcement learning was worth, and who noticed a bad verifier.

python recipes/ppo_toy_table.py --run_dir runs/ppo_toy --seeds 1,2,3
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is on the path, the repository is not

from recipes.seeds_table import Floats, outcomes, resampled  # noqa: E402
from src import runlog  # noqa: E402
from src.command import cli  # noqa: E402
from src.training.monitor import WINDOW, hacked  # noqa: E402

BAD = "ppo-bad"
ARMS = {"ppo-rule": "PPO, grader", "ppo-outcome": "PPO, outcome verifier", "ppo-process": "PPO, process verifier",
        "grpo": "GRPO, grader", BAD: "PPO, inverted verifier"}
ENDS = 6  # buffers at either end of a run whose means are compared


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def gain(before: Floats, after: Floats) -> tuple[float, float, float]:
    """By how much accuracy rose, and the 95% interval of it over draws of seeds and problems. [seeds, problems]."""
    draws = resampled({"before": before, "after": after})
    low, high = np.quantile(draws["after"] - draws["before"], (0.025, 0.975))
    return float((after - before).mean()), float(low), float(high)


def alarm(rows: list[dict[str, float]]) -> int | None:
    """The buffer at which the panel says that the policy has found the verifier's weakness."""
    pairs = [(row["reward_verifier"], row["graded_right"]) for row in rows if "reward_verifier" in row]
    ends = range(WINDOW, len(pairs) + 1)
    return next((end for end in ends if hacked(pairs[end - WINDOW : end])), None)


def watched(logs: Sequence[list[dict[str, float]]]) -> list[str]:
    """What the verifier gave and the grader said at both ends of the runs, and whether the panel's alarm rang."""

    def ends(key: str) -> tuple[float, float]:
        runs = [[row[key] for row in rows if key in row] for rows in logs]  # step 0 has a held-out accuracy alone
        means = [[np.mean(part) for part in (values[:ENDS], values[-ENDS:])] for values in runs]
        return tuple(np.mean(means, axis=0))

    (reward, reward_then), (right, right_then) = ends("reward_verifier"), ends("graded_right")
    rung = [f"at buffer {buffer}" for buffer in map(alarm, logs) if buffer]
    return [f"    first to last {ENDS} buffers: verifier {reward:+.3f} to {reward_then:+.3f}, right {right:.1%} to "
            f"{right_then:.1%}",
            f"    alarm for a hacked verifier: {', '.join(rung) or 'none'}"]


def judging(folders: Sequence[Path]) -> list[str]:
    """The verifiers' AUC on samples of problems that were held back, by seed."""
    lines = []
    for name in ("outcome", "process"):
        files = [folder / f"{name}-held" / "results.json" for folder in folders]
        found = [json.loads(file.read_text(encoding="utf-8"))["verifier"]["auc"] for file in files if file.exists()]
        if found:
            shown = " ".join("none" if auc is None else f"{auc:.3f}" for auc in found)  # of one kind of sample
            lines.append(f"{name} verifier, AUC on problems held back: {shown}")
    return lines


def main(run_dir: str, seeds: list[int]) -> None:
    """Print the table and draw the curves, means over the seeds.

    run_dir: directory of ppo_toy.sh
    seeds: the seeds that it ran; the first one met the bad verifier
    """
    folders = [Path(run_dir) / f"seed-{seed}" for seed in seeds]
    before = outcomes(Path(run_dir), "sft", seeds)
    lines = [f"{f'{before.shape[1]} test problems, seeds {seeds}':36}accuracy   gain over SFT, 95% interval",
             f"{'SFT':36}{before.mean():8.1%}"]
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {"held-out accuracy": {}, "reward": {}}
    for arm, name in ARMS.items():
        ran = folders[:1] if arm == BAD else folders
        if not all((folder / f"{arm}-test" / "results.json").exists() for folder in ran):
            lines.append(f"{name:36}not finished")
            continue
        after = outcomes(Path(run_dir), arm, seeds[: len(ran)])
        rise, low, high = gain(before[: len(ran)], after)
        beyond = "beyond it" if low > 0 else "below it" if high < 0 else "within it"
        lines.append(f"{name:36}{after.mean():8.1%}   {rise:+.1%} [{low:+.1%}, {high:+.1%}] {beyond}")
        logs = [metrics(folder / arm / "actor") for folder in ran]
        lines += watched(logs) if "verifier" in name else []
        for title, key in (("held-out accuracy", "eval_accuracy"), ("reward", "reward")):
            runs = [[(row["step"], row[key]) for row in rows if key in row] for rows in logs]
            means = np.mean(runs, axis=0)  # over seeds, which measure at the same buffers
            curves[title][name] = [(float(step), float(value)) for step, value in means]
    picture = Path(run_dir) / "curves.png"
    plot_curves(curves, "buffer", picture)
    runlog.table("\n".join([*lines, *judging(folders), f"curves in {picture}"]))


def plot_curves(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], x_label: str, path: Path) -> None:
    """Write a PNG with a panel for each title and in it a line of (x, y) points for each label."""
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    axes_row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, curves) in zip(axes_row, panels.items(), strict=True):
        for label, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        axes.set_title(title)
        axes.set_xlabel(x_label)
        axes.grid(alpha=0.3)
    axes_row[-1].legend(fontsize=6)
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    cli.run(main)
