"""Run a function in several real processes under torchrun: `run_ranks(2, "tests.workers:layers", tmp_path)`.

As a program (what torchrun starts): join the group, call the function, save what it returns.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from src import parallel

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 120  # seconds; a healthy launch of tiny models takes less than 15


def command(*words: object, n: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python words...` in the repository, under torchrun with n processes if given; output is captured.

    Several may run at once: each finds its own port. Past TIMEOUT all processes are killed and the test fails.
    """
    torchrun = [] if n is None else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    process = subprocess.Popen(
        [sys.executable, *torchrun, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
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


def run_ranks(
    n: int, target: str, tmp_path: Path, tensor_parallel_size: int = -1, replicas: int = 1,
    context_parallel_size: int = 1, **arguments: object,
) -> list[dict[str, object]]:
    """Call `target` ("module:function") with json-able arguments on n ranks; what each returned, by rank."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    (folder / "arguments.json").write_text(json.dumps(arguments), encoding="utf-8")
    succeed("-m", "tests.ranks", target, folder, tensor_parallel_size, replicas, context_parallel_size, n=n)
    return [torch.load(folder / f"{rank}.pth") for rank in range(n)]


def _work(target: str, folder: Path, *sizes: int) -> None:
    """One rank's part of run_ranks()."""
    parallel.start(1, *sizes)
    module, function = target.split(":")
    arguments = json.loads((folder / "arguments.json").read_text(encoding="utf-8"))
    result = getattr(importlib.import_module(module), function)(**arguments)
    torch.save(result, folder / f"{parallel.rank()}.pth")


if __name__ == "__main__":
    _work(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
