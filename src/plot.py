"""Pictures of what was measured: results.json, a verifier's report, a run's metrics. The door to matplotlib."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

_COLUMNS = 3  # panels side by side in a run's picture
_MOST_PANELS = 10
_SMOOTHED = 40  # steps from which on a curve is drawn with its running mean
_LARGEST = 1e300  # of the numbers that are plotted: margins around larger ones overflow


class Panel(NamedTuple):
    """Curves that belong together. names: pattern of the metrics; unit: of their values divided by `scale`; noisy:
    whether long ones are drawn with their running mean."""

    title: str
    unit: str
    names: str
    scale: float = 1.0
    noisy: bool = True


PANELS = [  # the most telling first: a run's picture has those of them that it has metrics for
    Panel("accuracy", "share", r"(eval_|held_out_)?(accuracy|pass|majority)|accuracy_on_\w+|graded_right"),
    Panel("reward", "a response", r"reward(_(?!std$|length)\w+)?"),
    Panel("loss", "nats", r"(eval_|held_out_|policy_|kl_)?loss"),
    Panel("chosen ahead of rejected", "nats", r"(eval_)?margin|(eval_)?reference_point"),
    Panel("log-probs", "nats a token", r"(eval_)?(chosen|rejected|right|wrong)_logprob"),
    Panel("KL to the reference", "nats a token", r"kl|kl_k3"),
    Panel("entropy", "nats a token", r"entropy"),
    Panel("clipped", "share", r"clipped_low|clipped_high|value_clipped"),
    Panel("critic", "", r"value_loss|explained_variance"),
    Panel("response length", "tokens", r"response_tokens(_max)?"),
    Panel("responses", "share", r"truncated_share|kept_share|dead_groups|graded_(unparsed|timeout|error)"),
    Panel("gradient norm", "", r"(critic_)?grad_norm"),
    Panel("verifier's scores", "", r"score_(mean|std)"),
    Panel("learning rate", "", r"(critic_)?lr", noisy=False),
    Panel("speed", "tokens a second", r"tokens_per_second|supervised_per_second"),
    Panel("peak memory of a rank", "GiB", r"peak_memory", 2.0**30, noisy=False),
]
_UNTOLD = (r"seconds.*|\w+_seconds|epoch|step|(supervised_)?tokens|pairs|judged|samples|responses|mfu|padding_share|"
           r"reward_\w+|kl_\w+|\w*ratio_deviation\w*|sampler_mismatch\w*|graded_wrong")


def plot_run(rows: Sequence[Mapping[str, object]], title: str, path: Path) -> None:
    """Write a PNG of at most ten panels of a run's metrics over its steps, those of PANELS first.

    rows: the lines of metrics.jsonl; only numbers in them are plotted, and the names of `alarms` at the steps that have
    them. Raises ValueError when there is no number.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "epoch") and isinstance(value, int | float) and abs(value) <= _LARGEST:
                curves.setdefault(name, []).append((row["step"], value))
            elif value is None or isinstance(value, float):  # a gap
                curves.setdefault(name, []).append((row["step"], math.nan))
    if not curves:
        raise ValueError("no metrics to draw")
    panels = [(panel, [name for name in curves if re.fullmatch(panel.names, name)]) for panel in PANELS]
    known = {name for _, names in panels for name in names}
    others = [name for name in curves if name not in known and not re.fullmatch(_UNTOLD, name)]
    panels = [(panel, names) for panel, names in panels if names]
    panels += [(Panel(name, "", ""), [name]) for name in (others if known or others else curves)]
    del panels[_MOST_PANELS:]
    alarms = [(row["step"], name) for row in rows if isinstance(row.get("alarms"), dict) for name in row["alarms"]]
    n_rows = math.ceil((len(panels) + bool(alarms)) / _COLUMNS)
    figure = Figure(figsize=(4.2 * _COLUMNS, 2.6 * n_rows), layout="constrained")
    axes_list = figure.subplots(n_rows, _COLUMNS, squeeze=False).flat
    if alarms:  # a red mark for each at every step where it rang
        axes, names, steps = next(axes_list), list(dict.fromkeys(name for _, name in alarms)), [r["step"] for r in rows]
        axes.plot([min(steps), max(steps)], [0, 0], alpha=0)  # as wide as the other panels
        axes.plot([step for step, _ in alarms], [names.index(name) for _, name in alarms], "|", color="tab:red")
        axes.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title("alarms", fontsize=9, color="tab:red")
        axes.grid(alpha=0.3)
    for (panel, names), axes in zip(panels, axes_list, strict=False):
        _draw_panel(axes, panel, {name: curves[name] for name in names}, sorted({step for step, _ in alarms}))
    for axes in axes_list:  # what zip has left over
        axes.set_axis_off()
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw_panel(
    axes: Axes, panel: Panel, curves: Mapping[str, Sequence[tuple[float, float]]], alarms: Sequence[float]
) -> None:
    """The curves of a panel over steps, those that are 0 throughout left out; a red tick at each step of an alarm."""
    moving = {name: points for name, points in curves.items() if any(value for _, value in points)}
    curves = moving or curves
    for name, points in curves.items():
        steps, values = zip(*((step, value / panel.scale) for step, value in points), strict=True)
        if len(points) >= _SMOOTHED and panel.noisy:
            (line,) = axes.plot(steps, _running_mean(values, len(values) // 20), label=name)
            axes.plot(steps, values, color=line.get_color(), alpha=0.3, zorder=1)
        else:
            axes.plot(steps, values, marker="." if len(points) < _SMOOTHED else "", label=name)
    for step in alarms:
        axes.axvline(step, ymax=0.04, color="tab:red", linewidth=0.8)
    axes.set_title(f"{panel.title} ({panel.unit})" if panel.unit else panel.title, fontsize=9, parse_math=False)
    axes.set_xlabel("step", fontsize=7)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if list(curves) != [panel.title]:
        for text in axes.legend(fontsize=6).get_texts():
            text.set_parse_math(False)


def _running_mean(values: Sequence[float], reach: int) -> list[float]:
    """The mean of each value and its neighbours up to `reach` away, without gaps; a gap stays one."""
    windows = (values[max(0, at - reach) : at + reach + 1] for at in range(len(values)))
    kept = ([value for value in window if not math.isnan(value)] for window in windows)
    return [math.nan if math.isnan(value) else math.fsum(window) / len(window)
            for value, window in zip(values, kept, strict=True)]


def plot_results(
    results: dict[str, object], curves: Mapping[str, Sequence[tuple[int, float, float, float]]], path: Path
) -> None:
    """Write a PNG: outcomes, ways to use k samples, levels, subjects, as far as there are any.

    curves: points (k, accuracy, low, high) by label.
    """
    groups = [kind for kind in ("level", "subject") if results[f"by_{kind}"]]
    n_panels = 1 + bool(curves) + len(groups)
    figure = Figure(figsize=(4.2 * n_panels, 3.4), layout="constrained")
    outcomes, *axes_row = figure.subplots(1, n_panels, squeeze=False)[0]
    n_samples = sum(results["outcomes"].values())
    shares = {name: {"accuracy": n / n_samples} for name, n in results["outcomes"].items() if n or name == "right"}
    shares["right"]["interval"] = results["interval"]
    _bars(outcomes, f"{n_samples} samples", shares)
    if curves:
        _draw_curves(axes_row.pop(0), curves)
    for kind, axes in zip(groups, axes_row, strict=True):
        entries = {f"{name} ({entry['problems']})": entry for name, entry in results[f"by_{kind}"].items()}
        _bars(axes, f"accuracy by {kind} (problems)", entries)
    low, high = results["interval"]
    figure.suptitle(f"{results['task']}, {results['problems']} problems\n{results['accuracy']:.1%} right, 95% interval "
                    f"{low:.1%} .. {high:.1%}", fontsize=10, parse_math=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})  # equal numbers, equal bytes


def plot_verifier(report: dict[str, object], path: Path) -> None:
    """Write a PNG: accuracy of every way of choosing over n, and how often a score of p is right."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    over_n, reliability = figure.subplots(1, 2)
    _draw_curves(over_n, {name: list(zip(curve["n"], curve["accuracy"], curve["low"], curve["high"], strict=True))
                          for name, curve in report["curves"].items()})
    bins = report["calibration"]
    probabilities, accuracies, counts = zip(*((b["probability"], b["accuracy"], b["count"]) for b in bins), strict=True)
    reliability.plot([0, 1], [0, 1], color="grey", linewidth=0.8, label="calibrated")
    reliability.plot(probabilities, accuracies, color="tab:blue", linewidth=0.8)
    reliability.scatter(probabilities, accuracies, [8 + 250 * n / sum(counts) for n in counts], label="area: samples")
    reliability.set_xlabel("score")
    reliability.yaxis.set_major_formatter(PercentFormatter(1))
    reliability.set_title(f"share right by score, {sum(counts)} samples", fontsize=9)
    reliability.grid(alpha=0.3)
    reliability.legend(fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw_curves(axes: Axes, curves: Mapping[str, Sequence[tuple[int, float, float, float]]]) -> None:
    """Accuracy over a number of samples, and its interval from low to high."""
    for label, points in curves.items():
        sizes, values, low, high = zip(*points, strict=True)
        axes.plot(sizes, values, marker="o", markersize=3, label=label)
        axes.fill_between(sizes, low, high, alpha=0.1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(k) for k in sizes])
    axes.set_xlabel("samples of a problem")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("accuracy, 95% interval", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _bars(axes: Axes, title: str, entries: Mapping[str, dict[str, object]]) -> None:
    """A bar from the left for each name, its share written at its end, with the 95% interval where there is one."""
    for place, (name, entry) in enumerate(entries.items()):
        share = entry["accuracy"]
        low, high = entry.get("interval", (share, share))
        ends = [[max(0.0, share - low)], [max(0.0, high - share)]]
        axes.barh(place, share, color="tab:green" if name == "right" else "tab:blue", alpha=0.7,
                  xerr=ends if "interval" in entry else None, capsize=3)
        axes.text(max(share, high) + 0.02, place, f"{share:.1%}", va="center", fontsize=7)
    axes.set_yticks(range(len(entries)), entries, fontsize=7, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"], fontsize=7)
    axes.set_title(title, fontsize=9)
    axes.grid(axis="x", alpha=0.3)
