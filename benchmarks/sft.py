"""Supervised fine-tuning beside trl's SFTTrainer, and LoRA beside peft: same weights, same token ids, same order.

python benchmarks/sft.py [--repeats 7] [--only "padded 5M 2k,LoRA 5M 2k"] [--steps 3] [--profile]

CPU, float32, eager, logging and gradient checkpointing off on both sides. Every measurement is a fresh process of one
thread, timed in processor seconds, which other work on the machine disturbs least, and by the clock; the sides take
turns (A B C C B A ...). The losses of both must agree within 1e-4 before a time counts: step by step, or as the mean
over the same samples where trl packs (its packs hold other samples).

Ours runs twice beside a peer that pads: as it does by default, a step's rows laid end to end, and padded like the peer.
Rates count real tokens, padding not. --profile shows instead where our step's time goes.
"""

import argparse
import functools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
WARM_UP = 2  # steps that are not timed
BATCH, MAX_LENGTH = 8, 512
MODELS = {
    "5M": {"dim": 256, "layers": 4, "heads": 4, "ffn": 688},
    "60M": {"dim": 768, "layers": 8, "heads": 12, "ffn": 2048},
}


Run = dict[
    str, object
]  # what one process measured: losses, supervised tokens and times of its steps, peak memory


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


CASES = {
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


def now() -> tuple[float, float]:
    """Processor seconds of this process, and the clock."""
    return time.process_time(), time.perf_counter()


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


def write_model(case: Case, folder: Path) -> None:
    """Random weights as a Hugging Face directory and, split, as ours."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from src.checkpoint.sources import open_source
    from src.checkpoint.split import split

    size = MODELS[case.model]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocab,
        hidden_size=size["dim"],
        intermediate_size=size["ffn"],
        max_position_embeddings=2048,
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["heads"],
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "hf")
    split(open_source(str(folder / "hf")), folder / "ours", 1, "", "", "benchmark")


def ours(case: Case, folder: Path, *, packing: bool = True) -> dict[str, object]:
    """Our Trainer on the samples, the rows of a step end to end or padded."""

    from src import load, parallel
    from src.command.config import LoraFlags, OptimizerFlags
    from src.data.batch import make_batch
    from src.data.encoding import Encoded
    from src.data.sampler import chunks
    from src.runlog import RunLog
    from src.training.sft import n_supervised, sft_loss
    from src.training.trainer import Trainer

    parallel.start()
    model = load.load_solver(str(folder / "ours"), trained=True)
    names = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
    lora = LoraFlags(lora_rank=16 if case.lora else -1, lora_alpha=32.0, lora_targets=names)
    load.put_lora_on(model, load.lora_config(lora), seed=1)
    flags = OptimizerFlags(lr=0.0 if case.packing else 1e-4, schedule="constant", warmup_ratio=0.0)
    trainer = Trainer(model, RunLog(str(folder / "log"), {}), flags, total_steps=case.steps + WARM_UP)
    model.train()
    losses, counts, times = [], [], [now()]
    rows = [Encoded(*row) for row in samples(case)]
    for group in chunks(rows, case.rows_a_step):
        batch = make_batch(group, packing=packing)
        trainer.backward(sft_loss(model, batch) / n_supervised([batch]))
        losses.append(trainer.step().loss)
        counts.append(n_supervised([batch]))
        times.append(now())
    return {"losses": losses, "supervised": counts, "times": times}


def theirs(case: Case, folder: Path) -> dict[str, object]:
    """trl's SFTTrainer, or for LoRA peft's model in a plain loop over transformers' loss."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    rows = [{"input_ids": ids, "labels": [-100] * start + ids[start:]} for ids, start in samples(case)]
    return _peft(model, rows, case.rows_a_step) if case.lora else _trl(case, model, rows, folder)


def _trl(case: Case, model: object, rows: Sequence[dict[str, list[int]]], folder: Path) -> dict[str, object]:
    import datasets
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times, losses, counts = [], [], []

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            times.append(now())

        def on_step_end(self, *_: object, **__: object) -> None:
            times.append(now())

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(
            self, model: object, inputs: dict[str, torch.Tensor], **options: object
        ) -> torch.Tensor:
            counts.append(int((inputs["labels"][:, 1:] != -100).sum()))
            loss = super().compute_loss(model, inputs, **options)
            losses.append(loss.item())
            return loss

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 1, "<pad>": 0, "<eos>": 2}, unk_token="a")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    settings = SFTConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=2 if case.packing else case.rows_a_step,
        num_train_epochs=1,
        learning_rate=0.0 if case.packing else 1e-4,
        lr_scheduler_type="constant",
        warmup_steps=0,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        packing=case.packing,
        max_length=MAX_LENGTH,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    InOrder(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_list(list(rows)),
        processing_class=tokenizer,
        callbacks=[Watch()],
    ).train()
    return {"losses": losses, "supervised": counts, "times": times}


