"""All that a GPU should be asked, in one command of nine minutes: that it computes right, then how fast it is.

python benchmarks/gpu.py                                  # a card of 80 GB or more; results.jsonl lies in runs/gpu
python benchmarks/gpu.py --device cpu --size tiny         # every part on a CPU: it works, and no figure means anything

Weights are random and nothing is downloaded. Speeds stand beside what the card itself does in the same run, a product
of large matrices and a large copy, and beside transformers on the same shape. Each part is a process with a time of its
own; what it finds is printed and written as it comes, and what there is no time for is named.

checkpoint  13 GB as transformers writes them: split, then from a cold process to the first token
correct     logits and gradients beside float32 on a CPU, greedy text beside transformers, a resumed run, tests of GPUs
decode      Llama-2-7B's shape: one row, and 32 to 384 ragged ones; eager and CUDA graphs; bfloat16, int8, int4
train       packs of 4,096 tokens: full and LoRA, eager and compiled, with activations kept and computed again
score       a verifier's scores and a reference's log-probs beside what reading prompts can take
ppo         an iteration by phases: PPO and GRPO on 1B, PPO with LoRA on one 7B base; the first ratio
small       the stages of recipes/gsm8k.sh that compute, in the shape of SmolLM2-135M
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is on the path, ours is not

import ppo_train
import solver_evaluate
import solver_train
from benchmarks.gpu_speed import HALF, LORA, SIZES, Found, Size, decode, free, score, their_model, train
from src import load, parallel
from src.checkpoint import saving
from src.checkpoint.convert import from_hf_name, rotary_from_hf, to_hf_name
from src.command import cli
from src.data.batch import make_batch
from src.data.encoding import Encoded
from src.inference.engine import Request, Vocabulary, generate
from src.inference.sampling import Sampling
from src.models.lora import LoraConfig
from src.processes import heap
from src.training.ppo_config import PPOConfig
from src.training.sft import n_supervised, sft_loss

ROOT = Path(__file__).resolve().parents[1]


def transformers_checkpoint(place: Path, sizes: dict[str, int]) -> Path:
    """A folder for a shape, in it hf: random weights as transformers writes them, and the toy's tokenizer."""
    folder = place / "-".join(map(str, sizes.values()))
    if not (folder / "hf").is_dir():
        their_model(sizes).save_pretrained(folder / "hf")
        for path in (ROOT / "dataset/toy/base").glob("tokenizer*"):
            shutil.copy(path, folder / "hf")
        free()
    return folder


def checkpoint_of(place: Path, sizes: dict[str, int]) -> Path:
    """The same folder with the weights split for us too."""
    folder = transformers_checkpoint(place, sizes)
    if not (folder / "split").is_dir():
        start("checkpoint_split.py", ckpt_file=folder / "hf", save_path=folder / "split")
    return folder


