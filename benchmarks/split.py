"""Memory and speed of splitting a checkpoint, beside `cp` of the same bytes and beside loading everything first.

python benchmarks/split.py --folder /scratch

Writes a random 1.1B-parameter bfloat16 Llama (2.2 GB) once, then in turns: `cp`, our split into 8 shards, and the
naive way (load all, cut all, torch.save all). Every side ends with its files on the disk (fsync). Memory is the
peak of RssAnon in /proc/PID/status, sampled every 5 ms: what a process holds beyond files it maps.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, the repository is not

from src.checkpoint.convert import to_hf_name  # noqa: E402
from src.checkpoint.foreign_config import config_to_hf  # noqa: E402
from src.checkpoint.shards import cut, cut_of, expected_shapes  # noqa: E402
from src.checkpoint.sources import open_source  # noqa: E402
from src.checkpoint.split import split  # noqa: E402
from src.checkpoint.tensor_files import TensorSpec, open_tensor_file  # noqa: E402
from src.command import cli  # noqa: E402
from src.models.config import ModelConfig  # noqa: E402

CONFIG = ModelConfig(  # TinyLlama's sizes
    dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, head_dim=64, ffn_dim=5632, vocab_size=32000, max_seq_len=2048,
    dtype="bfloat16",
)
SHARDS = 8
Way = Literal["cp", "split", "naive"]


def write_model(folder: Path) -> None:
    """The random source, made once a folder."""
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True)
    layout = {to_hf_name(name): TensorSpec(shape, torch.bfloat16) for name, shape in expected_shapes(CONFIG).items()}
    with open_tensor_file(folder / "model.safetensors", layout) as file:
        for name in file.names:
            file.write(name, torch.randn(layout[name].shape))
    (folder / "config.json").write_text(json.dumps(config_to_hf(CONFIG)))


def flush(folder: Path) -> None:
    """Wait until the files are on the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def copy(source: Path, target: Path) -> None:
    """cp, what every split is measured by."""
    subprocess.run(["cp", "-r", source, target], check=True)
    flush(target)


def ours(source: Path, target: Path) -> None:
    """checkpoint_split.py's work, without its command line."""
    split(open_source(str(source)), target, SHARDS, "a random model")


def naive(source: Path, target: Path) -> None:
    """All tensors in memory, then all shards in memory, then torch.save: what most conversion scripts do."""
    opened = open_source(str(source))
    whole = {name: stored.load().clone() for name, stored in opened.tensors.items()}
    target.mkdir()
    shards = [
        {name: cut(tensor, cut_of(name, CONFIG, SHARDS), index) for name, tensor in whole.items()}
        for index in range(SHARDS)
    ]
    for index, shard in enumerate(shards):
        torch.save(shard, target / f"consolidated.{index:02d}.pth")
    flush(target)


class Run(NamedTuple):
    """One piece of work: seconds on the clock, seconds of processors (cp's included), peak of RssAnon in bytes."""

    seconds: float
    processor: float
    peak: int


def measured(way: Way, source: Path, target: Path) -> Run:
    """What the work of one way took in a process of its own."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    command = [sys.executable, __file__, "--folder", str(source.parent), "--way", way]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except FileNotFoundError:
            break
        peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.005)
    words = process.communicate()[0].split()
    return Run(float(words[-2]), float(words[-1]), 1024 * peak)


def main(folder: str, repeats: int = 3, way: Literal["", "cp", "split", "naive"] = "") -> None:
    """Print the table.

    folder: scratch directory on the disk to measure; needs 7 GB
    repeats: how often each side runs; the median counts
    way: do this one piece of work and print its seconds; used by the table's own processes
    """
    source, target = Path(folder) / "source", Path(folder) / "target"
    if way:
        work = {"cp": copy, "split": ours, "naive": naive}[way]
        start, used = time.monotonic(), sum(os.times()[:4])
        work(source, target)
        print(time.monotonic() - start, sum(os.times()[:4]) - used)
        return
    write_model(source)
    n_bytes = (source / "model.safetensors").stat().st_size
    largest = 2 * CONFIG.vocab_size * CONFIG.dim
    results: dict[Way, list[Run]] = {"cp": [], "split": [], "naive": []}
    for _ in range(repeats):
        for side in results:
            results[side].append(measured(side, source, target))
    shutil.rmtree(target)
    copied = statistics.median(run.seconds for run in results["cp"])
    print(f"{n_bytes / 1e9:.2f} GB into {SHARDS} shards; largest tensor {largest / 1e6:.0f} MB; median of {repeats}")
    for side, runs in results.items():
        seconds, processor = (statistics.median(values) for values in list(zip(*runs, strict=True))[:2])
        peak = max(run.peak for run in runs)
        print(
            f"{side:8}{seconds:7.1f} s {n_bytes / 1e6 / seconds:7.0f} MB/s {copied / seconds:6.0%} of cp"
            f"{processor:7.1f} s of processors   peak {peak / 1e6:6.0f} MB anonymous"
        )
    print(f"allowed  {(2 * largest + 400e6) / 1e6:.0f} MB anonymous and at least 60% of cp")


if __name__ == "__main__":
    cli.run(main)
