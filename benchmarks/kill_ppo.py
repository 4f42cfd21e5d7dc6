"""Kill runs of ppo_train.py (SIGKILL) in every phase of a buffer, resume them, compare actor and critic bit for bit.

python -m benchmarks.kill_ppo [--runs 10] [--seed 1]

Each run is PPO or GRPO on the bundled toy, full or LoRA, on one process or two (tensor- or data-parallel), or holding
one model at a time. It is killed twice, at a random buffer in a phase that takes turns. As in kill.py the phase is a
fact: all processes are stopped, the run's files say where it is, and only then are they killed or let go on. The reward
is a function that notes every call, which parts sampling from judging and judging from learning.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP
from typing import Literal, NamedTuple

from benchmarks.kill import ROOT, finish, same, send, start

PPO, GRPO = {"minibatches": 2, "critic_warmup": 1}, {"advantage": "grpo", "group_size": 4, "minibatches": 2}
BUFFERS, EPISODES = 5, 16
CASES: dict[str, tuple[int, dict[str, object]]] = {
    "PPO, 1 process": (1, PPO),
    "PPO, one model at a time": (1, PPO | {"phases": True}),
    "PPO, LoRA on one base": (1, PPO | {"lora_rank": 4, "share_base": True}),
    "PPO, tp 2": (2, PPO | {"tensor_parallel_size": 2}),
    "GRPO, dp 2, LoRA": (2, GRPO | {"tensor_parallel_size": 1, "lora_rank": 4}),
}

Phase = Literal["sample", "judge", "learn", "save"]
PHASES: tuple[Phase, ...] = ("sample", "judge", "learn", "save")

REWARD = """
import time
from pathlib import Path

def digits(prompt, response, label):
    time.sleep(0.02)
    with Path(__file__).with_name("calls").open("a") as calls:
        calls.write(".")
    return sum(letter.isdigit() for letter in response) / 10
"""


class Moment(NamedTuple):
    """Where a stopped run stands: buffers that it has finished, and what it does with the next one."""

    buffers: int
    phase: Phase | None


def prepare(folder: Path) -> None:
    """The actor and the reward's function."""
    split = [
        "checkpoint_split.py",
        "--ckpt_file=dataset/toy/base",
        f"--save_path={folder / 'actor'}",
        "--n=1",
    ]
    subprocess.run([sys.executable, *split], cwd=ROOT, check=True, capture_output=True)


def command(case: str, run: Path) -> list[str]:
    """ppo_train.py for BUFFERS buffers. Each run has its own copy of the reward, whose calls lie beside it."""
    n, flags = CASES[case]
    run.mkdir(parents=True, exist_ok=True)
    (run / "reward.py").write_text(REWARD)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
    actor = run.parent / "actor"
    everywhere = {
        "actor_ckpt_dir": actor, "actor_save_dir": run / "policy", "reward": f"{run}/reward.py:digits",
        "train_file": "dataset/toy/train.json", "task": "toy", "max_buffer_size": EPISODES, "max_batch_size": 8,
        "max_steps": BUFFERS, "max_new_tokens": 24, "kl_loss": "k3", "kl_target": 0.5, "kl_horizon": 20, "lr": 1e-3,
        "save_every": 1, "resume": "auto",
    }
    if "advantage" not in flags:
        everywhere |= {"critic_ckpt_dir": actor, "critic_save_dir": run / "critic"}
    words = (f"--{name}={value}" for name, value in (everywhere | flags).items())
    return [sys.executable, *launcher, "ppo_train.py", *words]


def processes(parent: int) -> list[int]:
    """The run's processes by /proc: a launcher, ranks, and the workers of their rewards."""
    path = Path(f"/proc/{parent}/task/{parent}/children")
    children = path.read_text().split() if path.exists() else []
    return [parent, *(pid for child in children for pid in processes(int(child)))]


def where(run: Path, since: float) -> Moment:
    """What the files of a stopped run that was started then say."""
    metrics, calls = run / "policy" / "metrics.jsonl", run / "calls"
    fresh = metrics.exists() and metrics.stat().st_mtime > since
    lines = metrics.read_text().splitlines() if fresh else []
    done = max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
    if any(path.stat().st_mtime > since for path in run.glob("*/*/.partial")):
        return Moment(done, "save")
    n_calls, resumed = len(calls.read_text()) if calls.exists() else 0, int((run / "began").read_text())
    starting = not done and not n_calls  # or resuming, or sampling for the first time: the files do not tell
    unsaved = (
        done and not (run / "policy" / f"step-{done}" / "manifest.json").exists()
    )  # a save is about to begin
    if starting or unsaved or done == BUFFERS:
        return Moment(done, None)
    judged = n_calls - EPISODES * (max(done, resumed) - resumed)
    return Moment(done, "sample" if judged <= 0 else "judge" if judged < EPISODES else "learn")


def kill_in(phase: Phase, case: str, run: Path, earliest: int, rng: random.Random) -> Moment | None:
    """Start the run and kill all its processes in a phase, behind buffer `earliest`; None if it ended before."""
    words, since = command(case, run), time.time()
    (run / "calls").unlink(missing_ok=True)
    saved = (path.parent.name.removeprefix("step-") for path in run.glob("policy/step-*/manifest.json"))
    (run / "began").write_text(str(max(map(int, saved), default=0)))
    process = start(words)
    while process.poll() is None:
        time.sleep(rng.uniform(0.0, 0.05))
        pids = processes(process.pid)
        send(pids, SIGSTOP)
        moment = where(run, since)
        if (
            moment.phase == phase and moment.buffers >= earliest and rng.random() < 0.4
        ):  # not always its first moment
            send(pids, SIGKILL)
            process.communicate()
            return moment
        send(pids, SIGCONT)
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"status {process.returncode}\n{errors.decode()}")
    return None


def kill_and_compare(
    case: str, folder: Path, phases: tuple[Phase, Phase], rng: random.Random
) -> tuple[list[Moment], bool]:
    """Kill a run of a case in these phases, let it end, and compare it with one that was never killed."""
    whole, run = folder / case.replace(" ", "").replace(",", "-"), folder / "killed"
    if not (whole / "policy" / "manifest.json").exists():
        finish(command(case, whole))
    shutil.rmtree(run, ignore_errors=True)
    first = rng.randrange(BUFFERS - 2)
    moments = [kill_in(phase, case, run, first + index, rng) for index, phase in enumerate(phases)]
    finish(command(case, run))
    models = [name for name in ("policy", "critic") if (whole / name).exists()]
    return [moment for moment in moments if moment], all(same(whole / name, run / name) for name in models)


def main() -> None:
    """Print one line a run and the count of those that ended bit-equal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng, equal, kills = random.Random(options.seed), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        for index in range(options.runs):
            case = list(CASES)[index % len(CASES)]
            phases = PHASES[2 * index % 4], PHASES[(2 * index + 1) % 4]
            moments, ok = kill_and_compare(case, folder, phases, rng)
            equal, kills = equal + ok, kills + len(moments)
            killed = ", ".join(f"{moment.phase} of buffer {moment.buffers + 1}" for moment in moments)
            print(
                f"{index + 1:2} {case:26} killed in {killed}: {'bit-equal' if ok else 'DIFFERENT'}",
                flush=True,
            )
    print(f"{equal} of {options.runs} runs bit-equal to the run never killed, {kills} kills")


if __name__ == "__main__":
    main()
