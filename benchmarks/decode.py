"""Decoding speed beside transformers' generate() and continuous batching, on the same random weights and prompts.

python benchmarks/decode.py --model 60M --workload ragged --rounds 2

Every measurement runs in a process of its own (two warm-up calls, then one timed call), systems take turns in
alternating order, and both sides use the same number of threads, float32, eager. Response lengths are drawn beforehand
and ended the same way everywhere: a limit for each request (for generate(), a stopping criterion for each row). The
greedy workloads must give the same tokens on both sides before a time counts.
"""

import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is on the path, ours is not

import checkpoint_split
from src import load, parallel
from src.command import cli
from src.inference.engine import Request, Vocabulary, generate
from src.inference.sampling import Sampling
from src.models import cache

MODELS: dict[str, dict[str, int]] = {
    "5M": {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4, "num_attention_heads": 8,
           "num_key_value_heads": 4, "vocab_size": 8192},
    "60M": {"hidden_size": 768, "intermediate_size": 1280, "num_hidden_layers": 8, "num_attention_heads": 12,
            "num_key_value_heads": 4, "vocab_size": 32000},
}  # fmt: skip


class Workload(NamedTuple):
    """What to decode: prompts, the tokens each sample of each gets, and whether greedily."""

    prompts: list[list[int]]
    lengths: list[list[int]]  # by prompt, by sample
    greedy: bool

    @property
    def n_tokens(self) -> int:
        """Tokens to decode, prompts left out."""
        return sum(map(sum, self.lengths))


class Measured(NamedTuple):
    """One timed call."""

    seconds: float
    cpu_seconds: float  # of all threads: what other processes on the machine change little
    peak: int  # bytes of resident memory at the most, while decoding
    growth: int  # the part of it that was not there before the first call
    tokens: list[list[int]]  # by prompt and sample


def workload(name: str, prompts: int, vocab_size: int) -> Workload:
    """The requests of a workload; lengths are log-normal with mean 128, cut at 512 or at the context."""
    draw = random.Random(0)
    n_prompts, n_samples = {"samples": (prompts // 4, 8), "single": (1, 1)}.get(name, (prompts, 1))
    n_shared, most = (700, 202) if name == "shared" else (0, 512)
    shared = [1, *(draw.randrange(3, vocab_size) for _ in range(n_shared))]
    texts = [shared + [draw.randrange(3, vocab_size) for _ in range(draw.randint(15, 120))] for _ in range(n_prompts)]
    lengths = [[min(most, max(8, round(draw.lognormvariate(4.57, 0.75)))) for _ in range(n_samples)] for _ in texts]
    return Workload(texts, [[128]] if name == "single" else lengths, greedy=name != "samples")


def first_of(work: Workload, n: int) -> Workload:
    """A short workload of the same kind, to warm up on."""
    lengths = [[min(length, 8) for length in lengths] for lengths in work.lengths[:n]]
    return Workload(work.prompts[:n], lengths, work.greedy)


def ours(folder: Path, slots: int, system: str) -> Callable[[Workload], list[list[int]]]:
    """Decoding by src/inference/engine.py, "unshared" as if the prompts had nothing in common."""
    parallel.start()
    cache.LEAST_SHARED = sys.maxsize if system == "unshared" else cache.LEAST_SHARED
    model = load.load_solver(str(folder / "ours"))

    def run(work: Workload) -> list[list[int]]:
        requests = [
            Request(str(index), sample, prompt, length)
            for index, (prompt, lengths) in enumerate(zip(work.prompts, work.lengths, strict=True))
            for sample, length in enumerate(lengths)
        ]
        sampling = Sampling(temperature=0.0 if work.greedy else 1.0, max_new_tokens=512)
        found = {
            (done.request.id, done.request.sample): done.tokens
            for done in generate(model, requests, sampling, vocabulary=Vocabulary(()), max_batch_size=slots)
        }
        return [found[request.id, request.sample] for request in requests]

    return run


def theirs(folder: Path, system: str) -> Callable[[Workload], list[list[int]]]:
    """Decoding by transformers: generate() with a dynamic or static cache, or continuous batching."""
    from transformers import GenerationConfig, LlamaForCausalLM, StoppingCriteria
    from transformers.utils import logging

    logging.set_verbosity_error()
    model = LlamaForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32, attn_implementation="sdpa").eval()

    class RowLengths(StoppingCriteria):
        """Each row ends at its own length, as EOS would end it."""

        def __init__(self, prompt_length: int, lengths: torch.Tensor) -> None:
            self.ends = prompt_length + lengths

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
            return input_ids.shape[1] >= self.ends

    def config(work: Workload, **settings: object) -> GenerationConfig:
        longest = max(map(max, work.lengths))
        sampling = {"do_sample": False} if work.greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0}
        return GenerationConfig(max_new_tokens=longest, eos_token_id=[], pad_token_id=0, **sampling, **settings)

    def run(work: Workload) -> list[list[int]]:
        lengths = torch.tensor(work.lengths)
        longest = max(map(len, work.prompts))
        rows = [torch.tensor([0] * (longest - len(prompt)) + prompt) for prompt in work.prompts]
        mask = torch.stack([torch.arange(longest) >= longest - len(prompt) for prompt in work.prompts]).long()
        settings = {"cache_implementation": "static", "disable_compile": True} if system == "static" else {}
        out = model.generate(
            torch.stack(rows), attention_mask=mask,
            generation_config=config(work, num_return_sequences=lengths.shape[1], **settings),
            stopping_criteria=[RowLengths(longest, lengths.flatten())],
        )  # fmt: skip
        return [row[longest : longest + n].tolist() for row, n in zip(out, lengths.flatten().tolist(), strict=True)]

    def run_continuously(work: Workload) -> list[list[int]]:
        samples = [(prompt, n) for prompt, ns in zip(work.prompts, work.lengths, strict=True) for n in ns]
        with model.continuous_batching_context_manager(generation_config=config(work)) as manager:
            for index, (prompt, n) in enumerate(samples):
                manager.add_request(prompt, request_id=str(index), max_new_tokens=n, eos_token_id=-1)
            found: dict[str, list[int]] = {}
            while len(found) < len(samples):
                result = manager.get_result(timeout=60)
                assert result is not None and not result.error, f"continuous batching gave {result}"
                if result.is_finished():
                    found[result.request_id] = result.generated_tokens
        return [found[str(index)] for index in range(len(samples))]

    return run_continuously if system == "continuous" else run


