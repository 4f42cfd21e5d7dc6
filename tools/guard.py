"""Record what small fixed-seed runs of every script give, to compare before and after a change of structure.

python tools/guard.py record --save_file before.json
python tools/guard.py compare --before_file before.json --after_file after.json

A record holds the public flags of every script, and of every run the losses and other metrics of each step, the rows
of samples.jsonl and results.json, and hashes of the weights and data files: each trainer on one process, two
tensor-parallel and two data-parallel ones; evaluations on one and two; the data builders on one. Equal code gives equal
bytes on one machine; other processors add numbers in another order, so a record is no golden for other machines.
"""

import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from src import runlog  # noqa: E402 (this script lies below the root)
from src.command import cli, flags  # noqa: E402 (this script lies below the root)
from src.errors import UserError  # noqa: E402

SCRIPTS = ("checkpoint_split", "solver_train", "solver_evaluate", "verifier_train", "verifier_evaluate", "ppo_train",
           "preference_train", "preference_evaluate", "data_build")
TIMES = ("second", "mfu", "memory", "gib", "_ms", "time")  # metrics that differ from run to run
TOY = "dataset/toy"
SIZE = "--max_batch_size 8 --max_steps 3"
PPO = (
    "--actor_ckpt_dir sft --task toy --train_file rows/prompts.json --max_buffer_size 16 --max_batch_size 4 "
    "--rollout_batch_size 16 --max_new_tokens 48 --max_steps 2 --lr 1e-4 --inner_epochs 1 --minibatches 2"
)


class Run(NamedTuple):
    """One command: `one`, `tp2` or `dp2` processes; its name is the directory or file stem that it writes."""

    name: str
    ranks: str
    words: str


def _each(name: str, words: str, ranks: tuple[str, ...] = ("one", "tp2", "dp2")) -> Iterator[Run]:
    for how in ranks:
        yield Run(f"{name}-{how}", how, words.replace("OUT", f"{name}-{how}"))


