"""What a run of four ranks says when something befalls one of them, how soon, and whether it then ends as it should.

python -m benchmarks.drill [killed stopped late full]

The run is solver_train.py on the bundled toy data, two tensor-parallel by two data-parallel processes. After step 6
rank 2 is killed, stopped, or stopped for 60 s and let go on; or no rank can write more than 20 kB to a file any more.
Printed: each line from then on that is an error or says who is waited for, with
the seconds since; when the job was over; whether the same command once more ends with the bits of a run left alone.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.kill import ROOT, Case, finish, processes, same

RANK, AFTER, LATE_SECONDS = 2, 6, 60.0
CASE = Case("tp 2 x dp 2", -1, background=False)


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


def pid_of(rank: int, launcher: int) -> int:
    """The process of a rank."""
    name = f"RANK={rank}".encode()
    return next(pid for pid in processes(launcher) if name in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))


def befall(trouble: str, launcher: int) -> None:
    """Let something happen to the run."""
    if trouble == "full":
        for pid in processes(launcher)[1:]:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    else:
        pid = pid_of(RANK, launcher)
        os.kill(pid, signal.SIGKILL if trouble == "killed" else signal.SIGSTOP)
        if trouble == "late":
            threading.Timer(LATE_SECONDS, os.kill, (pid, signal.SIGCONT)).start()


def job(words: list[str], run: Path, trouble: str) -> Said:
    """Start the run, let something happen after step AFTER, and listen until it is over."""
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    lines: list[tuple[float, str]] = []

    def listen() -> None:
        lines.extend((time.monotonic(), line.rstrip()) for line in process.stderr)

    listener = threading.Thread(target=listen)
    listener.start()
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {AFTER},' in metrics.read_text()):
        if process.poll() is not None:
            raise SystemExit("\n".join(line for _, line in lines))
        time.sleep(0.02)
    since = time.monotonic()
    befall(trouble, process.pid)
    process.wait()
    ended = time.monotonic()
    listener.join()
    return Said([(at - since, line) for at, line in lines if at > since], process.returncode, ended - since)


def drill(trouble: str, folder: Path) -> tuple[Said, bool]:
    """What was said, and whether the run that the same command then goes on with ends with the right bits."""
    whole, run = folder / "whole", folder / trouble
    if not whole.is_dir():
        finish(CASE.command(whole))
    said = job(CASE.command(run), run, trouble)
    finish(CASE.command(run))
    return said, same(whole, run)


def main() -> None:
    """Print what each trouble led to."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for trouble in sys.argv[1:] or ("killed", "stopped", "late", "full"):
            said, equal = drill(trouble, Path(folder))
            ended = "bit-equal" if equal else "DIFFERENT"
            print(f"{trouble}: status {said.status} after {said.seconds:.0f} s; the same command then: {ended}")
            for seconds, line in said.lines:
                if line.startswith(("error: ", "waiting: ", "[rank")):
                    print(f"  {seconds:6.1f}  {line}", flush=True)


if __name__ == "__main__":
    main()