class Task(NamedTuple):
    """What a measurement is of; its own process reads it from a file."""

    system: str
    workload: str
    prompts: int
    slots: int
    profile: bool = False


def measure_here(folder: Path, task: Task) -> Measured:
    """Time one call in this process, after two shorter ones."""
    vocab_size = json.loads((folder / "hf/config.json").read_text(encoding="utf-8"))["vocab_size"]
    work = workload(task.workload, task.prompts, vocab_size)
    mine = task.system in ("ours", "unshared")
    run = ours(folder, task.slots, task.system) if mine else theirs(folder, task.system)
    gc.collect()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak of loading is not decoding's
    for _ in range(2):
        run(first_of(work, 4))
    if task.profile:
        _profile(run, work)
    start, cpu_start = time.perf_counter(), time.process_time()
    tokens = run(work)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = memory("VmHWM")
    return Measured(seconds, cpu_seconds, peak, peak - before, tokens)


def memory(field: str) -> int:
    """Bytes of memory of this process: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def _profile(run: Callable[[Workload], list[list[int]]], work: Workload) -> None:
    """Where the time goes, by operator."""
    with torch.profiler.profile() as profiler:
        run(work)
    averages = profiler.key_averages()
    print(averages.table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40))


def prepare(folder: Path, model: str) -> None:
    """A random Llama, for transformers and split for us."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = MODELS[model] | {"max_position_embeddings": 1024}
    config = LlamaConfig(**sizes, tie_word_embeddings=True, initializer_range=0.04)
    LlamaForCausalLM(config).save_pretrained(folder / "hf")
    config = checkpoint_split.SplitConfig(ckpt_file=str(folder / "hf"), save_path=str(folder / "ours"))
    checkpoint_split.main(config)


def in_own_process(folder: Path, task: Task, threads: int) -> Measured:
    """measure_here() in a fresh interpreter."""
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    subprocess.run(
        [sys.executable, __file__, "--folder", folder, "--measure"],
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": os.getcwd()},
        check=True,
    )
    return Measured(*json.loads((folder / "result.json").read_text(encoding="utf-8")))


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """95% bootstrap interval of the median ratio."""
    draws = np.median(np.random.default_rng(0).choice(np.array(ratios), (2000, len(ratios))), axis=1)
    return float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


