"""Supervised fine-tuning beside trl's SFTTrainer, and LoRA beside peft: same weights, same token ids, same order.

python benchmarks/sft.py [--only "padded 60M 2k,LoRA 60M 2k"] [--repeats 3] [--steps 3] [--profile]

On a CPU, eager, logging and gradient checkpointing off on both sides. bfloat16 is --precision bfloat16 here and
autocast there, both over float32 weights. The losses must agree before a time counts: in float32 within 1e-4, step by
step, or as the mean over the same samples where trl packs (its packs hold other samples); in bfloat16 within 0.02.

Ours runs twice beside a peer that pads: as it does by default, a step's rows laid end to end, and padded like the peer.
Rates count real tokens, padding not. --profile shows instead where our step's time goes.
"""

import argparse
import functools
import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import paired  # noqa: E402
from benchmarks.paired import WARM_UP, Run, Watch  # noqa: E402

BATCH, MAX_LENGTH = 8, 512


class Case(NamedTuple):
    """One comparison. median_length: of the lognormal sample lengths; 0 = all of MAX_LENGTH, one a batch."""

    model: str
    vocab: int
    packing: bool = False
    lora: bool = False
    steps: int = 10
    median_length: int = 120

    @property
    def rows_a_step(self) -> int:
        """Samples of an optimizer step."""
        return BATCH if self.median_length else 1

    @property
    def lr(self) -> float:
        """0 where trl packs: its steps hold other samples, so weights must stay for losses to be compared."""
        return 0.0 if self.packing else 1e-4


CASES = {
    "padded tiny": Case("tiny", 512, steps=2, median_length=20),
    "packed tiny": Case("tiny", 512, packing=True, steps=8, median_length=40),
    "LoRA tiny": Case("tiny", 512, lora=True, steps=2, median_length=20),
    "padded 5M 2k": Case("5M", 2048),
    "padded 5M 32k": Case("5M", 32000),
    "padded 60M 2k": Case("60M", 2048, steps=5),
    "padded 60M 32k": Case("60M", 32000, steps=5),
    "packed 5M 2k": Case("5M", 2048, packing=True),
    "packed 60M 2k": Case("60M", 2048, packing=True, steps=5),
    "LoRA 5M 2k": Case("5M", 2048, lora=True),
    "LoRA 60M 2k": Case("60M", 2048, lora=True, steps=5),
    "memory 152k": Case("5M", 151936, steps=3, median_length=0),
    "memory 152k LoRA": Case("5M", 151936, lora=True, steps=3, median_length=0),
}


def samples(case: Case) -> list[tuple[list[int], int]]:
    """Token ids and where the response begins, GSM8K-like: a third prompt, lognormal lengths."""
    rng = random.Random(7)
    rows = []
    for _ in range(case.rows_a_step * (case.steps + WARM_UP)):
        drawn = case.median_length * rng.lognormvariate(0, 0.5) if case.median_length else MAX_LENGTH
        length = max(16, min(MAX_LENGTH, int(drawn)))
        start = length // 3 if case.median_length else 1
        rows.append(([rng.randrange(4, case.vocab) for _ in range(length)], start))
    return rows


def ours(case: Case, folder: Path, *, packing: bool = True, precision: str = "float32") -> Run:
    """Our Trainer on the samples, the rows of a step end to end or padded."""
    from src import load, parallel
    from src.command.config import LoraFlags, OptimizerFlags
    from src.data.batch import chunks, make_batch
    from src.data.encoding import Encoded
    from src.runlog import RunLog
    from src.training.sft import n_supervised, sft_loss
    from src.training.trainer import Trainer

    parallel.start()
    model = load.load_solver(str(folder / "ours"), precision=precision, trained=load.Trained())
    lora = LoraFlags(lora_rank=16, lora_alpha=32.0) if case.lora else LoraFlags()
    load.put_lora_on(model, load.lora_config(lora), seed=1)
    flags = OptimizerFlags(lr=case.lr, schedule="constant", warmup_ratio=0.0)
    trainer = Trainer(model, RunLog(str(folder / "log"), {}), flags, total_steps=case.steps + WARM_UP)
    model.train()
    rows, watch = [Encoded(*row) for row in samples(case)], Watch()
    watch.start()
    for group in chunks(rows, case.rows_a_step):
        batch = make_batch(group, packing=packing)
        trainer.backward(sft_loss(model, batch) / n_supervised([batch]))
        watch.losses.append(trainer.step().loss)
        watch.work.append(n_supervised([batch]))
        watch.tick()
    return watch.record()


