"""Pictures of what was measured: results.json, a verifier's report, a run's metrics. The door to matplotlib."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLUMNS = 3  # panels side by side in a run's picture
_MOST_PANELS = 99  # beyond that a picture is slow to draw and too tall to look at
_LARGEST = 1e300  # of the numbers that are plotted: margins around larger ones overflow


def plot_run(rows: Sequence[Mapping[str, object]], title: str, path: Path) -> None:
    """Write a PNG with a panel for every metric of a run over its steps; `eval_x` lies over `x`.

    rows: the lines of metrics.jsonl; only numbers in them are plotted, and the names of `alarms` at the steps that have
    them. Raises ValueError when there is no number.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "epoch") and isinstance(value, int | float) and abs(value) <= _LARGEST:
                curves.setdefault(name, []).append((row["step"], value))
            elif isinstance(value, float):  # a gap
                curves.setdefault(name, []).append((row["step"], math.nan))
    panels = [name for name in curves if not name.startswith("eval_") or name.removeprefix("eval_") not in curves]
    if not panels:
        raise ValueError("no metrics to draw")
    panels = panels[:_MOST_PANELS]
    alarms = [(row["step"], name) for row in rows if isinstance(row.get("alarms"), dict) for name in row["alarms"]]
    n_rows = math.ceil((len(panels) + bool(alarms)) / _COLUMNS)
    figure = Figure(figsize=(4.2 * _COLUMNS, 2.6 * n_rows), layout="constrained")
    axes_list = figure.subplots(n_rows, _COLUMNS, squeeze=False).flat
    if alarms:
        _over_steps(next(axes_list), alarms, [row["step"] for row in rows])
    for name, axes in zip(panels, axes_list, strict=False):
        for key in (name, f"eval_{name}"):
            if points := curves.get(key):
                axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else "", label=key)
        axes.set_title(name, fontsize=9, parse_math=False)
        axes.grid(alpha=0.3)
        if f"eval_{name}" in curves:
            axes.legend(fontsize=7)
    for axes in axes_list:  # what zip has left over
        axes.set_axis_off()
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def plot_results(results: dict[str, object], curves: Mapping[str, str], path: Path) -> None:
    """Write a PNG; panels that have nothing to show are left out. curves: keys of results over k, and their labels."""
    panels = []
    if results["samples_a_problem"] > 1:
        panels.append(lambda axes, results: _over_samples(axes, results, curves))
    panels += [
        lambda axes, results, kind=kind: _by_group(axes, results, kind)
        for kind in ("level", "subject")
        if results[f"by_{kind}"]
    ]
    panels = panels or [lambda axes, results: _bars(axes, ["accuracy"], [results])]
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    axes_row = figure.subplots(1, len(panels), squeeze=False)[0]
    for draw, axes in zip(panels, axes_row, strict=True):
        draw(axes, results)
        axes.set_ylim(0, 1)
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(f"{results['task']}, {results['problems']} problems", fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})  # equal numbers, equal bytes


def plot_verifier(report: dict[str, object], path: Path) -> None:
    """Write a PNG: accuracy of every way of choosing over n, and how often a score of p is right."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    over_n, reliability = figure.subplots(1, 2)
    for name, curve in report["curves"].items():
        over_n.plot(curve["n"], curve["accuracy"], marker="o", markersize=3, label=name)
        over_n.fill_between(curve["n"], curve["low"], curve["high"], alpha=0.08)
    over_n.set_xscale("log", base=2)
    over_n.set_xticks(curve["n"], [str(n) for n in curve["n"]])
    over_n.set_xlabel("samples a problem")
    over_n.set_ylabel("accuracy")
    over_n.legend(fontsize=6)
    bins = report["calibration"]
    reliability.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    reliability.plot([each["probability"] for each in bins], [each["accuracy"] for each in bins], marker="o")
    reliability.set_xlabel("score")
    reliability.set_ylabel("share right")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _over_steps(axes: Axes, alarms: Sequence[tuple[float, str]], steps: Sequence[float]) -> None:
    """A red mark for each alarm at every one of the run's steps where it rang."""
    names = list(dict.fromkeys(name for _, name in alarms))
    axes.plot([min(steps), max(steps)], [0, 0], alpha=0)  # as wide as the other panels
    axes.plot([step for step, _ in alarms], [names.index(name) for _, name in alarms], "|", color="tab:red")
    axes.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_title("alarms", fontsize=9, color="tab:red")
    axes.grid(alpha=0.3)


def _over_samples(axes: Axes, results: dict[str, object], curves: Mapping[str, str]) -> None:
    """One line with its 95% band for each way to use k samples."""
    for name, label in curves.items():
        if name in results:
            sizes, values = list(results[name]), list(results[name].values())
            low, high = zip(*results["intervals"][name].values(), strict=True)
            axes.plot(sizes, values, marker="o", markersize=3, label=label)
            axes.fill_between(sizes, low, high, alpha=0.12)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(k) for k in sizes])
    axes.set_xlabel("samples a problem")
    axes.set_ylabel("accuracy")
    axes.legend(fontsize=8)


def _by_group(axes: Axes, results: dict[str, object], kind: str) -> None:
    """A bar with its 95% interval for each level or subject."""
    groups = results[f"by_{kind}"]
    _bars(axes, [f"{name}\n{entry['problems']}" for name, entry in groups.items()], list(groups.values()))
    axes.set_xlabel(f"{kind} (number of problems below)")
    if kind == "subject":
        axes.tick_params(axis="x", labelsize=6, rotation=30)


def _bars(axes: Axes, names: list[str], entries: list[dict[str, object]]) -> None:
    heights = [entry["accuracy"] for entry in entries]
    ends = [
        (height - entry["interval"][0], entry["interval"][1] - height)
        for height, entry in zip(heights, entries, strict=True)
    ]
    axes.bar(
        range(len(names)), heights, yerr=[[max(0.0, end[side]) for end in ends] for side in (0, 1)], capsize=3
    )
    axes.set_xticks(range(len(names)), names)
