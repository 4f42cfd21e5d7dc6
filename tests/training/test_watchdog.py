"""A job of several ranks ends soon after one of them hangs or fails, and says which, when and where."""

import re
import time
from pathlib import Path

from tests.conftest import Folders
from tests.ranks import command


def end_of(folders: Folders, save_dir: Path, how: str) -> tuple[str, float]:
    """What two ranks told when the second one `hangs` or `fails`, and the seconds from then to the job's end."""
    flags = (f"--folder={folders.two}", f"--save_dir={save_dir}", f"--how={how}")
    done = command("-m", "tests.training.workers", *flags, n=2)
    assert done.returncode != 0
    return done.stderr, time.time() - float((save_dir / "since").read_text(encoding="utf-8"))


def test_a_hang_ends_the_job_and_every_rank_says_where(folders: Folders, tmp_path: Path) -> None:
    told, seconds = end_of(folders, tmp_path, "hangs")
    waits, sleeps = sorted(re.findall(r"error: (rank \d has not moved for 3 s after step \d: .*)", told))
    assert re.fullmatch(
        r"rank 0 .* after step 1: in the collective all_gather, at src/models/decoder.py:\d+ in forward",
        waits,
    )
    assert re.fullmatch(
        r"rank 1 .* after step 1: in no collective, at tests/training/workers.py:\d+ in interrupted", sleeps
    )
    assert seconds < 30


def test_a_failing_rank_ends_the_job_within_30_seconds(folders: Folders, tmp_path: Path) -> None:
    told, seconds = end_of(folders, tmp_path, "fails")
    assert re.search(r"error: row 7 is broken$", told, re.MULTILINE)
    assert seconds < 30
