"""Kill training runs with SIGKILL at random moments, resume them, and compare the final weights bit for bit.

python benchmarks/kill.py [--runs 20] [--seed 1]

Each run is solver_train.py on the bundled toy data, full or LoRA, on 1, 2 or 2 x 2 (tensor x data parallel) processes,
saving every second step. It is killed twice: in a step, a save or an evaluation, wherever the clock finds it.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = {"1 process": (1, 1), "tp 2": (2, 2), "dp 2": (2, 1), "tp 2 x dp 2": (4, 2)}


def command(n: int, tensor_parallel_size: int, lora_rank: int, save_dir: Path) -> list[str]:
    """solver_train.py for 24 steps."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
    flags = {
        "ckpt_dir": save_dir.parent / "split", "save_dir": save_dir, "train_file": "dataset/toy/demonstrations.json",
        "eval_file": "dataset/toy/demonstrations.json", "max_batch_size": 2, "packing": "true", "epochs": 100,
        "accumulation_steps": 4 * tensor_parallel_size // n, "max_steps": 24, "eval_every": 5, "save_every": 2,
        "lr": 1e-3, "lora_rank": lora_rank, "tensor_parallel_size": tensor_parallel_size, "resume": "auto",
        "save_dtype": "float32",
    }  # fmt: skip
    return [
        sys.executable,
        *launcher,
        "solver_train.py",
        *(f"--{name}={value}" for name, value in flags.items()),
    ]


def start(words: list[str]) -> subprocess.Popen[bytes]:
    """The run in a process group of its own, so that all of it can be killed at once."""
    return subprocess.Popen(
        words, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(words: list[str]) -> float:
    """Let the run end; how many seconds it took."""
    began = time.monotonic()
    process = start(words)
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"status {process.returncode}\n{errors.decode()}")
    return time.monotonic() - began


def kill_in_the_middle(words: list[str], seconds: float) -> None:
    """Start the run and kill every process of it after so many seconds."""
    process = start(words)
    time.sleep(seconds)
    for rank in children(process.pid):  # torchrun gives its workers sessions of their own
        os.kill(rank, signal.SIGKILL)
    process.kill()
    process.communicate()


def children(parent: int) -> list[int]:
    """Processes that this one has started, by /proc."""
    path = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def same(left: Path, right: Path) -> bool:
    """Whether two runs ended with the same weights."""
    names = sorted(path.name for path in left.glob("*.pth"))
    for name in names:
        one, other = torch.load(left / name), torch.load(right / name)
        if one.keys() != other.keys() or not all(torch.equal(one[key], other[key]) for key in one):
            return False
    return bool(names) and names == sorted(path.name for path in right.glob("*.pth"))


def main() -> None:
    """Print one line a run and the count of those that ended bit-equal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    equal = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        split = [
            "checkpoint_split.py",
            "--ckpt_file=dataset/toy/base",
            f"--save_path={place / 'split'}",
            "--n=2",
        ]
        subprocess.run([sys.executable, *split], cwd=ROOT, check=True, capture_output=True)
        lasted: dict[tuple[str, int], float] = {}
        for index in range(options.runs):
            layout, lora_rank = list(LAYOUTS)[index % 4], (-1, 8)[index // 4 % 2]
            whole = place / f"{layout}{lora_rank}".replace(" ", "")
            if (layout, lora_rank) not in lasted:
                lasted[layout, lora_rank] = finish(command(*LAYOUTS[layout], lora_rank, whole))
            run = place / "killed"
            words = command(*LAYOUTS[layout], lora_rank, run)
            moments = [rng.uniform(0.2, 1.0) * lasted[layout, lora_rank] for _ in range(2)]
            reached = []
            for moment in moments:
                kill_in_the_middle(words, moment)
                reached.append(max((int(path.name[5:]) for path in run.glob("step-*")), default=0))
            finish(words)
            ok = same(whole, run)
            equal += ok
            print(
                f"{index + 1:2} {layout:12} {'LoRA' if lora_rank > 0 else 'full'}  killed behind steps {reached}: "
                f"{'bit-equal' if ok else 'DIFFERENT'}",
                flush=True,
            )
            shutil.rmtree(run)
    print(f"{equal} of {options.runs} bit-equal to the run never killed")


if __name__ == "__main__":
    main()