def _peft(model: object, rows: Sequence[dict[str, list[int]]], n: int) -> dict[str, object]:
    import peft
    import torch

    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    model.train()
    losses, counts, times = [], [], [now()]
    for start in range(0, len(rows), n):
        group = rows[start : start + n]
        longest = max(len(row["input_ids"]) for row in group)
        padded = {
            key: torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in group])
            for key, fill in (("input_ids", 0), ("labels", -100))
        }
        attention = torch.arange(longest) < torch.tensor([[len(row["input_ids"])] for row in group])
        loss = model(**padded, attention_mask=attention.long(), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        counts.append(int((padded["labels"][:, 1:] != -100).sum()))
        times.append(now())
    return {"losses": losses, "supervised": counts, "times": times}


def profile(case: Case, folder: Path) -> None:
    """Print which operators our steps spend their time in."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        ours(case, folder)
    spent = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in spent)
    for event in spent[:12]:
        print(f"{event.self_cpu_time_total / total:7.1%}  {event.count:6}  {event.key}")


SIDES = {
    "ours": ours,
    "ours, padded": functools.partial(ours, packing=False),
    "theirs": theirs,
}


def measure(name: str, side: str, folder: Path, steps: int) -> dict[str, object]:
    """One side of a case in a fresh process."""
    command = [
        sys.executable,
        __file__,
        "--side",
        side,
        "--only",
        name,
        "--folder",
        str(folder),
        "--steps",
        str(steps),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{name}, {side}:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, case: Case, repeats: int) -> list[str]:
    """The rows of one case: ours on each of its sides beside theirs."""
    sides = ["ours", "theirs"] if case.packing or not case.median_length else list(SIDES)
    found: dict[str, list[dict[str, object]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        write_model(case, Path(folder))
        for turn in range(repeats):
            for side in sides if turn % 2 == 0 else reversed(sides):
                found[side].append(measure(name, side, Path(folder), case.steps))
    return [row(name, case, side, found[side], found["theirs"]) for side in sides if side != "theirs"]


def row(name: str, case: Case, side: str, own: Sequence[Run], theirs: Sequence[Run]) -> str:
    """One line of the table."""
    gap = loss_gap(case, own[0], theirs[0])
    label = name + side.removeprefix("ours")
    if gap > 1e-4:
        return f"{label:24}losses differ by {gap:.1e}: no comparison"
    rates = [[rate(case, run, 0) for run in runs] for runs in (own, theirs)]
    fast = [statistics.median(values) for values in rates]
    by_clock = [statistics.median(rate(case, run, 1) for run in runs) for runs in (own, theirs)]
    peaks = [min(run["peak"] for run in runs) / 2**20 for runs in (own, theirs)]
    return (
        f"{label:24}{fast[0]:7.0f} (best {max(rates[0]):.0f}) {fast[1]:7.0f} (best {max(rates[1]):.0f})  "
        f"x{fast[0] / fast[1]:.2f}    x{by_clock[0] / by_clock[1]:.2f}   "
        f"{peaks[0]:6.0f} {peaks[1]:6.0f} MiB x{peaks[0] / peaks[1]:.2f}   {gap:.0e}"
    )


def loss_gap(case: Case, left: Run, right: Run) -> float:
    """How far the two sides' losses lie apart; LoRA's A is drawn differently, so only its first loss is the same."""
    if case.packing:
        means = [
            sum(map(float.__mul__, side["losses"], map(float, side["supervised"]))) / sum(side["supervised"])
            for side in (left, right)
        ]
        return abs(means[0] - means[1])
    pairs = list(zip(left["losses"], right["losses"], strict=True))[: 1 if case.lora else None]
    return max(abs(one - other) for one, other in pairs)


def rate(case: Case, run: Run, clock: int) -> float:
    """Real tokens a processor second (clock 0) or second (1) behind the warm-up, prompts included, padding not."""
    total, supervised = sum(len(ids) for ids, _ in samples(case)), run["supervised"]
    share = sum(supervised[WARM_UP:]) / sum(supervised)
    return total * share / (run["times"][-1][clock] - run["times"][WARM_UP][clock])


def main() -> None:
    """Print the table, or measure one side as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(CASES), help="rows, with commas between")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--steps", type=int, default=0, help="timed steps of each run; default: those of the case"
    )
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--side", default="", choices=["", *SIDES])
    parser.add_argument("--folder", default="")
    options = parser.parse_args()
    cases = {name: CASES[name] for name in options.only.split(",")}
    if options.steps:
        cases = {name: case._replace(steps=options.steps) for name, case in cases.items()}
    if options.side:
        (case,) = cases.values()
        result = SIDES[options.side](case, Path(options.folder))
        result["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(result))
        return
    if options.profile:
        for name, case in cases.items():
            print(name)
            with tempfile.TemporaryDirectory() as folder:
                write_model(case, Path(folder))
                profile(case, Path(folder))
        return
    print(f"load {os.getloadavg()[0]:.1f} at the start")
    print(
        f"{'':24}{'tokens/cpu-s ours':>22} {'theirs':>19}   by cpu  by clock   "
        f"peak resident memory ours, theirs   loss gap"
    )
    for name, case in cases.items():
        for line in compare(name, case, options.repeats):
            print(line, flush=True)
    print(f"load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
