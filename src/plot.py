"""Pictures of what was measured: results.json, a verifier's report. The door to matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter


def plot_results(results: dict[str, object], curves: Mapping[str, str], path: Path) -> None:
    """Write a PNG: outcomes, ways to use k samples, levels, subjects, as far as there are any.

    curves: keys of results over k, and their labels.
    """
    groups = [kind for kind in ("level", "subject") if results[f"by_{kind}"]]
    has_curves = results["samples_a_problem"] > 1
    figure = Figure(figsize=(4.2 * (1 + has_curves + len(groups)), 3.4), layout="constrained")
    outcomes, *axes_row = figure.subplots(1, 1 + has_curves + len(groups), squeeze=False)[0]
    n_samples = sum(results["outcomes"].values())
    shares = {name: {"accuracy": n / n_samples} for name, n in results["outcomes"].items() if n or name == "right"}
    shares["right"]["interval"] = results["interval"]
    _bars(outcomes, f"{n_samples} samples", shares)
    if has_curves:
        _over_samples(axes_row.pop(0), results, curves)
    for kind, axes in zip(groups, axes_row, strict=True):
        entries = {f"{name} ({entry['problems']})": entry for name, entry in results[f"by_{kind}"].items()}
        _bars(axes, f"accuracy by {kind} (problems)", entries)
    low, high = results["interval"]
    figure.suptitle(f"{results['task']}, {results['problems']} problems\n{results['accuracy']:.1%} right, 95% interval "
                    f"{low:.1%} .. {high:.1%}", fontsize=10, parse_math=False)  # fmt: skip
    figure.savefig(path, dpi=110, metadata={"Software": None})  # equal numbers, equal bytes


def plot_verifier(report: dict[str, object], path: Path) -> None:
    """Write a PNG: accuracy of every way of choosing over n, and how often a score of p is right."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    over_n, reliability = figure.subplots(1, 2)
    for name, curve in report["curves"].items():
        _curve(over_n, name, curve["n"], curve["accuracy"], curve["low"], curve["high"])
    _finish_curves(over_n, curve["n"])
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


def _over_samples(axes: Axes, results: dict[str, object], curves: Mapping[str, str]) -> None:
    """One line with its 95% band for each way to use k samples."""
    for name, label in curves.items():
        if name in results:
            sizes = [int(k) for k in results[name]]
            low, high = zip(*results["intervals"][name].values(), strict=True)
            _curve(axes, label, sizes, list(results[name].values()), low, high)
    _finish_curves(axes, sizes)


def _curve(
    axes: Axes, label: str, sizes: Sequence[int], values: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> None:
    """Accuracy over a number of samples, and its interval from low to high."""
    axes.plot(sizes, values, marker="o", markersize=3, label=label)
    axes.fill_between(sizes, low, high, alpha=0.1)


def _finish_curves(axes: Axes, sizes: Sequence[int]) -> None:
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
                  xerr=ends if "interval" in entry else None, capsize=3)  # fmt: skip
        axes.text(max(share, high) + 0.02, place, f"{share:.1%}", va="center", fontsize=7)
    axes.set_yticks(range(len(entries)), entries, fontsize=7, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"], fontsize=7)
    axes.set_title(title, fontsize=9)
    axes.grid(axis="x", alpha=0.3)
