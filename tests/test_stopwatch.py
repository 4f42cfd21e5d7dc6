"""src/stopwatch.py: what it adds up, and that every collective of a training step passes it."""

import time
from pathlib import Path

import pytest

from src.stopwatch import Stopwatch
from tests.conftest import Folders
from tests.ranks import run_ranks


def test_it_adds_up_what_is_inside_while_it_runs() -> None:
    watch = Stopwatch()
    for running in (False, True, True):
        if running:
            watch.start()
        for _ in range(2):
            with watch.measure():
                time.sleep(0.05)
        time.sleep(0.2)
    assert 0.1 <= watch.stop() < 0.2
    with watch.measure():
        time.sleep(0.05)
    assert watch.stop() < 0.2


@pytest.mark.parametrize(("tensor_parallel_size", "folder"), [(2, "two"), (1, "one")])
def test_a_late_rank_is_the_communication_of_the_others(
    folders: Folders, tmp_path: Path, tensor_parallel_size: int, folder: str
) -> None:
    """Tensor-parallel ranks meet in fairscale's layers, data-parallel ones in FSDP's gathers."""
    found = run_ranks(
        2,
        "tests.training.workers:late_step",
        tmp_path,
        tensor_parallel_size,
        folder=getattr(folders, folder),
        log_dir=str(tmp_path / "log"),
    )
    for phase in ("forward", "backward"):
        prompt, late = (float(rank[phase]) for rank in found)
        assert prompt - late > 0.5 and late > 0.0, phase
