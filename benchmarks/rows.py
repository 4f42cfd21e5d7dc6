"""What training rows take in memory: jsonl read and encoded once, opened again, and shuffled into steps.

python benchmarks/rows.py [--rows 200000,2000000]

Each number of made-up rows has processes of its own. Printed is anonymous memory above that of the start; pages of the
mapped file belong to the system's cache and do not count. Beside it what lists in memory take (not above 200,000 rows).
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, the repository is not

from src.data.batch import BatchSampler, Dataset  # noqa: E402
from src.data.encoded_rows import Fill, Keep, Sample  # noqa: E402
from src.data.examples import read_instructions  # noqa: E402
from src.text.tokenizer import Tokenizer  # noqa: E402
from src.training.run import KeptRows  # noqa: E402
from src.training.sft import sft_dataset  # noqa: E402

PHASES = ("encoded", "opened", "steps", "in lists")
MOST_IN_LISTS = 200_000


def anonymous() -> int:
    """Bytes of anonymous memory that this process holds now."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def in_lists(fill: Fill) -> tuple[list[Sample], str]:
    """Samples as Python's own lists."""
    samples: list[Sample] = []
    return samples, fill(samples.append)


def measure(file: str, phase: str) -> None:
    """Print what one phase adds at most, in MB, and its processor seconds."""
    tokenizer, peaks, over = Tokenizer(ROOT / "dataset/toy/base"), [0], threading.Event()
    kept = KeptRows(Path(file).with_suffix(".ids"), "benchmark")

    def data(keep: Keep) -> Dataset:
        return sft_dataset(read_instructions(file), tokenizer, max_seq_len=512, source=file, keep=keep)

    next(iter(read_instructions(file)))
    before, began = anonymous(), time.process_time()

    def watch() -> None:
        while not over.wait(0.01):
            peaks.append(max(peaks.pop(), anonymous()))

    thread = threading.Thread(target=watch)
    thread.start()
    found = data(in_lists if phase == "in lists" else kept)
    if phase == "steps":
        sampler = BatchSampler(max_batch_size=16, accumulation_steps=1, seed=1)
        n = sum(step.batches[0].n_samples for step in sampler.steps(found, packing=True, epochs=1, stop=2000))
        assert n == min(2000 * 16, len(found.samples))
    seconds = time.process_time() - began
    over.set()
    thread.join()
    print(f"{(max(peaks[0], anonymous()) - before) / 1e6:.0f} MB {seconds:.1f} s".replace("-0", "0"))


def main() -> None:
    """The table, a line a number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="200000,2000000")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return
    print(f"{'rows':10}{'jsonl':>10}{'ids':>10}" + "".join(f"{phase:>18}" for phase in PHASES))
    for n in map(int, arguments.rows.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            path, numbers = Path(folder) / "rows.jsonl", random.Random(1)
            with path.open("w", encoding="utf-8") as file:
                for _ in range(n):
                    a, b = numbers.randrange(1000), numbers.randrange(1000)
                    row = {"instruction": f"What is {a} plus {b}?", "output": f"{a}+{b}={a + b}\n\n#### {a + b}"}
                    file.write(json.dumps(row) + "\n")
            found = []
            for phase in PHASES if n <= MOST_IN_LISTS else PHASES[:-1]:
                command = [sys.executable, __file__, "--measure", str(path), phase]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.append(done.stdout.strip())
            sizes = [f"{file.stat().st_size / 1e6:.0f} MB" for file in (path, path.with_suffix(".ids"))]
            print(f"{n:<10}" + "".join(f"{size:>10}" for size in sizes) + "".join(f"{each:>18}" for each in found),
                  flush=True)


if __name__ == "__main__":
    main()
