"""Run a function in real processes, `run_ranks(2, "tests.workers:layers", tmp_path)`; or a script, as a command.

Processes are forked from one that has imported what they need, which would take each of them 2 to 4 s; they find each
other as under torchrun. test_entries.py, test_watchdog.py and test_cli.py show the same under torchrun itself.
"""

import atexit
import functools
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from src import parallel

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 120  # seconds; a healthy job of tiny models takes less than 15
TOO_LONG = 124  # the status of a job that took longer
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
PRELOADED = ("tests.workers", "tests.training.workers", "solver_train", "solver_evaluate", "verifier_train",
             "verifier_evaluate", "preference_train", "checkpoint_split", "data_build", "torch._dynamo",
             "torch.distributed.fsdp", "matplotlib.figure")  # fmt: skip


def launch(*words: object, n: int | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `python words...` in a folder, under torchrun if n is given; output is captured. At most TIMEOUT."""
    torchrun = [] if n is None else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    return subprocess.run([sys.executable, *torchrun, *map(str, words)], cwd=cwd, env=os.environ | ENVIRONMENT,
                          capture_output=True, text=True, timeout=TIMEOUT, check=False)  # fmt: skip


def command(*words: object, n: int | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """launch() from the forking process, without torchrun. Past TIMEOUT all ranks are killed and the test fails."""
    argv = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        # as torchrun's agent does, this process holds the store in which ranks meet
        store = n and dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        job = {"argv": argv, "n": n, "port": store and store.port, "folder": folder, "cwd": str(cwd),
               "environment": dict(os.environ)}  # fmt: skip
        server = _server()
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        out, err = (Path(folder, name).read_text(encoding="utf-8") for name in ("out", "err"))
    if status == TOO_LONG:
        pytest.fail(f"{words} on {n} ranks took more than {TIMEOUT} s\n{out}\n{err}")
    return subprocess.CompletedProcess(argv, status, out, err)


@functools.cache
def _server() -> "subprocess.Popen[str]":
    """The process that jobs are forked from, started by the first of them."""
    server = subprocess.Popen([sys.executable, "-m", "tests.ranks"], cwd=ROOT, env=os.environ | ENVIRONMENT,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    atexit.register(server.communicate)  # its input ends, and so does it
    return server


def succeed(*words: object, n: int | None = None) -> subprocess.CompletedProcess[str]:
    """command() that must exit with 0; otherwise the test fails with its output."""
    done = command(*words, n=n)
    if done.returncode:
        pytest.fail(f"{words} on {n} ranks: status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def run_ranks(
    n: int, target: str, tmp_path: Path, tensor_parallel_size: int = -1, replicas: int = 1, **arguments: object
) -> list[dict[str, object]]:
    """Call `target` ("module:function") with json-able arguments on n ranks; what each returned, by rank."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    (folder / "arguments.json").write_text(json.dumps(arguments), encoding="utf-8")
    succeed(target, folder, tensor_parallel_size, replicas, n=n)
    return [torch.load(folder / f"{rank}.pth") for rank in range(n)]


def _work(target: str, folder: Path, tensor_parallel_size: int, replicas: int) -> None:
    """One rank's part of run_ranks()."""
    parallel.start(1, tensor_parallel_size, replicas)
    module, function = target.split(":")
    arguments = json.loads((folder / "arguments.json").read_text(encoding="utf-8"))
    result = getattr(importlib.import_module(module), function)(**arguments)
    torch.save(result, folder / f"{parallel.rank()}.pth")


def _serve() -> list[str]:
    """Fork what each line of stdin asks for, and tell its status. Returns the words of a job in each forked process."""
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        ranks = {}
        for rank in range(job["n"] or 1):
            child = os.fork()
            if not child:
                _enter(job, rank)
                return job["argv"]
            ranks[child] = rank
        print(_status_of(set(ranks)), flush=True)
    return []


def _enter(job: dict[str, object], rank: int) -> None:
    """Become a process of the job: its environment, its output, its words."""
    os.environ.clear()
    os.environ.update(job["environment"] | ENVIRONMENT)
    if job["n"]:
        size = {"WORLD_SIZE": job["n"], "LOCAL_WORLD_SIZE": job["n"], "RANK": rank, "LOCAL_RANK": rank}
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": job["port"], "TORCHELASTIC_USE_AGENT_STORE": True,
                 "TORCHELASTIC_RESTART_COUNT": 0}  # fmt: skip
        os.environ.update({name: str(value) for name, value in (size | place).items()})
    os.chdir(job["cwd"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{job['folder']}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)


def _status_of(left: set[int]) -> int:
    """Wait for all processes, 0 or the first other status; those that a failed one leaves are killed, as are all of
    them after TIMEOUT."""
    status, end = 0, time.monotonic() + TIMEOUT
    while left:
        child, how = os.waitpid(-1, os.WNOHANG)
        if child:
            left.discard(child)
            status = status or os.waitstatus_to_exitcode(how)
        elif time.monotonic() > end:
            status = TOO_LONG
        else:
            select.select([], [], [], 0.01)
        if status:
            for other in left:
                os.kill(other, signal.SIGKILL)
    return status


def _main(argv: list[str]) -> None:
    """What python does with these words; or one rank's part of run_ranks()."""
    if ":" in argv[0]:
        _work(argv[0], Path(argv[1]), *map(int, argv[2:]))
    elif argv[0] == "-m":
        sys.argv = argv[1:]
        sys.modules.pop(argv[1], None)  # as if nothing had imported it
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    if words := _serve():
        _main(words)
