"""What a data-parallel rank holds while a model is loaded, saved and resumed, beside what it keeps: anonymous memory.

python benchmarks/loading.py [--ranks 2,4]

A random model of 201M parameters, one file in bfloat16, is trained in float32 under torchrun. Pages of a mapped file
belong to the system's cache and do not count. Printed is the largest of the ranks' peaks.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

# what several data-parallel ranks and an optimizer import where they begin: 70 MB that belong to no phase
import torch._dynamo
import torch.distributed.fsdp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, the repository is not

from src import load, parallel  # noqa: E402
from src.checkpoint import saving  # noqa: E402
from src.checkpoint.sources import open_source  # noqa: E402
from src.command.config import OptimizerFlags  # noqa: E402
from src.data.batch import Batch  # noqa: E402
from src.models.decoder import Decoder  # noqa: E402
from src.processes import heap  # noqa: E402
from src.runlog import RunLog  # noqa: E402
from src.training.sft import sft_loss  # noqa: E402
from src.training.trainer import Trainer  # noqa: E402

Held = tuple[int, int]  # bytes of anonymous memory above those of before: at most, and at the end


def anonymous() -> int:
    """Bytes of anonymous memory that this process holds now."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


@contextlib.contextmanager
def measured(found: dict[str, Held], name: str) -> Iterator[None]:
    """What the block adds to this process's memory, looked at every half millisecond."""
    gc.collect()  # a model is in cycles: it would go while another one is measured
    heap.release_memory()
    before, over, peaks = anonymous(), threading.Event(), [0]

    def watch() -> None:
        while not over.wait(0.0005):
            peaks.append(max(peaks.pop(), anonymous()))

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    over.set()
    thread.join()
    heap.release_memory()
    found[name] = (peaks[0] - before, anonymous() - before)


def phases(folder: str, save_dir: str) -> dict[str, Held]:
    """What this rank holds while it loads a model, saves it after a step, and loads and resumes it."""
    found: dict[str, Held] = {}

    def trainer() -> Trainer:
        model = load.load_solver(folder, trained=load.Trained())
        return Trainer(model, RunLog(save_dir, {}), OptimizerFlags(), total_steps=2)

    with measured(found, "load"):
        first = trainer()
    row = Batch(torch.tensor([[1, 5, 2]]), torch.tensor([[False, True, True]]))
    first.backward(sft_loss(first.model, row) / 2.0)
    first.step()
    state = first.state()
    with measured(found, "save"):
        saving.begin_save(first.model, f"{save_dir}/step-1", folder, state=state).complete()
    counts = first.state().counts
    del first, state
    again = trainer()
    with measured(found, "resume"):
        again.load(counts, saving.state_reader(Path(save_dir) / "step-1", again.model.config))
    return found


def write_model(folder: Path, like: str, dim: int, n_layers: int, vocab_size: int) -> None:
    """A checkpoint of random weights in bfloat16, with the tokenizer of another one."""
    parallel.start()
    config = dataclasses.replace(open_source(like).config, dim=dim, n_layers=n_layers, n_heads=dim // 64,
                                 n_kv_heads=dim // 64, head_dim=64, ffn_dim=4 * dim, vocab_size=vocab_size)
    model = Decoder(config, torch.bfloat16).bfloat16()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    saving.begin_save(model, str(folder), like, dtype="bfloat16").complete()


def main() -> None:
    """Print a row a phase and number of ranks; without --folder start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        parallel.start(1, 1)
        found = parallel.gather_over_data_parallel([phases(f"{arguments.folder}/base", f"{arguments.folder}/run")])
        if parallel.rank() == 0:
            sys.stdout.write(json.dumps(found) + "\n")
        return
    with tempfile.TemporaryDirectory() as place:
        write_model(Path(place, "base"), str(ROOT / "dataset" / "toy" / "base"), 1024, 10, 16384)
        for n in map(int, arguments.ranks.split(",")):
            words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", __file__]
            done = subprocess.run([*words, "--folder", place], stdout=subprocess.PIPE, text=True, check=True,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"})
            ranks = json.loads(done.stdout.splitlines()[-1])
            for name in ranks[0]:
                (first, kept), *others = (rank[name] for rank in ranks)
                rest = max(peak for peak, _ in others)
                sys.stdout.write(f"{n} ranks, {name}: kept {kept / 2**20:,.0f} MiB; peak of rank 0 "
                                 f"{first / 2**20:,.0f}, of others {rest / 2**20:,.0f}\n")


if __name__ == "__main__":
    main()
