"""What the benchmarks beside other libraries share: random models, sides measured in turns, and the table.

A side is one way to compute the same, "ours" or a library with a setting. Each measurement is a fresh process of one
thread; sides take turns (A B C C B A ...), and a ratio is the median over turns, so that load disturbs both alike.
"""

import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, the repository is not
WARM_UP = 2  # steps that are not timed
MODELS = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
    "5M": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 688},
    "60M": {"hidden_size": 768, "num_hidden_layers": 8, "num_attention_heads": 12, "intermediate_size": 2048},
}
Run = dict[str, object]  # what one measurement gave: what Watch.record() says, and the side's own figures


def write_model(folder: Path, size: str, vocab_size: int, **settings: object) -> None:
    """Random weights as a Hugging Face directory, folder/hf, and as ours, folder/ours."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**{
        "vocab_size": vocab_size, "max_position_embeddings": 2048, "tie_word_embeddings": False, "pad_token_id": 0,
        "num_key_value_heads": MODELS[size]["num_attention_heads"], **MODELS[size], **settings,
    })
    save_model(LlamaForCausalLM(config), folder)


def save_model(model: object, folder: Path) -> None:
    """A model of transformers as a Hugging Face directory, folder/hf, and as ours, folder/ours."""
    from src.checkpoint.sources import open_source
    from src.checkpoint.split import split

    model.save_pretrained(folder / "hf")
    split(open_source(str(folder / "hf")), folder / "ours", 1, "benchmark")


def memory(field: str) -> int:
    """Bytes of resident memory of this process: VmRSS now, VmHWM at its peak (getrusage's includes the parent's)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


class Watch:
    """A side's steps: the loss and the amount of work of each, processor seconds and the clock after it, and memory."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.work: list[float] = []
        self.times: list[tuple[float, float]] = []
        self.middles: list[tuple[float, float]] = []
        self.before = 0

    def start(self) -> None:
        """Call right before the first step."""
        self.before = memory("VmRSS")
        self.tick()

    def collected(self) -> None:
        """Call between sampling and learning, in a step that has both."""
        self.middles.append((time.process_time(), time.perf_counter()))

    def tick(self) -> None:
        """Call after each step."""
        self.times.append((time.process_time(), time.perf_counter()))

    def record(self) -> Run:
        """What the functions below and the tables read."""
        peak = memory("VmHWM")
        return {
            "losses": self.losses, "work": self.work, "times": self.times, "middles": self.middles, "peak": peak,
            "growth": peak - self.before,
        }


def rate(run: Run, clock: int, warm_up: int = WARM_UP) -> float:
    """Work a processor second (clock 0) or second (1) after the steps that warm up."""
    times = run["times"]
    return sum(run["work"][warm_up:]) / (times[-1][clock] - times[warm_up][clock])


def run_side(script: str, side: str, name: str, folder: Path, *more: str, python: str = sys.executable) -> Run:
    """One measurement of a script, which prints it as JSON, in a process of its own."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    words = [python, script, "--side", side, "--only", name, "--folder", str(folder), *more]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"status {done.returncode}"
        raise SystemExit(f"{name}, {side} failed ({how})\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def in_turns(sides: Sequence[str], repeats: int, measure: Callable[[str], Run]) -> dict[str, list[Run]]:
    """Every side `repeats` times, forwards and backwards in turn."""
    found: dict[str, list[Run]] = {side: [] for side in sides}
    for turn in range(repeats):
        for side in sides if turn % 2 == 0 else reversed(sides):
            found[side].append(measure(side))
    return found


def table(
    title: str, found: Mapping[str, Sequence[Run]], columns: Mapping[str, Callable[[Run], float]],
    gaps: Mapping[str, tuple[float, float]],
) -> str:
    """A line for each side with the medians of its columns and its gap; then our best side beside their best.

    The first two columns are rates, by processor seconds and by the clock; "best ours" is our fastest side's first rate
    as a multiple of the row's. gaps: how far a side's results lie from those of "ours", and how far they may; what lies
    farther is marked and not compared.
    """
    lines = [f"{title}\n{'':22}" + "".join(f"{name:>14}" for name in columns) + "   best ours      gap"]
    by_cpu, by_clock = list(columns.values())[:2]
    kept = [side for side in found if gaps[side][0] <= gaps[side][1]]
    speed = {side: statistics.median(map(by_cpu, found[side])) for side in kept}
    ours = max((side for side in kept if side.startswith("ours")), key=speed.get, default=None)
    theirs = max((side for side in kept if not side.startswith("ours")), key=speed.get, default=None)
    for side, runs in found.items():
        figures = "".join(f"{statistics.median(map(of, runs)):14.5g}" for of in columns.values())
        times = f"x{ratio(found[ours], runs, by_cpu):.2f}" if ours and side in kept else "too far off"
        lines.append(f"{side:22}{figures}{times:>12}  {gaps[side][0]:.0e}")
    if ours and theirs:
        both = [ratio(found[ours], found[theirs], of) for of in (by_cpu, by_clock)]
        lines.append(f"{ours} / {theirs}: x{both[0]:.2f} by processor seconds, x{both[1]:.2f} by the clock")
    return "\n".join(lines)


def ratio(ours: Sequence[Run], theirs: Sequence[Run], of: Callable[[Run], float]) -> float:
    """The median over turns of one side's figure as a multiple of the other's."""
    return statistics.median(of(one) / of(other) for one, other in zip(ours, theirs, strict=True))


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """95% bootstrap interval of the median ratio."""
    import numpy as np

    medians = np.median(np.random.default_rng(0).choice(np.array(ratios), (2000, len(ratios))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def machine(*libraries: str) -> str:
    """The processor with what its matrix products may use, the libraries' versions, and the load."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    units = {"avx2": "AVX2", "avx512f": "AVX512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX"}
    has = [name for flag, name in units.items() if flag in facts.get("flags", "").split()]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", *libraries))
    return (
        f"{facts.get('model name', 'unknown processor')} with {', '.join(has)}, {os.cpu_count()} cores, one thread; "
        f"{versions}; load {os.getloadavg()[0]:.1f}"
    )
