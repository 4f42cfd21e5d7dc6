"""src/plot.py: a picture for every shape of results, the same bytes for the same numbers."""

from pathlib import Path

import pytest

from src.data.examples import Prompt
from src.evaluation.report import CURVES, Graded, summarize
from src.grading.grader import Verdict
from src.grading.tasks import find_task
from src.plot import plot_results


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
        plot_results(results(n, level, scored), CURVES, tmp_path / name)
    data = (tmp_path / "first.png").read_bytes()
    assert data.startswith(b"\x89PNG") and data == (tmp_path / "second.png").read_bytes()
    width = int.from_bytes(data[16:20], "big")
    assert width == int(4.2 * panels * 110)
