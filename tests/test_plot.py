"""src/plot.py: a picture for every shape of results, the same bytes for the same numbers."""

from pathlib import Path

import pytest

from src import plot
from src.data.examples import Prompt
from src.evaluation.report import Graded, curves_of, summarize
from src.grading.grader import Verdict
from src.grading.tasks import find_task
from src.plot import plot_results, plot_run


def results(n: int, level: int | None, scored: bool) -> dict[str, object]:
    """Two problems, n samples each, every other one right."""
    task = find_task("toy")
    prompts = [Prompt(name, name, "1", level, None) for name in "ab"]
    samples = [
        Graded(Verdict("right" if k % 2 else "wrong", str(k % 2)), 0.1 * k if scored else None, vote=k % 2)
        for k in range(n)
    ]
    return summarize(task, prompts, {"a": samples, "b": samples})


@pytest.mark.parametrize("n, level, scored, panels", [(1, None, False, 1), (1, 2, False, 2), (4, 2, True, 3)])
def test_a_picture_is_written(tmp_path: Path, n: int, level: int | None, scored: bool, panels: int) -> None:
    for name in ("first.png", "second.png"):
        found = results(n, level, scored)
        plot_results(found, curves_of(found), tmp_path / name)
    data = (tmp_path / "first.png").read_bytes()
    assert data.startswith(b"\x89PNG") and data == (tmp_path / "second.png").read_bytes()
    width = int.from_bytes(data[16:20], "big")
    assert width == int(4.2 * panels * 110)


def test_a_runs_picture_groups_its_metrics_and_smooths_long_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def draw(axes: object, panel: plot.Panel, curves: dict[str, object], alarms: list[float]) -> None:
        drawn.append((panel.title, [*curves], alarms))

    monkeypatch.setattr(plot, "_draw_panel", draw)
    row = {"seconds": 1.0, "eval_loss": 0.5, "loss": 1.0, "kl": 0.1, "kl_k3": 0.1, "mine": 2.0, "clipped_low": 0.0}
    plot_run([{"step": 1, **row}, {"step": 2, **row, "alarms": {"cut off": "..."}}], "run", tmp_path / "a.png")
    assert drawn == [
        (title, names, [2])
        for title, names in (
            ("loss", ["eval_loss", "loss"]), ("KL to the reference", ["kl", "kl_k3"]), ("clipped", ["clipped_low"]),
            ("mine", ["mine"]),
        )
    ]
    assert plot._running_mean([1.0, 3.0, float("nan"), 5.0], 1) == pytest.approx([2, 2, float("nan"), 5], nan_ok=True)


def test_no_run_has_more_than_ten_panels(tmp_path: Path) -> None:
    plot_run([{"step": step, **{f"key{n}": 1.0 for n in range(40)}} for step in (1, 2)], "run", tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert int.from_bytes(data[20:24], "big") == int(2.6 * 4 * 110)
