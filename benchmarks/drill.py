"""What a run of four ranks says when something befalls it, how soon, and whether it then ends as it should.

python -m benchmarks.drill [killed stopped late full vanished server]

The run is solver_train.py on the bundled toy data, two tensor-parallel by two data-parallel processes. After step 6
rank 2 is killed, stopped, or stopped for 60 s and let go on; no rank can write more than 20 kB to a file any more; or,
after step 7, the run's directory is moved away, as a disk that is lost takes it along. server: ppo_train.py (GRPO,
LoRA) has the only server that samples for it killed as its third buffer begins; it then comes back at another address.
It is asked one thing at a time, for in a batch of others a request's sums round otherwise.
Printed: each line from then on that is an error or says who is waited for, with the seconds since; when the job was
over; whether the same command once more ends with the bits of a run left alone.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.kill import ROOT, Case, finish, processes, same

RANK, LATE_SECONDS = 2, 60.0
AFTER = {"server": 2, "vanished": 7}  # the last step before the trouble; 6, in whose save it comes, for others
CASE = Case("tp 2 x dp 2", -1, background=False)
REWARD = "def digits(prompt, response, label):\n    return sum(map(str.isdigit, response)) / 10\n"


class Said(NamedTuple):
    """What a job wrote to standard error after the trouble, each line with its seconds since then; and its end."""

    lines: list[tuple[float, str]]
    status: int
    seconds: float


def prepare(folder: Path) -> None:
    """The checkpoint and the rows that Case.command() names."""
    split = ["checkpoint_split.py", "--ckpt_file=dataset/toy/base", f"--save_path={folder / 'split'}", "--n=2"]
    subprocess.run([sys.executable, *split], cwd=ROOT, check=True, capture_output=True)
    rows = json.loads((ROOT / "dataset/toy/demonstrations.json").read_text())
    (folder / "held.json").write_text(json.dumps(rows[:60]))
    (folder / "reward.py").write_text(REWARD)


def command(trouble: str, run: Path, address: str) -> list[str]:
    """The run that the trouble is to befall; address: its server's."""
    if trouble != "server":
        return CASE.command(run)
    flags = {
        "actor_ckpt_dir": run.parent / "split", "actor_save_dir": run, "train_file": "dataset/toy/train.json",
        "task": "toy", "reward": f"{run.parent}/reward.py:digits", "advantage": "grpo", "group_size": 4,
        "max_buffer_size": 16, "max_batch_size": 8, "max_new_tokens": 24, "max_steps": 4, "lora_rank": 4, "lr": 1e-3,
        "tensor_parallel_size": 2, "rollout_backend": "openai", "base_url": address, "rollout_batch_size": 1,
        "save_every": 1, "resume": "auto",
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
    return [sys.executable, *launcher, "ppo_train.py", *(f"--{name}={value}" for name, value in flags.items())]


@contextlib.contextmanager
def server(trouble: str, folder: Path) -> Iterator[tuple[str, subprocess.Popen[str] | None]]:
    """The address and the process of a server of the base, for a run that needs one."""
    if trouble != "server":
        yield "", None
        return
    words = [sys.executable, "solver_evaluate.py", f"--ckpt_dir={folder / 'split'}", "--serve=0"]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        said = next(line for line in process.stderr if "serving" in line)
        yield said.split()[-1], process
    finally:
        process.kill()
        process.communicate()


def pid_of(rank: int, launcher: int) -> int:
    """The process of a rank."""
    name = f"RANK={rank}".encode()
    return next(pid for pid in processes(launcher) if name in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))


def befall(trouble: str, launcher: int, run: Path, sampler: subprocess.Popen[str] | None) -> None:
    """Let something happen to the run."""
    if trouble == "server":
        before = set(run.glob("policy/policy-*"))
        while set(run.glob("policy/policy-*")) <= before:
            time.sleep(0.02)
        sampler.kill()
    elif trouble == "vanished":
        run.rename(run.with_name("elsewhere"))
    elif trouble == "full":
        for pid in processes(launcher)[1:]:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    else:
        pid = pid_of(RANK, launcher)
        os.kill(pid, signal.SIGKILL if trouble == "killed" else signal.SIGSTOP)
        if trouble == "late":
            threading.Timer(LATE_SECONDS, os.kill, (pid, signal.SIGCONT)).start()


def job(words: list[str], run: Path, trouble: str, sampler: subprocess.Popen[str] | None) -> Said:
    """Start the run, let something happen after its step, and listen until it is over."""
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    lines: list[tuple[float, str]] = []

    def listen() -> None:
        lines.extend((time.monotonic(), line.rstrip()) for line in process.stderr)

    listener = threading.Thread(target=listen)
    listener.start()
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {AFTER.get(trouble, 6)},' in metrics.read_text()):
        if process.poll() is not None:
            raise SystemExit("\n".join(line for _, line in lines))
        time.sleep(0.02)
    befall(trouble, process.pid, run, sampler)
    since = time.monotonic()
    process.wait()
    ended = time.monotonic()
    listener.join()
    return Said([(at - since, line) for at, line in lines if at > since], process.returncode, ended - since)


def drill(trouble: str, folder: Path) -> tuple[Said, bool]:
    """What was said, and whether the run that the same command then goes on with ends with the right bits."""
    whole, run = folder / ("whole-rl" if trouble == "server" else "whole"), folder / trouble
    if not whole.is_dir():
        with server(trouble, folder) as (address, _):
            finish(command(trouble, whole, address))
    with server(trouble, folder) as (address, sampler):
        said = job(command(trouble, run, address), run, trouble, sampler)
    with server(trouble, folder) as (address, _):
        finish(command(trouble, run, address))
    return said, same(whole, run)


def main() -> None:
    """Print what each trouble led to."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for trouble in sys.argv[1:] or ("killed", "stopped", "late", "full", "vanished", "server"):
            said, equal = drill(trouble, Path(folder))
            ended = "bit-equal" if equal else "DIFFERENT"
            print(f"{trouble}: status {said.status} after {said.seconds:.0f} s; the same command then: {ended}")
            for seconds, line in said.lines:
                if line.startswith(("error: ", "waiting: ", "[rank")):
                    print(f"  {seconds:6.1f}  {line}", flush=True)


if __name__ == "__main__":
    main()
