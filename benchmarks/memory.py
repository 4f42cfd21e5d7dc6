"""What --dry_run says a rank will hold, beside what it held: peak resident memory on the CPU.

python benchmarks/memory.py [--only WORDS]

Both are the script itself, once with --dry_run, once for a few steps. The peak is the system's count for the largest of
the run's processes, from its start to its end.
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
    """A model (dim, layers, heads, ffn, vocabulary), flags of a trainer, how many ranks train it, and the tokens of the
    one row of its one step (0: rows of many lengths)."""

    model: tuple[int, int, int, int, int]
    flags: dict[str, object]
    ranks: int = 1
    script: str = "solver_train.py"
    tokens: int = 0


M5, M21, M60 = (256, 4, 4, 1024, 2048), (512, 6, 8, 1408, 2048), (768, 8, 12, 2048, 2048)
WIDE = (256, 4, 4, 688, 151936)
PACKED = {"max_batch_size": 4, "packing": "true"}
PPO = {"max_buffer_size": 8, "max_batch_size": 4, "minibatches": 1, "max_new_tokens": 160, "epochs": 2,
       "critic_warmup": 0, "task": "toy"}
CASES = {
    "full, packed": Case(M60, PACKED),
    "LoRA, vocabulary 152k": Case(WIDE, {"max_batch_size": 4, "lora_rank": 16}),
    "full, recomputed": Case(M60, PACKED | {"activation_checkpointing": "full"}),
    "full, vocabulary 152k": Case(WIDE, {"max_batch_size": 2}),
    "full, packed, long": Case(M21, {"max_batch_size": 8}),
    "tensor-parallel 2": Case(M60, PACKED, ranks=2),
    "data-parallel 2": Case(M60, PACKED | {"tensor_parallel_size": 1}, ranks=2),
} | {
    f"{n}k tokens on {ranks}": Case(M5, {
        "activation_checkpointing": "full", "tensor_parallel_size": 1, "context_parallel_size": ranks,
        "max_seq_len": 1024 * n, "max_steps": 1,
    }, ranks, tokens=1024 * n)
    for n in (8, 16, 32) for ranks in (1, 2)
} | {
    f"scoring {n}k on {ranks}": Case(
        M5, {"context_parallel_size": ranks}, ranks, "verifier_evaluate.py", tokens=1024 * n)
    for n in (8, 16, 32) for ranks in (1, 2)
} | {
    f"PPO{name}": Case(M21, PPO | flags, script="ppo_train.py")
    for name, flags in {
        "": {},
        ", int4": {"quantize": "int4"},
        ", --phases": {"phases": True},
        ", LoRA": {"lora_rank": 16},
        ", LoRA, --phases": {"lora_rank": 16, "phases": True},
        ", LoRA, --share_base": {"lora_rank": 16, "share_base": True},
    }.items()
}


def prepare(case: Case, place: Path) -> None:
    """A checkpoint of random weights with the toy's tokenizer, a verifier on it, and rows of many lengths."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from src import load, parallel
    from src.checkpoint import saving
    from src.checkpoint.sources import open_source
    from src.checkpoint.split import split
    from src.command.config import LoraFlags

    dim, layers, heads, ffn, vocab = case.model
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=dim, intermediate_size=ffn, max_position_embeddings=max(2048, case.tokens),
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(place / "hf")
    for path in (ROOT / "dataset/toy/base").glob("tokenizer*"):
        shutil.copy(path, place / "hf")
    n = case.ranks if case.flags.keys().isdisjoint(("tensor_parallel_size", "context_parallel_size")) else 1
    split(open_source(str(place / "hf")), place / "ours", n, "benchmark")
    shutil.rmtree(place / "hf")
    rows = [
        {"instruction": "How many? " * (3 + 5 * i % 17), "output": "1 + 2 = 3. " * (5 + 7 * i % 23)} for i in range(48)
    ]
    if case.tokens:
        unit = "1 + 2 = 3. "
        each = len(load.load_tokenizer(str(place / "ours")).encode(unit * 64)) / 64
        text = unit * int((case.tokens - 24) / each)
        rows = [{"instruction": "How many?", "output": text, "steps": [text], "labels": [1]}]
    if case.script != "solver_train.py":
        parallel.start()
        verifier = load.load_verifier(str(place / "ours"), from_solver=True)
        saving.record(verifier, objective="outcome", score="last")
        lora = load.lora_config(LoraFlags(lora_rank=16)) if "lora_rank" in case.flags else None
        load.put_lora_on(verifier, lora, seed=1)
        saving.begin_save(verifier, str(place / "verifier"), str(place / "ours"), lora=lora).complete()
    if case.script == "ppo_train.py":
        rows = [{"instruction": row["instruction"], "label": "3"} for row in rows[:8]]
    (place / "rows.json").write_text(json.dumps(rows))


def command(case: Case, place: Path, *, dry: bool) -> list[str]:
    """The script's words."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case.ranks}"] * (case.ranks > 1)
    of_script = {
        "solver_train.py": {"ckpt_dir": place / "ours", "save_dir": place / "run", "train_file": place / "rows.json",
                            "max_seq_len": 1024, "max_steps": 3},
        "ppo_train.py": {"actor_ckpt_dir": place / "ours", "actor_save_dir": place / "actor",
                         "critic_ckpt_dir": place / "ours", "critic_save_dir": place / "critic",
                         "reward_model_ckpt_dir": place / "verifier", "train_file": place / "rows.json"},
        "verifier_evaluate.py": {"ckpt_dir": place / "verifier", "steps_file": place / "rows.json",
                                 "log_dir": place / "run"},
    }
    flags = of_script[case.script] | case.flags | {"dry_run": dry}
    return [sys.executable, *launcher, case.script, *(f"--{name}={value}" for name, value in flags.items())]


def run(words: list[str]) -> tuple[str, int]:
    """The output of a run that must end well, and the peak in bytes of the largest of its processes."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, text=True,
                                   env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        said = output.read()
    if status:
        raise SystemExit(said)
    return said, 1024 * usage.ru_maxrss


def predicted(plan: str) -> float:
    """Bytes of the plan's line on memory."""
    number, unit = re.search(r"memory of each rank +([\d.]+) (\w+)", plan).groups()
    return float(number) * UNITS[unit]


def main() -> None:
    """Print a line a case, and each plan."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--dry", action="store_true", help="the predictions alone")
    options = parser.parse_args()
    lines = [f"{'':24}{'predicted':>12}{'measured':>12}  ratio"]
    for name, case in CASES.items():
        if not name.startswith(options.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            child = os.fork()  # what makes the model takes more memory than this process should have held
            if not child:
                prepare(case, place)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            plan, _ = run(command(case, place, dry=True))
            print(f"\n{name}\n{plan[plan.index('memory of each rank'):]}", flush=True)
            guess, held = predicted(plan), 0 if options.dry else run(command(case, place, dry=False))[1]
            lines.append(f"{name:24}{guess / 2**20:8.0f} MiB")
            if held:
                lines[-1] += f"{held / 2**20:8.0f} MiB  {guess / held:.2f}"
            print(lines[-1], flush=True)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