def runs() -> list[Run]:
    """The commands, in the order in which later ones use what earlier ones wrote."""
    solver = f"solver_train.py --ckpt_dir base --train_file rows/demonstrations.json {SIZE} --lr 1e-3 --save_dir OUT"
    verifier = f"verifier_train.py --ckpt_dir base {SIZE} --lr 1e-3 --save_dir OUT"
    preference = f"preference_train.py --ckpt_dir sft --train_file pairs.json {SIZE} --lr 1e-3 --save_dir OUT"
    evaluate = "solver_evaluate.py --task toy --max_new_tokens 64 --label_file rows/test.json --log_dir OUT"
    sample = "--num_samples 4 --temperature 1.0"
    critic = "--critic_ckpt_dir verifier-one --critic_save_dir OUT/critic --reward_model_ckpt_dir verifier-one"
    two = ("one", "tp2")
    return [
        Run("base", "one", f"checkpoint_split.py --ckpt_file {ROOT}/{TOY}/base --save_path base --n 1"),
        Run("base-2", "one", "checkpoint_split.py --ckpt_file base --save_path base-2 --n 2"),
        Run("hf", "one", "checkpoint_split.py --ckpt_file base-2 --save_path hf --format hf"),
        Run("sft", "one", f"solver_train.py --ckpt_dir base --train_file {ROOT}/{TOY}/demonstrations.json "
                          "--max_batch_size 16 --epochs 4 --lr 1e-3 --save_dir sft"),
        *_each("solver", f"{solver} --eval_file rows/demonstrations.json --eval_every 2 --accumulation_steps 2"),
        *_each("solver-padded", f"{solver} --packing false --activation_checkpointing full", ("one",)),
        *_each("solver-lora", f"{solver} --lora_rank 4 --quantize int8", two),
        *_each("evaluate", f"{evaluate} --ckpt_dir sft", two),
        *_each("samples", f"{evaluate} --ckpt_dir sft {sample}", two),
        *_each("attempts", "data_build.py attempts --ckpt_dir sft --task toy --label_file rows/test.json "
                           "--attempts 4 --max_new_tokens 64 --log_dir OUT", ("one",)),
        *[Run(f"{name}.json", "one", f"data_build.py {name} --samples_file attempts-one/samples.jsonl "
                                     f"--save_file {name}.json") for name in ("pairs", "outcome", "reject")],
        *_each("rollouts", "data_build.py process --ckpt_dir sft --task toy --samples_file samples-one/samples.jsonl "
                           "--rollouts 2 --max_new_tokens 64 --save_file process.json --log_dir OUT", ("one",)),
        Run("process.json", "one", ""),
        *_each("branches", "data_build.py branch --ckpt_dir sft --task toy --samples_file attempts-one/samples.jsonl "
                           "--attempts 4 --max_new_tokens 64 --save_file branch.json --log_dir OUT", ("one",)),
        Run("branch.json", "one", ""),
        Run("mix.json", "one", "data_build.py mix --pairs_file pairs.json --branch_file branch.json "
                               "--save_file mix.json"),
        Run("join.json", "one", "data_build.py join --train_file rows/steps.json --save_file join.json"),
        *_each("verifier", f"{verifier} --train_file pairs.json"),
        *_each("outcome", f"{verifier} --train_file outcome.json --objective outcome"),
        *_each("process", f"{verifier} --train_file rows/steps.json --objective process"),
        *_each("mixed", f"{verifier} --train_file rows/steps.json,outcome.json --objective process "
                        "--lora_rank 4", ("one",)),
        *_each("score", "verifier_evaluate.py --task toy --ckpt_dir verifier-one --label_file rows/test.json "
                        "--samples_file samples-one/samples.jsonl --log_dir OUT", two),
        *_each("score-steps", "verifier_evaluate.py --ckpt_dir process-one --steps_file rows/steps.json "
                              "--log_dir OUT", ("one",)),
        *_each("dpo", preference),
        *_each("dpo-branch", preference.replace("pairs.json", "mix.json"), ("one",)),
        *_each("orpo", f"{preference} --objective orpo --lora_rank 4", ("one",)),
        *_each("credit", "preference_evaluate.py --ckpt_dir dpo-one --reference_ckpt_dir sft "
                         "--steps_file rows/steps.json --log_dir OUT", ("one",)),
        *_each("ppo", f"ppo_train.py {PPO} {critic} --actor_save_dir OUT"),
        *_each("ppo-phases", f"ppo_train.py {PPO} {critic} --actor_save_dir OUT --phases --lora_rank 4 "
                             "--eval_file rows/test.json", ("one",)),
        *_each("ppo-share", f"ppo_train.py {PPO} --critic_ckpt_dir sft --critic_save_dir OUT/critic --actor_save_dir "
                            "OUT --reward rule --share_base --lora_rank 4", ("one",)),
        *_each("grpo", f"ppo_train.py {PPO} --advantage grpo --group_size 4 --reward rule --actor_save_dir OUT"),
        *_each("grpo-mixed", f"ppo_train.py {PPO} --advantage rloo --group_size 4 --reward rule,verifier "
                             "--reward_model_ckpt_dir process-one --filter_groups --max_refills 1 --kl_target 0.1 "
                             "--reference_refresh 1 --actor_save_dir OUT", ("one",)),
    ]


