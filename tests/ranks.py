"""Run a function in several real processes: `run_ranks(2, "tests.workers:layers", tmp_path)`; a command under torchrun.

As a program (one rank): join the group, call the function, save what it returns.
"""

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest
import torch
import torch.distributed as dist

from src import parallel

Key = TypeVar("Key", bound=Hashable)

ROOT = Path(__file__).resolve().parents[1]
OURS = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TIMEOUT = 120  # seconds; a healthy launch of tiny models takes less than 15


def command(*words: object, n: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python words...` in the repository, under torchrun with n processes if given; output is captured.

    Several may run at once: each finds its own port. Past TIMEOUT all processes are killed and the test fails.
    """
    torchrun = [] if n is None else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    process = subprocess.Popen(
        [sys.executable, *torchrun, *map(str, words)],
        cwd=ROOT,
        env=os.environ | OURS,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # torchrun passes it on; its workers are in sessions of their own
        out, err = process.communicate()
        pytest.fail(f"{words} on {n} ranks took more than {TIMEOUT} s\n{out}\n{err}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def succeed(*words: object, n: int | None = None) -> subprocess.CompletedProcess[str]:
    """command() that must exit with 0; otherwise the test fails with its output."""
    done = command(*words, n=n)
    if done.returncode:
        pytest.fail(f"{words} on {n} ranks: status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


class Job(NamedTuple):
    """What n ranks do: call `target` ("module:function"), in groups of these sizes, with json-able arguments."""

    n: int
    target: str
    arguments: dict[str, object]
    tensor_parallel_size: int = -1
    replicas: int = 1
    context_parallel_size: int = 1


def run_ranks(
    n: int, target: str, tmp_path: Path, tensor_parallel_size: int = -1, replicas: int = 1,
    context_parallel_size: int = 1, **arguments: object,
) -> list[dict[str, object]]:
    """Call `target` with json-able arguments on n ranks; what each returned, by rank."""
    return run_jobs([Job(n, target, arguments, tensor_parallel_size, replicas, context_parallel_size)], tmp_path)[0]


def in_few_launches(jobs: Mapping[Key, Job], tmp_path: Path) -> Callable[[Key], list[dict[str, object]]]:
    """What each rank returned of a job, by its key; the first that is asked for brings all of as many ranks."""

    @functools.cache
    def launch(n: int) -> dict[Key, list[dict[str, object]]]:
        keys = [key for key, job in jobs.items() if job.n == n]
        return dict(zip(keys, run_jobs([jobs[key] for key in keys], tmp_path), strict=True))

    return lambda key: launch(jobs[key].n)[key]


def run_jobs(jobs: list[Job], tmp_path: Path) -> list[list[dict[str, object]]]:
    """Do jobs of as many ranks one after another on those, which meet anew for each; what they returned, by job and
    rank.

    The ranks are started as torchrun does, by this process: each start of torchrun imports torch once more. One rank
    alone is this process.
    """
    (n,), folder = {job.n for job in jobs}, Path(tempfile.mkdtemp(dir=tmp_path))
    if n == 1:
        parallel.start()
        return [[_function(job.target)(**job.arguments)] for job in jobs]
    stores = [dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in jobs]
    (folder / "jobs.json").write_text(json.dumps([[store.port, *job] for store, job in zip(stores, jobs, strict=True)]))
    place = {"WORLD_SIZE": str(n), "MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = []
    for rank in range(n):
        with (folder / f"{rank}.log").open("w") as log:
            words = [sys.executable, "-m", "tests.ranks", str(folder)]
            environment = os.environ | OURS | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log))
    until = time.monotonic() + TIMEOUT * len(jobs)
    while any(rank.poll() is None for rank in ranks) and not any(rank.returncode for rank in ranks):
        if time.monotonic() > until:
            break
        time.sleep(0.02)
    ended = [rank.poll() for rank in ranks]
    for rank in ranks:
        rank.kill()
        rank.wait()
    if any(status != 0 for status in ended):
        logs = "\n".join((folder / f"{rank}.log").read_text() for rank in range(n))
        pytest.fail(f"{jobs}: {n} ranks ended with {ended}, None after {TIMEOUT * len(jobs)} s\n{logs}")
    return [[torch.load(folder / f"{job}-{rank}.pth") for rank in range(n)] for job in range(len(jobs))]


def _function(target: str) -> Callable[..., dict[str, object]]:
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)


def _work(folder: Path) -> None:
    """One rank's part of run_jobs()."""
    for number, (port, _, target, arguments, *sizes) in enumerate(json.loads((folder / "jobs.json").read_text())):
        os.environ["MASTER_PORT"] = str(port)
        parallel.start(1, *sizes)
        result = _function(target)(**arguments)
        torch.save(result, folder / f"{number}-{parallel.rank()}.pth")
        parallel.stop()


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
