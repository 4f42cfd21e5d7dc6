"""DPO beside trl's DPOTrainer, the reference's log-probs precomputed on both sides: same weights, ids and order.

python benchmarks/dpo.py [--repeats 5] [--only NAME]

CPU, float32, eager, gradient checkpointing and logging off on both sides. Every measurement is a fresh process of one
thread; ours and theirs take turns (A B B A ...). The losses of all steps must agree within 1e-4 before a time counts.
Pairs a second are given by processor time, which other work on the machine disturbs least, and by the clock. growth is
peak resident memory above what the process held before its first step, model, reference and imports included.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import sft  # noqa: E402

WARM_UP = 2  # steps that are not timed
PAIRS_A_STEP, BETA, LR = 8, 0.1, 1e-4


class Case(NamedTuple):
    """One comparison; medians of the lognormal lengths of prompts and of each response, in tokens."""

    model: str
    vocab: int
    prompt: int = 60  # GSM8K's questions and solutions are about so long
    response: int = 120
    steps: int = 8


CASES = {
    "5M 2k": Case("5M", 2048),
    "5M 32k": Case("5M", 32000, steps=4),
    "5M 2k long prompts": Case("5M", 2048, prompt=240, response=60),
    "60M 2k": Case("60M", 2048, steps=3),
}
Row = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected


def pairs(case: Case) -> list[Row]:
    """Token ids of as many pairs as all steps take."""
    rng = random.Random(7)

    def draw(median: int) -> list[int]:
        length = max(8, min(500, int(median * rng.lognormvariate(0, 0.4))))
        return [rng.randrange(4, case.vocab) for _ in range(length)]

    return [
        ([1, *draw(case.prompt)], [*draw(case.response), 2], [*draw(case.response), 2])
        for _ in range(PAIRS_A_STEP * (case.steps + WARM_UP))
    ]


def peak() -> int:
    """Peak resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Watch:
    """Processor and wall seconds at the start and behind every step, losses, and memory before the first step."""

    def __init__(self) -> None:
        self.cpu, self.wall, self.losses, self.before = [], [], [], 0

    def begin(self) -> None:
        """Call right before the first step."""
        self.before = resident()
        self.tick()

    def tick(self) -> None:
        """Call behind every step."""
        self.cpu.append(time.process_time())
        self.wall.append(time.perf_counter())

    def record(self) -> dict[str, object]:
        """What compare() reads."""
        return {
            "cpu": self.cpu,
            "wall": self.wall,
            "losses": self.losses,
            "peak": peak(),
            "before": self.before,
        }


def resident() -> int:
    """Memory that this process holds now, in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def ours(case: Case, folder: Path) -> dict[str, object]:
    """preference_train.py's own parts on the pairs."""

    from src import load, parallel
    from src.command.config import OptimizerFlags
    from src.data.encoding import Encoded
    from src.data.sampler import chunks
    from src.runlog import RunLog
    from src.training.preference import Preference, collate
    from src.training.reference import reference_logprobs
    from src.training.trainer import Trainer

    parallel.start()
    model = load.load_solver(str(folder / "ours"), trained=True)
    log = RunLog(str(folder / "log"), {})
    rows = [
        (Encoded(prompt + chosen, len(prompt)), Encoded(prompt + rejected, len(prompt)))
        for prompt, chosen, rejected in pairs(case)
    ]
    reference = reference_logprobs(
        model, rows, folder / "r.jsonl", "x", max_batch_size=2 * PAIRS_A_STEP, log=log
    )
    flags = OptimizerFlags(lr=LR, schedule="constant", warmup_ratio=0.0)
    trainer = Trainer(model, log, flags, total_steps=case.steps + WARM_UP)
    preference, watch = Preference(objective="dpo", beta=BETA), Watch()
    model.train()
    watch.begin()
    for group in chunks(rows, PAIRS_A_STEP):
        batch = collate(group, True, reference)
        trainer.backward(preference.loss(model, batch)[0] / len(group))
        watch.losses.append(trainer.step().loss)
        watch.tick()
    return watch.record()


def theirs(case: Case, folder: Path) -> dict[str, object]:
    """trl's DPOTrainer on the same ids."""
    import torch
    from transformers import LlamaForCausalLM, TrainerCallback

    from benchmarks import trl_dpo

    watch = Watch()

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            if not watch.cpu:
                watch.begin()

        def on_step_end(self, *_: object, **__: object) -> None:
            watch.tick()

    model = LlamaForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    options = {"pairs_a_step": PAIRS_A_STEP, "lr": LR, "beta": BETA, "callbacks": [Clock()]}
    trainer = trl_dpo.trainer(model, pairs(case), folder, **options)
    trainer.train()
    watch.losses = trainer.losses
    return watch.record()


def measure(name: str, side: str, folder: Path) -> dict[str, object]:
    """One side of a case in a fresh process."""
    command = [sys.executable, __file__, "--side", side, "--only", name, "--folder", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{name}, {side}:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, repeats: int) -> str:
    """The rows of one case."""
    case = CASES[name]
    found: dict[str, list[dict[str, object]]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder:
        sft.write_model(sft.Case(case.model, case.vocab), Path(folder))
        for turn in range(repeats):
            for side in ("ours", "theirs") if turn % 2 == 0 else ("theirs", "ours"):
                (Path(folder) / "r.jsonl").unlink(missing_ok=True)
                found[side].append(measure(name, side, Path(folder)))
    losses = zip(found["ours"][0]["losses"], found["theirs"][0]["losses"], strict=True)
    gap = max(abs(one - other) for one, other in losses)
    if gap > 1e-4:
        return f"{name}: losses differ by {gap:.1e}: no comparison"
    cpu, wall = ({side: rate(runs, clock) for side, runs in found.items()} for clock in ("cpu", "wall"))
    peaks, growth = (
        {side: statistics.median(number(run) for run in runs) / 2**20 for side, runs in found.items()}
        for number in (lambda run: run["peak"], lambda run: run["peak"] - run["before"])
    )
    return f"{name:20}" + "   ".join(
        f"{kind} {values['ours']:7.2f} {values['theirs']:7.2f} x{values['ours'] / values['theirs']:.2f}"
        for kind, values in (("cpu", cpu), ("wall", wall), ("peak", peaks), ("growth", growth))
    ) + f"   gap {gap:.0e}   load {os.getloadavg()[0]:.1f}"  # fmt: skip


def rate(runs: list[dict[str, object]], clock: str) -> float:
    """Pairs a second behind the warm-up, the median over runs."""
    seconds = [(run[clock][-1] - run[clock][WARM_UP]) / (len(run[clock]) - 1 - WARM_UP) for run in runs]
    return PAIRS_A_STEP / statistics.median(seconds)


def main() -> None:
    """Print the table, or measure one side as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", choices=["", *CASES])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", default="", choices=["", "ours", "theirs"])
    parser.add_argument("--folder", default="")
    options = parser.parse_args()
    if options.side:
        run = {"ours": ours, "theirs": theirs}[options.side]
        print(json.dumps(run(CASES[options.only], Path(options.folder))))
        return
    print("pairs a processor second and a second, peak memory and its growth in MiB: ours, theirs, ratio")
    for name in [options.only] if options.only else CASES:
        print(compare(name, options.repeats), flush=True)


if __name__ == "__main__":
    main()
