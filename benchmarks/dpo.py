"""DPO beside trl's DPOTrainer, the reference's log-probs precomputed on both sides: same weights, ids and order.

python benchmarks/dpo.py [--only "5M 2k,60M 2k"] [--repeats 3]

On a CPU, eager, gradient checkpointing and logging off on both sides; bfloat16 is --precision bfloat16 here and
autocast there. The losses of all steps must agree within 1e-4 before a time counts, in bfloat16 within 0.05. growth is
peak resident memory above what the process held before its first step, model, reference and imports included.
"""

import argparse
import functools
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import paired  # noqa: E402
from benchmarks.paired import WARM_UP, Run, Watch  # noqa: E402

PAIRS_A_STEP, BETA, LR = 8, 0.1, 1e-4


class Case(NamedTuple):
    """One comparison; medians of the lognormal lengths of prompts and of each response, in tokens."""

    model: str
    vocab: int
    prompt: int = 60  # GSM8K's questions and solutions are about so long
    response: int = 120
    steps: int = 8


CASES = {
    "tiny": Case("tiny", 512, prompt=10, response=20, steps=2),
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


def ours(case: Case, folder: Path, *, precision: str = "float32") -> Run:
    """preference_train.py's own parts on the pairs."""

    from src import load, parallel
    from src.command.config import OptimizerFlags
    from src.data.batch import chunks
    from src.data.encoding import Encoded
    from src.runlog import RunLog
    from src.training.preference import Preference, collate_sides
    from src.training.reference import reference_logprobs
    from src.training.trainer import Trainer

    parallel.start()
    model = load.load_solver(str(folder / "ours"), precision=precision, trained=load.Trained())
    log = RunLog(str(folder / "log"), {})
    rows = [
        (Encoded(prompt + chosen, len(prompt)), Encoded(prompt + rejected, len(prompt)))
        for prompt, chosen, rejected in pairs(case)
    ]
    scored = folder / "reference.jsonl"
    scored.unlink(missing_ok=True)  # of the side before
    reference = reference_logprobs(model, rows, scored, "x", max_batch_size=2 * PAIRS_A_STEP, log=log)
    flags = OptimizerFlags(lr=LR, schedule="constant", warmup_ratio=0.0)
    trainer = Trainer(model, log, flags, total_steps=case.steps + WARM_UP)
    preference, watch = Preference(objective="dpo", beta=BETA), Watch()
    model.train()
    watch.start()
    for group in chunks(rows, PAIRS_A_STEP):
        batch = collate_sides(group, True, reference)
        trainer.backward(preference.loss(model, batch)[0] / len(group))
        watch.losses.append(trainer.step().loss)
        watch.work.append(len(group))
        watch.tick()
    return watch.record()


def theirs(case: Case, folder: Path, *, bf16: bool = False) -> Run:
    """trl's DPOTrainer on the same ids."""
    import torch
    from transformers import LlamaForCausalLM

    from benchmarks import trl_dpo
    from benchmarks.trl_common import Clock

    watch = Watch()
    model = LlamaForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    options = {"pairs_a_step": PAIRS_A_STEP, "lr": LR, "beta": BETA, "callbacks": [Clock(watch)], "bf16": bf16}
    trainer = trl_dpo.trainer(model, pairs(case), folder, **options)
    trainer.train()
    watch.losses = trainer.losses
    watch.work = [PAIRS_A_STEP] * len(trainer.losses)
    return watch.record()


SIDES = {
    "ours": ours, "ours, bfloat16": functools.partial(ours, precision="bfloat16"),
    "trl": theirs, "trl, bfloat16": functools.partial(theirs, bf16=True),
}


def compare(name: str, repeats: int) -> str:
    """The table of one case."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        paired.write_model(Path(folder), case.model, case.vocab)
        found = paired.in_turns(
            list(SIDES), repeats, lambda side: paired.run_side(__file__, side, name, Path(folder)))
    columns = {
        "pairs/cpu s": lambda run: paired.rate(run, 0),
        "pairs/s": lambda run: paired.rate(run, 1),
        "peak MiB": lambda run: run["peak"] / 2**20,
        "growth MiB": lambda run: run["growth"] / 2**20,
    }
    base, gaps = found["ours"][0]["losses"], {}
    for side, runs in found.items():
        gap = max(abs(one - other) for one, other in zip(base, runs[0]["losses"], strict=True))
        gaps[side] = (gap, 0.05 if "bfloat16" in side else 1e-4)
    return paired.table(name, found, columns, gaps)


def main() -> None:
    """Print the tables, or measure one side as JSON."""
    parser = argparse.ArgumentParser()
    everything = ",".join(name for name in CASES if name != "tiny")
    parser.add_argument("--only", default=everything, help="cases, with commas between")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", default="", choices=["", *SIDES])
    parser.add_argument("--folder", default="")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(SIDES[options.side](CASES[options.only], Path(options.folder))))
        return
    print(paired.machine("trl", "transformers"))
    for name in options.only.split(","):
        print(compare(name, options.repeats), flush=True)


if __name__ == "__main__":
    main()
