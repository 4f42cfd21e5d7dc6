"""A job of several ranks ends soon after one of them hangs, is stopped or fails, and says which, when and where."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from src import parallel
from src.errors import UserError
from src.processes.watchdog import LEFT, SILENT_SECONDS, STILL_SECONDS, Watchdog
from tests.conftest import Folders
from tests.ranks import ROOT, command

WAITS = r"rank 0 after step 1 in the collective all_gather, at src/models/layers.py:\d+ in forward"
THERE = r"after step 1 in no collective, at tests/training/workers.py:\d+ in interrupted"


def end_of(folders: Folders, save_dir: Path, how: str) -> tuple[int, str, float]:
    """Status of two ranks of which the second one `hangs`, `fails`, `dies` or is `slow`, what they told, the seconds
    from then to the job's end."""
    flags = (f"--folder={folders.two}", f"--save_dir={save_dir}", f"--how={how}")
    done = command("-m", "tests.training.workers", *flags, n=2, forked=False)
    return done.returncode, done.stderr, time.time() - float((save_dir / "since").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("hangs", rf"error: no rank has got on for 4 s: {WAITS}; rank 1 {THERE}"),
        ("asks-nobody", rf"error: no rank has got on for 4 s: rank 0 {THERE}; rank 1 {THERE}"),
        ("fails", r"error: row 7 is broken"),
        ("asks-in-vain", r"error: row 7 is broken"),
        ("dies", rf"error: nothing is heard any more of rank 1, last {THERE}: its process was killed .*"),
    ],
)
def test_a_rank_in_trouble_ends_the_job_with_one_line(
    folders: Folders, tmp_path: Path, how: str, line: str
) -> None:
    status, told, seconds = end_of(folders, tmp_path, how)
    said, _, report = told.partition("ChildFailedError")
    assert status != 0 and seconds < 30
    assert len(re.findall(rf"^{line}$", said, re.MULTILINE)) == 1 and len(re.findall("error: ", said)) == 1, told
    cause = r"Signal 9 \(SIGKILL\) received by PID \d+" if how == "dies" else line
    assert re.search(rf"Root Cause[^=]*traceback : {cause}$", report, re.MULTILINE), told
    assert "[rank0]: Traceback" not in said and (how != "hangs" or "waiting: no" in said), told


def test_a_stopped_rank_is_named_by_the_one_that_waits(folders: Folders, tmp_path: Path) -> None:
    """Without torchrun, which waits for 30 s until it kills a process that does not end when it is told to."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    flags = (f"--folder={folders.two}", f"--save_dir={tmp_path}", "--how=stops")
    words = [sys.executable, "-m", "tests.training.workers", *flags]
    ranks = [
        subprocess.Popen(
            words, cwd=ROOT, env=os.environ | place | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        told = ranks[0].communicate(timeout=60)[1]
    finally:
        for process in ranks:
            process.kill()
    line = rf"error: nothing was heard for 3 s of rank 1, last {THERE}: its process is .*; {WAITS}\n"
    assert ranks[0].returncode == 1 and re.search(rf"^{line}\Z", told, re.MULTILINE), told


@pytest.mark.parametrize("how, longer", [("slow", 10), ("asks", 7), ("writes", 6)])
def test_a_rank_that_computes_writes_or_asks_for_long_is_waited_for(
    folders: Folders, tmp_path: Path, how: str, longer: float
) -> None:
    """Who asks, or writes, does so for longer than a collective may take, or a rank may stand still."""
    status, told, seconds = end_of(folders, tmp_path, how)
    assert status == 0 and seconds > longer, told


@pytest.fixture
def dog() -> Watchdog:
    """The watchdog of rank 1 of 3; the others' words are in its store."""
    store = dist.HashStore()
    for rank in (0, 2):
        store.set(f"watchdog/{rank}", json.dumps({"now": 0, "still": 400.0, "place": "waits"}))
    return Watchdog(store, 1, 3, "cpu")


def test_a_report_needs_every_rank_to_stand_still(dog: Watchdog) -> None:
    long = STILL_SECONDS + 1
    assert dog._problem(0.0, 1.0, 1.0) == "" and dog._problem(0.0, long, STILL_SECONDS - 1) == ""
    assert dog._problem(1.0, long, 0.0) == ""  # it computes, or writes
    assert dog._problem(1.0, long, long) == "-"  # rank 0 speaks
    dog._store.set("watchdog/2", json.dumps({"now": 2, "still": 3.0, "place": "works"}))
    assert dog._problem(2.0, long, long) == ""
    dog._store.set("watchdog/2", LEFT)
    assert dog._problem(3.0, long, long) == ""  # it may be that the rest has long to do


def test_a_silent_rank_is_named_with_its_last_place(dog: Watchdog) -> None:
    dog._store.set("watchdog/2", LEFT)
    assert dog._problem(0.0, 60.0, 60.0) == ""
    problem = dog._problem(SILENT_SECONDS + 1, 200.0, 0.0)  # also while it waits patiently
    assert problem.startswith("nothing was heard for 120 s of rank 0, last waits: its process is stopped")
    assert problem.endswith("; rank 2 has left") and "rank 1 after step" in problem
    dog._store.set("watchdog/0", json.dumps({"now": 1, "still": 0.0, "place": "waits"}))
    assert dog._problem(SILENT_SECONDS + 2, 200.0, 200.0) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": None}, "the environment says .*'WORLD_SIZE': '', .*; use torchrun, or unset RANK"),
        ({"MASTER_ADDR": None}, "the environment says .*'MASTER_ADDR': ''"),
        ({"RANK": "one"}, "the environment says .*'RANK': 'one'"),
        ({"RANK": "2"}, "the environment says .*'RANK': '2', 'WORLD_SIZE': '2'"),
        ({"MASTER_PORT": "70000"}, r"rank 0 of 2 does not meet the others at localhost:70000 \(port must"),
        ({"MASTER_ADDR": "no.such.host.invalid"}, r"at no.such.host.invalid:\d+ \(.*; is that the machine of rank 0"),
        ({"taken": "yes"}, r"port \d+ is in use; choose another with --master_port, or let torchrun --standalone"),
        ({"RANK": "1"}, r"rank 1 of 2 does not meet the others at localhost:\d+ \(.*; is that the machine of rank 0"),
    ],
    ids=str,
)
def test_ranks_that_cannot_meet_are_one_line(changes: dict[str, str | None], message: str) -> None:
    parallel.stop()
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("", 0)) as server:
        patch.setattr(parallel, "JOIN_TIME", parallel.JOIN_TIME / 600)  # one second
        port = server.getsockname()[1]
        if "taken" not in changes:
            server.close()
        found = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)} | changes
        for name, word in found.items():
            patch.delenv(name, raising=False)
            if word is not None:
                patch.setenv(name, word)
        with pytest.raises(UserError, match=message) as problem:
            parallel.start()
        assert "\n" not in str(problem.value) and not dist.is_initialized()
    parallel.start()  # what the tests behind this one count on