def start(script: str, **flags: object) -> float:
    """Run a script; its seconds. Its words are shown if it fails."""
    began = time.perf_counter()
    words = [sys.executable, str(ROOT / script), *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{script} ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - began


def last_metrics(folder: Path) -> dict[str, float]:
    """The last line of a run's metrics.jsonl."""
    return json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def checkpoint(place: Path, size: Size) -> Found:
    """Split a checkpoint, and start from it."""
    folder = transformers_checkpoint(place, size.large)
    shutil.rmtree(folder / "split", ignore_errors=True)
    n_bytes = sum(path.stat().st_size for path in (folder / "hf").iterdir())
    took = start("checkpoint_split.py", ckpt_file=folder / "hf", save_path=folder / "split")
    yield "split", {"GB": n_bytes / 1e9, "seconds": took, "GB/s": n_bytes / 1e9 / took}
    took = start("solver_evaluate.py", task="none", ckpt_dir=folder / "split", limit=1, max_new_tokens=1,
                 label_file=ROOT / "dataset/toy/test.json", log_dir=place / "first")
    yield "cold process to the end of its first token", {"seconds": took}


def correct(place: Path, size: Size) -> Found:
    """Numbers beside transformers in float32 on the CPU, text, a resumed run, and what is marked gpu in tests/."""
    from transformers import LlamaForCausalLM

    folder = checkpoint_of(place, size.middle)
    config, rows = load.load_config(str(folder / "split")), [40, 90, 17]
    samples = [Encoded([1 + (7 * place * place + n) % 600 for place in range(n)], 5) for n in rows]
    batch = make_batch(samples, packing=True)
    theirs = LlamaForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    exact = their_gradient(theirs, samples)
    logits = theirs(torch.tensor([samples[0].tokens])).logits[0].detach()
    theirs = theirs.to(parallel.device())
    with torch.autocast(parallel.device().type, HALF):
        peer = apart(their_gradient(theirs, samples), exact)
    turned = {name: rotary_from_hf(from_hf_name(name), each, config) for name, each in exact.items()}
    for precision in ("float32", "bfloat16"):
        model = load.load_solver(str(folder / "split"), precision=precision, trained=load.Trained())
        own = model.logits(model(parallel.to_device(torch.tensor([samples[0].tokens]))))[0].detach().float().cpu()
        (sft_loss(model, batch) / n_supervised([batch])).backward()
        found = {to_hf_name(name): each.grad.cpu() for name, each in model.named_parameters()}
        yield f"{precision} off float32 on the CPU", {
            "logits": ((own - logits).norm() / logits.norm()).item(), "gradients": apart(found, turned),
            "transformers' under autocast": peer}
        del model, found
        solver = load.load_solver(str(folder / "split"), precision=precision)
        prompt = samples[2].tokens
        ours = list(generate(solver, [Request("", 0, prompt)], Sampling(max_new_tokens=size.greedy),
                             vocabulary=Vocabulary((), solver.config.vocab_size, str), max_batch_size=1))[0].tokens
        theirs = theirs.to(getattr(torch, precision))
        asked, n = torch.tensor([prompt], device=parallel.device()), size.greedy
        same = theirs.generate(asked, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)
        equal = (same[0, len(prompt) :].cpu() == torch.tensor(ours)).int().cumprod(0).sum()
        yield f"greedy text, {precision}", {"tokens until it parts from transformers'": int(equal), "of": size.greedy}
        del solver
        free()
    del theirs
    small = checkpoint_of(place, size.small)
    common = {"ckpt_dir": str(small / "split"), "train_file": str(ROOT / "dataset/toy/demonstrations.json"),
              "schedule": "constant", "warmup_ratio": 0.0, "max_batch_size": 4, "save_every": 2}
    for name, resume, n in (("whole", "none", 4), ("resumed", "none", 2), ("resumed", "auto", 4)):
        config = solver_train.SolverTrainConfig(**common, save_dir=str(place / name), max_steps=n, resume=resume)
        solver_train.main(config)
        free()
    whole, resumed = (load.local_tensors(place / name, None) for name in ("whole", "resumed"))
    worst = max((whole[name].float() - resumed[name].float()).abs().max().item() for name in whole)
    yield "a run resumed after 2 of 4 steps", {"largest difference of a weight": worst}
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/inference/test_step.py"]
    tests = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    yield "tests marked gpu", {"said": tests.stdout.strip().splitlines()[-1]}


def their_gradient(model: torch.nn.Module, samples: list[Encoded]) -> dict[str, Tensor]:
    """transformers' gradient of the mean cross-entropy of the responses, each sample alone. -> float32 on the CPU."""
    model.zero_grad()
    n = sum(sample.n_response for sample in samples)
    for sample in samples:
        tokens = torch.tensor([sample.tokens], device=model.device)
        logprobs = model(tokens).logits[0, :-1].float().log_softmax(-1).gather(1, tokens[0, 1:, None])
        (-logprobs[sample.response_start - 1 :].sum() / n).backward()
    return {name: each.grad.float().cpu() for name, each in model.named_parameters()}


def apart(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The distance of all gradients, as a share of their length."""
    squares = sum((found[name] - exact[name]).double().square().sum() for name in exact)
    return (squares / sum(each.double().square().sum() for each in exact.values())).sqrt().item()


def ppo(place: Path, size: Size) -> Found:
    """Seconds of one iteration by phase."""
    critic = {"critic_warmup": 0, "reward": ["verifier"]}
    cases = {"PPO": (size.middle, critic), "GRPO": (size.middle, {"advantage": "grpo", "reward": ["rule"]}),
             "PPO, LoRA on one base": (size.large, critic | {"lora_rank": 16, "share_base": True})}
    for name, (sizes, flags) in cases.items():
        folder, run = checkpoint_of(place, sizes), place / name
        base, lora = str(folder / "split"), load.lora_config(LORA) if "lora_rank" in flags else None
        if "critic_warmup" in flags:
            verifier = str(folder / ("adapter" if lora else "verifier"))
            if not Path(verifier).is_dir():
                save_verifier(base, verifier, lora)
            flags |= {"critic_ckpt_dir": base, "critic_save_dir": str(run / "critic"),
                      "reward_model_ckpt_dir": verifier}
        ppo_train.main(PPOConfig(
            actor_ckpt_dir=base, actor_save_dir=str(run / "actor"), task="toy", max_steps=1, inner_epochs=1,
            train_file=str(ROOT / "dataset/toy/train.json"), max_buffer_size=max(8, size.problems),
            max_new_tokens=2 * size.new_tokens, max_batch_size=8, **flags))
        seen = last_metrics(run / "actor")
        kept = ("first_ratio_deviation", "kl", "tokens_per_second")
        phases = {each: value for each, value in seen.items() if each.startswith("seconds_") or each in kept}
        yield name, phases | {"peak GiB": heap.peak_memory() / 2**30}
        shutil.rmtree(run)  # full weights and moments of two models
        free()


def save_verifier(base: str, folder: str, lora: LoraConfig | None) -> None:
    """An untrained verifier of whole solutions, as full weights or as an adapter."""
    model = load.load_verifier(base, from_solver=True)
    saving.record(model, objective="outcome", score="last")
    load.put_lora_on(model, lora, seed=1)
    saving.begin_save(model, folder, base, lora=lora).complete()
    del model
    free()


def small(place: Path, size: Size) -> Found:
    """Fine-tuning, sampling and GRPO of a model of 135M parameters, with loading and saving."""
    base, out, toy = str(checkpoint_of(place, size.small) / "split"), place / "135M", ROOT / "dataset/toy"
    common = {"max_batch_size": 16, "lr": 3e-4}
    stages: dict[str, Callable[[], None]] = {
        "fine-tuning, 40 steps of 16 rows": lambda: solver_train.main(solver_train.SolverTrainConfig(
            ckpt_dir=base, save_dir=str(out / "sft"), train_file=str(toy / "demonstrations.json"), epochs=5,
            max_steps=40 if size.problems > 4 else 2, **common)),
        "200 problems, 8 samples each": lambda: solver_evaluate.main(solver_evaluate.SolverEvaluateConfig(
            task="toy", ckpt_dir=str(out / "sft"), label_file=str(toy / "test.json"), log_dir=str(out / "log"),
            limit=200 if size.problems > 4 else 4, num_samples=8, temperature=0.7, max_batch_size=384,
            max_new_tokens=2 * size.new_tokens)),
        "GRPO, 2 buffers of 64": lambda: ppo_train.main(PPOConfig(
            actor_ckpt_dir=str(out / "sft"), actor_save_dir=str(out / "grpo"), advantage="grpo", reward=["rule"],
            task="toy", train_file=str(toy / "train.json"), max_buffer_size=max(8, size.problems), max_steps=2,
            max_new_tokens=2 * size.new_tokens, max_batch_size=16)),
    }
    for name, run in stages.items():
        began = time.perf_counter()
        run()
        yield name, {"seconds": time.perf_counter() - began}
        free()


# A part, and its seconds at most on one card of this size
PARTS: dict[str, tuple[Callable[[Path, Size], Found], int]] = {
    "correct": (correct, 75), "decode": (decode, 110), "train": (train, 110), "checkpoint": (checkpoint, 75),
    "ppo": (ppo, 100), "score": (score, 25), "small": (small, 45),
}


def run_part(name: str, place: Path, size: Size) -> None:
    """Print what a part finds, and add it to results.jsonl."""
    parallel.start()
    shown = sys.stdout  # what scripts say goes to the part's log
    with (place / "results.jsonl").open("a", encoding="utf-8") as file, contextlib.redirect_stdout(sys.stderr):
        for what, figures in PARTS[name][0](place, size):
            file.write(json.dumps({"part": name, "what": what} | figures) + "\n")
            file.flush()
            words = (f"{each} {value:.4g}" if isinstance(value, float) else f"{each} {value}"
                     for each, value in figures.items())
            print(f"{name:11}{what:48}{'  '.join(words)}", file=shown, flush=True)


def main(device: Literal["gpu", "cpu"] = "gpu", size: Literal["llama-2-7b", "tiny"] = "llama-2-7b",
         parts: list[str] = list(PARTS), minutes: float = 9.0, folder: str = "runs/gpu", only: str = "") -> None:  # noqa: B006, B008 (shown by --help)
    """Run the parts in turn, each in a process that is ended when its time is over.

    device: cpu hides the GPU
    size: shapes; tiny shows that every part works
    parts: in this order
    minutes: of all parts together
    folder: for weights, runs and results.jsonl
    only: a part to run in this very process, which is what the others are started with
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    if only:
        run_part(only, place, SIZES[size])
        return
    ends = time.monotonic() + 60 * minutes
    for name in parts:
        left = ends - time.monotonic()
        box = left if size == "tiny" else min(left, PARTS[name][1])
        if left < PARTS[name][1] / 3:
            print(f"{name:11}left out: {left:.0f} s of {minutes:g} minutes are left", flush=True)
            continue
        words = [sys.executable, __file__, f"--only={name}", f"--size={size}", f"--folder={folder}"]
        with (place / f"{name}.log").open("w") as log:
            process = subprocess.Popen(words, stderr=log, start_new_session=True, env=os.environ | (
                {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}))
        try:
            if process.wait(timeout=box):
                print(f"{name:11}failed: {place}/{name}.log says why", flush=True)
        except subprocess.TimeoutExpired:
            print(f"{name:11}stopped after its {box:.0f} s; what it found until then counts", flush=True)
        finally:
            with contextlib.suppress(ProcessLookupError):  # with what it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    cli.run(main)
