"""Kill training runs (SIGKILL) in a step, a save, an evaluation; resume them; compare the final weights bit for bit.

python benchmarks/kill.py [--runs 20] [--seed 1]

Each run is solver_train.py on the bundled toy data, full or LoRA, on 1, 2 or 2 x 2 (tensor x data parallel) processes,
saving every second step, every third run in the background. It is killed twice, at a random step in a phase that takes
turns. The phase is a fact and not a guess: all processes of the run are stopped first, the run's files say what it is
in the middle of, and only when that is the phase wanted are they killed; else they go on.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
ROWS = "dataset/toy/demonstrations.json"
LAYOUTS = {"1 process": (1, 1), "tp 2": (2, 2), "dp 2": (2, 1), "tp 2 x dp 2": (4, 2)}
STEPS, SAVE_EVERY, EVAL_EVERY = 24, 2, 5

Phase = Literal["step", "save", "evaluation"]
PHASES: tuple[Phase, ...] = ("step", "save", "evaluation")


class Case(NamedTuple):
    """One way to train."""

    layout: str
    lora_rank: int
    background: bool

    def command(self, save_dir: Path) -> list[str]:
        """solver_train.py for STEPS steps."""
        n, tensor_parallel_size = LAYOUTS[self.layout]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
        flags = {
            "ckpt_dir": save_dir.parent / "split", "save_dir": save_dir, "train_file": ROWS,
            "eval_file": save_dir.parent / "held.json", "max_batch_size": 2, "packing": "true", "epochs": 100,
            "accumulation_steps": 4 * tensor_parallel_size // n, "max_steps": STEPS, "eval_every": EVAL_EVERY,
            "save_every": SAVE_EVERY, "lr": 1e-3, "lora_rank": self.lora_rank, "resume": "auto",
            "tensor_parallel_size": tensor_parallel_size, "save_dtype": "float32", "background_save": self.background,
        }
        return [sys.executable, *launcher, "solver_train.py", *(f"--{name}={value}" for name, value in flags.items())]

    def __str__(self) -> str:
        how = "LoRA" if self.lora_rank > 0 else "full"
        return f"{self.layout:12} {how} {'in the background' if self.background else 'at once':17}"


class Moment(NamedTuple):
    """Where a stopped run stands: the step that is written last to its metrics, and what it is in the middle of."""

    step: int
    phase: Phase | None


def start(words: list[str]) -> subprocess.Popen[bytes]:
    """The run in a process group of its own."""
    return subprocess.Popen(words, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(words: list[str]) -> None:
    """Let the run end."""
    process = start(words)
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"status {process.returncode}\n{errors.decode()}")


def processes(parent: int) -> list[int]:
    """The run's processes by /proc: torchrun and its workers, which have sessions of their own, or the one there is."""
    path = Path(f"/proc/{parent}/task/{parent}/children")
    return [parent, *(int(pid) for pid in path.read_text().split())] if path.exists() else [parent]


def where(run: Path, since: float) -> Moment:
    """What the files of a stopped run that was started then say; older ones are of its killed predecessor.

    Each phase leaves a mark before it begins and another at its end.
    """
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() and path.stat().st_mtime > since else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    done = max((row["step"] for row in rows if "loss" in row), default=0)
    measured = max((row["step"] for row in rows if "eval_loss" in row), default=0)
    if any(path.stat().st_mtime > since for path in run.glob("*/.partial")):
        return Moment(done, "save")
    if not done:
        return Moment(done, None)  # starting, resuming, or in the first step: the files do not tell
    if (done % EVAL_EVERY == 0 or done == STEPS) and measured != done:
        return Moment(done, "evaluation")
    if done % SAVE_EVERY == 0 or done % EVAL_EVERY == 0:  # a save may be about to begin
        return Moment(done, None)
    return Moment(done, "step" if done < STEPS else None)


def kill_in(phase: Phase, case: Case, run: Path, earliest: int, rng: random.Random) -> Moment | None:
    """Start the run and kill every process of it in a phase, behind step `earliest`; None if it ended before that."""
    since = time.time()
    process = start(case.command(run))
    while process.poll() is None:
        time.sleep(rng.uniform(0.0, 0.02))
        pids = processes(process.pid)
        send(pids, signal.SIGSTOP)
        moment = where(run, since)
        if moment.phase == phase and moment.step >= earliest and rng.random() < 0.3:  # not always its first moment
            send(pids, signal.SIGKILL)
            process.communicate()
            return moment
        send(pids, signal.SIGCONT)
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"status {process.returncode}\n{errors.decode()}")
    return None


def send(pids: list[int], number: int) -> None:
    """A signal to each that still lives."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def same(left: Path, right: Path) -> bool:
    """Whether two runs ended with the same weights."""
    names = sorted(path.name for path in left.glob("*.pth"))
    for name in names:
        one, other = torch.load(left / name), torch.load(right / name)
        if one.keys() != other.keys() or not all(torch.equal(one[key], other[key]) for key in one):
            return False
    return bool(names) and names == sorted(path.name for path in right.glob("*.pth"))


def killed_twice(case: Case, run: Path, phases: tuple[Phase, Phase], rng: random.Random) -> list[Moment]:
    """Kill a run in each of these phases; where. A phase that a run ended without meeting again is tried anew."""
    while True:
        shutil.rmtree(run, ignore_errors=True)
        first = kill_in(phases[0], case, run, rng.randint(1, 10), rng)
        second = first and kill_in(phases[1], case, run, first.step + rng.randint(0, 3), rng)
        if second:
            return [first, second]


def main() -> None:
    """Print one line a run and the count of those that ended bit-equal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    equal, met = 0, dict.fromkeys(PHASES, 0)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        split = ["checkpoint_split.py", "--ckpt_file=dataset/toy/base", f"--save_path={place / 'split'}", "--n=2"]
        subprocess.run([sys.executable, *split], cwd=ROOT, check=True, capture_output=True)
        (place / "held.json").write_text(json.dumps(json.loads((ROOT / ROWS).read_text())[:60]))
        for index in range(options.runs):
            case = Case(list(LAYOUTS)[index % 4], (-1, 8)[index // 4 % 2], index % 3 == 2)
            whole = place / f"{case.layout}{case.lora_rank}".replace(" ", "")
            if not whole.is_dir():
                finish(case._replace(background=False).command(whole))
            run = place / "killed"
            moments = killed_twice(case, run, (PHASES[index % 3], PHASES[(index + 1 + index // 3 % 2) % 3]), rng)
            finish(case.command(run))
            ok = same(whole, run)
            equal += ok
            for moment in moments:
                met[moment.phase] += 1
            text = ", ".join(f"{moment.phase} {moment.step + (moment.phase == 'step')}" for moment in moments)
            print(f"{index + 1:2} {case}  killed in {text}: {'bit-equal' if ok else 'DIFFERENT'}", flush=True)
            shutil.rmtree(run)
    counts = ", ".join(f"{n} in a {phase}" for phase, n in met.items())
    print(f"{equal} of {options.runs} bit-equal to the run never killed; kills: {counts}")


if __name__ == "__main__":
    main()