def compare(folder: Path, tasks: Sequence[Task], rounds: int, threads: int) -> None:
    """Take turns, count the rows whose tokens agree, print the table."""
    found: dict[str, list[Measured]] = {task.system: [] for task in tasks}
    for index in range(rounds):
        for task in tasks if index % 2 == 0 else tasks[::-1]:
            found[task.system].append(in_own_process(folder, task, threads))
    mine = found["ours"]
    n_tokens = sum(map(len, mine[0].tokens))
    print(f"{tasks[0].workload}: {len(mine[0].tokens)} sequences, {n_tokens} tokens, {rounds} rounds, "
          f"{threads} threads, load {os.getloadavg()[0]:.1f}")
    print("system       tokens/s (median)  best  tokens/CPU s  peak MB  growth MB  alike ours/it (95%)       by CPU s")
    for system, runs in found.items():
        ratios, cpu_ratios = (
            [getattr(theirs, field) / getattr(ours, field) for theirs, ours in zip(runs, mine, strict=True)]
            for field in ("seconds", "cpu_seconds")
        )
        low, high = interval(ratios)
        alike = sum(row == other for row, other in zip(mine[0].tokens, runs[0].tokens, strict=True))
        seconds = [run.seconds for run in runs]
        print(f"{system:12} {n_tokens / np.median(seconds):12.1f} {n_tokens / min(seconds):10.1f} "
              f"{n_tokens / np.median([run.cpu_seconds for run in runs]):12.1f} "
              f"{max(run.peak for run in runs) / 1e6:9.0f} {max(run.growth for run in runs) / 1e6:9.0f} "
              f"{alike:5d}/{len(mine[0].tokens)} {np.median(ratios):7.2f} ({low:.2f} .. {high:.2f}) "
              f"{np.median(cpu_ratios):8.2f}")


def main(
    model: Literal["5M", "60M"] = "60M", workload: Literal["ragged", "samples", "single", "shared"] = "ragged",
    prompts: int = 64, rounds: int = 3, slots: int = 128, threads: int = 2,
    systems: list[str] = ["ours", "dynamic", "static", "continuous"],  # noqa: B006 (shown by --help, never changed)
    scaling: bool = False, profile: bool = False, measure: bool = False, folder: str = "",
) -> None:
    """Compare decoding with transformers.

    model: size of the random model
    workload: ragged = 64 greedy prompts; samples = 8 samples for each of 16 prompts; single = one greedy prompt;
        shared = ragged ones after the same 701 tokens
    systems: ours and what to compare with: dynamic, static (generate()), continuous (continuous batching), unshared
        (ours, each prompt read whole)
    prompts: of the ragged workload; of the samples workload a quarter of it
    rounds: measurements of each system
    slots: sequences that we decode at once at most
    threads: of both sides
    scaling: our tokens/s with 1 to 128 slots instead
    profile: print where our time goes instead
    measure: time the task that lies in folder in this process (for the script's own use)
    folder: where the models lie; default: a temporary directory
    """
    if measure:
        task = Task(*json.loads((Path(folder) / "task.json").read_text(encoding="utf-8")))
        (Path(folder) / "result.json").write_text(json.dumps(measure_here(Path(folder), task)), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(folder or temporary)
        if not (place / "ours").is_dir():
            prepare(place, model)
        if profile:
            in_own_process(place, Task("ours", workload, prompts, slots, True), threads)
        elif scaling:
            for n in (1, 2, 4, 8, 16, 32, 64, 128):
                found = in_own_process(place, Task("ours", workload, prompts, n), threads)
                n_tokens = sum(map(len, found.tokens))
                print(f"{n:4d} slots {n_tokens / found.seconds:8.1f} tokens/s {n_tokens / found.cpu_seconds:8.1f} "
                      f"tokens/CPU s, growth {found.growth / 1e6:.0f} MB")
        else:
            compare(place, [Task(system, workload, prompts, slots) for system in systems], rounds, threads)


if __name__ == "__main__":
    cli.run(main)
