"""Run a function in several real processes: `run_ranks(2, "tests.workers:layers", tmp_path)`; a command under torchrun.

Processes are forked from one that has imported torch, which takes seconds in each otherwise.
"""

import atexit
import functools
import importlib
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
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
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch.distributed.run", "tests.ranks", *(path.stem for path in ROOT.glob("*.py"))])
_LOCK = threading.Lock()  # a process that starts looks after all others: two threads would both read how one ended


def fork(words: Sequence[object], output: Path, errors: Path, **environment: str) -> ForkServerProcess:
    """Start `python words...` in the repository, with these variables besides ours; it writes to two files."""
    run = list(map(str, words)), os.environ | OURS | environment, output, errors
    with _LOCK:
        process = _SERVER.Process(target=_run, args=run)
        process.start()
    return process


def wait(processes: list[ForkServerProcess], seconds: float) -> list[int | None]:
    """Wait until all have ended, or one with an error; then end the others. The status of each, None for those."""
    until = time.monotonic() + seconds
    while True:
        with _LOCK:
            ended = [process.exitcode for process in processes]
        if None not in ended or any(ended) or time.monotonic() > until:
            break
        time.sleep(0.02)
    for process, status in zip(processes, ended, strict=True):
        if status is None:
            process.terminate()  # torchrun passes it on
            with _LOCK:
                process.join(10)
            process.kill()
    return ended


def _run(words: list[str], environment: dict[str, str], output: Path, errors: Path) -> None:
    """What a forked process does: be the interpreter of this command line in the repository."""
    for number, path in ((1, output), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=True)  # ranks that are forked from here would write what waits once more
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # read long ago, as the library was loaded
    os.chdir(ROOT)
    _interpret(words)


def _interpret(words: list[str]) -> None:
    """Do what `python words...` does."""
    try:
        kind, sys.path[0] = words[0], str((ROOT / words[0]).parent)
        if kind == "-c":
            sys.argv = [kind, *words[2:]]
            exec(words[1], {"__name__": "__main__"})
        elif kind == "-m":
            sys.argv = words[1:]
            sys.modules.pop(words[1], None)  # a module that runs is not the one that was imported
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing's processes leave without


def command(*words: object, n: int | None = None, forked: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `python words...` in the repository, under torchrun with n processes if given; output is captured.

    forked: torchrun forks its ranks too, and then names any of those that fail. Else it starts interpreters, as users
    have it. Several may run at once: each finds its own port. Past TIMEOUT all are killed and the test fails.
    """
    torchrun = [] if n is None else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    if torchrun and forked:
        torchrun += ["--start_method=fork", "--run_path", "--", "tests/ranks.py"]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = fork([*torchrun, *words], out, err)
        if (status := wait([process], TIMEOUT)[0]) is None:
            pytest.fail(f"{words} on {n} ranks took more than {TIMEOUT} s\n{out.read_text()}\n{err.read_text()}")
        return subprocess.CompletedProcess(words, status, out.read_text(), err.read_text())


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
    meeting = {"WORLD_SIZE": str(n), "MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    logs = [folder / f"{rank}.log" for rank in range(n)]
    ranks = [fork(["-m", "tests.ranks", folder], log, log, **meeting, RANK=str(rank), LOCAL_RANK=str(rank))
             for rank, log in enumerate(logs)]
    ended = wait(ranks, TIMEOUT * len(jobs))
    if any(status != 0 for status in ended):
        said = "\n".join(log.read_text() for log in logs)
        pytest.fail(f"{jobs}: {n} ranks ended with {ended}, None after {TIMEOUT * len(jobs)} s\n{said}")
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
    _work(Path(sys.argv[1])) if Path(sys.argv[1]).is_dir() else _interpret(sys.argv[1:])