def theirs(case: Case, folder: Path, *, bf16: bool) -> Run:
    """trl's SFTTrainer, or for LoRA peft's model in a plain loop over transformers' loss."""
    import torch
    from transformers import LlamaForCausalLM

    model, watch = LlamaForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32), Watch()
    rows = [{"input_ids": ids, "labels": [-100] * start + ids[start:]} for ids, start in samples(case)]
    if case.lora:
        train_peft(model, rows, watch, n=case.rows_a_step, bf16=bf16)
    else:
        from benchmarks import trl_sft

        n = 2 if case.packing else case.rows_a_step
        trl_sft.train(model, rows, folder, watch, rows_a_step=n, max_length=MAX_LENGTH, packing=case.packing,
                      bf16=bf16, lr=case.lr)
    return watch.record()


def train_peft(model: object, rows: Sequence[dict[str, list[int]]], watch: Watch, *, n: int, bf16: bool) -> None:
    """peft's LoRA on every linear layer, n rows a step, in one epoch."""
    import peft
    import torch

    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    model.train()
    watch.start()
    for start in range(0, len(rows), n):
        group = rows[start : start + n]
        longest = max(len(row["input_ids"]) for row in group)
        padded = {
            key: torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in group])
            for key, fill in (("input_ids", 0), ("labels", -100))
        }
        attention = torch.arange(longest) < torch.tensor([[len(row["input_ids"])] for row in group])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**padded, attention_mask=attention.long(), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.losses.append(loss.item())
        watch.work.append(int((padded["labels"][:, 1:] != -100).sum()))
        watch.tick()


def sides(case: Case) -> dict[str, Callable[[Case, Path], Run]]:
    """What is compared in a case."""
    peer = "peft" if case.lora else "trl, packed" if case.packing else "trl"
    own = {"ours": ours, "ours, bfloat16": functools.partial(ours, precision="bfloat16")}
    if not case.packing and case.median_length:
        own["ours, padded"] = functools.partial(ours, packing=False)
    return own | {
        f"{peer}{', bfloat16' if bf16 else ''}": functools.partial(theirs, bf16=bf16) for bf16 in (False, True)
    }


def compare(name: str, case: Case, repeats: int) -> str:
    """The table of one case."""
    scale = sum(len(ids) for ids, _ in samples(case))  # a run's work is all its samples' learnt tokens
    with tempfile.TemporaryDirectory() as folder:
        paired.write_model(Path(folder), case.model, case.vocab)
        more = ("--steps", str(case.steps))
        found = paired.in_turns(
            list(sides(case)), repeats,
            lambda side: paired.run_side(__file__, side, name, Path(folder), *more))
    columns = {
        "tokens/cpu s": lambda run: paired.rate(run, 0) * scale / sum(run["work"]),
        "tokens/s": lambda run: paired.rate(run, 1) * scale / sum(run["work"]),
        "peak MiB": lambda run: run["peak"] / 2**20,
    }
    gaps = {
        side: (loss_gap(case, found["ours"][0], runs[0]), 0.02 if "bfloat16" in side else 1e-4)
        for side, runs in found.items()
    }
    return paired.table(name, found, columns, gaps)


def loss_gap(case: Case, left: Run, right: Run) -> float:
    """How far two sides' losses lie apart; LoRA's A is random and each side's own, so its first loss alone is alike."""
    if case.packing:
        means = [
            sum(loss * n for loss, n in zip(run["losses"], run["work"], strict=True)) / sum(run["work"])
            for run in (left, right)
        ]
        return abs(means[0] - means[1])
    pairs = list(zip(left["losses"], right["losses"], strict=True))[: 1 if case.lora else None]
    return max(abs(one - other) for one, other in pairs)


def profile(name: str, case: Case) -> None:
    """Print which operators our steps spend their time in."""
    import torch

    print(name)
    with tempfile.TemporaryDirectory() as folder:
        paired.write_model(Path(folder), case.model, case.vocab)
        for precision in ("float32", "bfloat16"):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
                ours(case, Path(folder), precision=precision)
            spent = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
            total = sum(event.self_cpu_time_total for event in spent)
            print(precision)
            for event in spent[:12]:
                print(f"{event.self_cpu_time_total / total:7.1%}  {event.count:6}  {event.key}")


def main() -> None:
    """Print the tables, or measure one side as JSON."""
    parser = argparse.ArgumentParser()
    everything = ",".join(name for name in CASES if "tiny" not in name)
    parser.add_argument("--only", default=everything, help="cases, with commas between")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="timed steps of each run; default: those of the case")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--side", default="", help="measure this side alone (for the script's own use)")
    parser.add_argument("--folder", default="")
    options = parser.parse_args()
    cases = {name: CASES[name] for name in options.only.split(",")}
    if options.steps:
        cases = {name: case._replace(steps=options.steps) for name, case in cases.items()}
    if options.side:
        (case,) = cases.values()
        print(json.dumps(sides(case)[options.side](case, Path(options.folder))))
        return
    print(paired.machine("trl", "transformers", "peft"))
    for name, case in cases.items():
        if options.profile:
            profile(name, case)
        else:
            print(compare(name, case, options.repeats), flush=True)


if __name__ == "__main__":
    main()
