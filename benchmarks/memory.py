"""What --dry_run says a run will hold, beside what the run held: peak resident memory of a rank, on the CPU.

python benchmarks/memory.py [--only NAME]

Both are solver_train.py itself: once with --dry_run, once for three steps. Of several ranks only rank 0 is compared:
it alone writes metrics.jsonl, where the peak that the system counted for it stands.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, the repository is not
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class Case(NamedTuple):
    """A model (dim, layers, heads, ffn, vocabulary), how many ranks train it, and flags of solver_train.py."""

    model: tuple[int, int, int, int, int]
    flags: dict[str, object]
    ranks: int = 1


M60 = (768, 8, 12, 2048, 2048)
PACKED = {"max_batch_size": 4, "packing": "true"}
CASES = {
    "full, packed": Case(M60, PACKED),
    "LoRA, vocabulary 152k": Case((256, 4, 4, 688, 151936), {"max_batch_size": 4, "lora_rank": 16}),
    "full, recomputed": Case(M60, PACKED | {"activation_checkpointing": "full"}),
    "full, vocabulary 152k": Case((256, 4, 4, 688, 151936), {"max_batch_size": 2}),
    "full, padded, long": Case((512, 6, 8, 1408, 2048), {"max_batch_size": 8}),
    "tensor-parallel 2": Case(M60, PACKED, ranks=2),
    "data-parallel 2": Case(M60, PACKED | {"tensor_parallel_size": 1}, ranks=2),
}


def prepare(case: Case, place: Path) -> None:
    """A checkpoint of random weights with the toy's tokenizer, and a file of rows of many lengths."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from src.checkpoint.sources import open_source
    from src.checkpoint.split import split

    dim, layers, heads, ffn, vocab = case.model
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=dim, intermediate_size=ffn, max_position_embeddings=2048,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(place / "hf")
    for path in (ROOT / "dataset/toy/base").glob("tokenizer*"):
        shutil.copy(path, place / "hf")
    n = 1 if "tensor_parallel_size" in case.flags else case.ranks
    split(open_source(str(place / "hf")), place / "ours", n, "", "", "benchmark")
    shutil.rmtree(place / "hf")
    rows = [
        {"instruction": "How many? " * (3 + 5 * i % 17), "output": "1 + 2 = 3. " * (5 + 7 * i % 23)} for i in range(48)
    ]
    (place / "rows.json").write_text(json.dumps(rows))


def command(case: Case, place: Path, *, dry: bool) -> list[str]:
    """solver_train.py's words."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case.ranks}"] * (case.ranks > 1)
    flags = {"ckpt_dir": place / "ours", "save_dir": place / "run", "train_file": place / "rows.json",
             "max_seq_len": 1024, "max_steps": 3, "dry_run": dry} | case.flags  # fmt: skip
    return [sys.executable, *launcher, "solver_train.py", *(f"--{name}={value}" for name, value in flags.items())]


def run(words: list[str]) -> str:
    """The output of a run that must end well."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{done.stderr}")
    return done.stdout


def predicted(plan: str) -> float:
    """Bytes of the plan's line on memory."""
    number, unit = re.search(r"memory of each rank +([\d.]+) (\w+)", plan).groups()
    return float(number) * UNITS[unit]


def measured(place: Path) -> float:
    """The largest peak of rank 0 that the run's metrics name."""
    rows = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    return max(row["peak_memory"] for row in rows)


def main() -> None:
    """Print a line a case, and each plan."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", choices=["", *CASES])
    options = parser.parse_args()
    lines = [f"{'':24}{'predicted':>12}{'measured':>12}  ratio"]
    for name in [options.only] if options.only else CASES:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            child = os.fork()  # what makes the model takes more memory than this process should have held
            if not child:
                prepare(CASES[name], place)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            plan = run(command(CASES[name], place, dry=True))
            print(f"\n{name}\n{plan[plan.index('memory of each rank'):]}", flush=True)
            run(command(CASES[name], place, dry=False))
            guess, found = predicted(plan), measured(place)
            lines.append(f"{name:24}{guess / 2**20:8.0f} MiB{found / 2**20:8.0f} MiB  {guess / found:.2f}")
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