def record(save_file: str, keep_dir: str = "") -> None:
    """Run every command and write what came out.

    save_file: json file for the record
    keep_dir: directory to run in, kept afterwards; default: a temporary one
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(keep_dir or temporary).resolve()
        _write_rows(folder / "rows")
        found: dict[str, object] = {"flags": public_flags()}
        for number, run in enumerate(runs()):
            if run.words:
                _execute(run, folder, port=29600 + number)
            found[run.name] = outputs(folder / run.name)
            runlog.logger().info("%s: %d files", run.name, len(found[run.name]))
        Path(save_file).write_text(json.dumps(found, indent=1, sort_keys=True), encoding="utf-8")


def compare(before_file: str, after_file: str) -> None:
    """Name every place in which two records differ, and fail if there is one.

    before_file: a record
    after_file: a later one
    """
    before, after = (json.loads(Path(file).read_text(encoding="utf-8")) for file in (before_file, after_file))
    different = list(differences(before, after, ""))
    for line in different:
        runlog.logger().info("%s", line)
    if different:
        raise UserError(f"{len(different)} differences between {before_file} and {after_file}, listed above")
    runlog.logger().info("%d runs are equal", len(before) - 1)


def differences(before: object, after: object, path: str) -> Iterator[str]:
    """A line for each key or value that is in one record and not, or not equal, in the other."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            if key not in before or key not in after:
                yield f"{path}/{key}: only {'after' if key in after else 'before'}"
            else:
                yield from differences(before[key], after[key], f"{path}/{key}")
    elif before != after:
        yield f"{path}: {str(before)[:120]} -> {str(after)[:120]}"


def public_flags() -> dict[str, dict[str, str]]:
    """Of every script, or command of one, its flags with the values they take and their defaults."""
    found = {}
    for script in SCRIPTS:
        module = importlib.import_module(script)
        commands: Mapping = module.COMMANDS if hasattr(module, "COMMANDS") else {"": module.main}
        for name, command in commands.items():
            found[f"{script} {name}".strip()] = {
                flag.name: f"{flag.expects} = {'required' if flag.required else flag.default}"
                for flag in flags.flags_of(command).values()}
    return found


def outputs(path: Path) -> dict[str, object]:
    """What a run left, by file: metrics without times, json and jsonl as they are, weights as a hash of each tensor."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {str(file.relative_to(path.parent)): content for file in files
            if file.is_file() and (content := _content(file)) is not None}


def _content(file: Path) -> object:
    """What of a file must stay equal; None for files that hold times, paths or pictures."""
    if file.name == "metrics.jsonl":
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return [{key: row[key] for key in row if not any(word in key for word in TIMES)} for row in rows]
    if file.name in ("results.json", "params.json", "adapter_config.json", "config.json"):
        return json.loads(file.read_text(encoding="utf-8"))
    if file.name in ("run.json", "manifest.json", "state.json", "adapter.json"):
        return None
    if file.suffix == ".pth" and "optimizer" not in file.name:
        tensors = torch.load(file, weights_only=True)
        return {name: _digest(tensor.contiguous().view(torch.uint8).numpy().tobytes())
                for name, tensor in tensors.items()}
    if file.suffix == ".jsonl":  # samples are written as they finish, in the order of time
        return _digest("\n".join(sorted(file.read_text(encoding="utf-8").splitlines())).encode())
    return _digest(file.read_bytes()) if file.suffix in (".safetensors", ".json") else None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _write_rows(folder: Path) -> None:
    """A few rows of the toy's files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, source, n in (("demonstrations", "demonstrations", 40), ("prompts", "train", 32), ("test", "test", 32),
                            ("steps", "steps", 40)):
        rows = json.loads((ROOT / TOY / f"{source}.json").read_text(encoding="utf-8"))
        (folder / f"{name}.json").write_text(json.dumps(rows[:n]), encoding="utf-8")


def _execute(run: Run, folder: Path, port: int) -> None:
    """Run a command in the folder. Raises UserError with the end of what it printed if it fails."""
    words = run.words.split()
    words[0] = str(ROOT / words[0])
    head = [sys.executable]
    if run.ranks != "one":
        if "_train.py" in words[0]:  # the others are tensor-parallel over all ranks
            words += ["--tensor_parallel_size", "2" if run.ranks == "tp2" else "1"]
        head += ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(head + words, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{run.name} ended with {done.returncode}: {' '.join(words)}\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    cli.run({"record": record, "compare": compare})
