"""PPO and GRPO beside trl: the same nets, prompts, episodes, epochs and scripted reward; parity first, then seconds.

python benchmarks/ppo.py --trl_python VENV/bin/python [--only "PPO 5M"] [--repeats 3]

trl has no PPO since 1.13: --trl_python is a Python with trl==1.12.0 and transformers==5.23.0 on the same torch; GRPO
runs against the trl of this Python. CPU, float32, one thread, 64 episodes of 16 + 64 tokens, 2 epochs, nothing logged
or saved. Every measurement is a fresh process; ours and theirs take turns (A B B A ...).

Parity (PPO): theirs is given our episodes; its advantages and, in both epochs (the second behind a step of Adam), its
losses of policy and critic must agree with ours within 1e-5 where the definitions do. They differ in
- the variance advantages are divided by: theirs is n - 1's, ours n's; the comparison takes that factor out
- where an episode with EOS is paid: theirs behind EOS, on padding, ours on EOS; no episode here has one
- padding: theirs is every id equal to the padding id, also a sampled one; ours follows from lengths
- means: theirs over each micro-batch, ours over the optimizer step; for parity a step is one micro-batch
- the gradient: theirs is not clipped, with one optimizer for both nets; ours is clipped at 1, for parity at infinity
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, the repository is not
EPISODES, PROMPT, RESPONSE, VOCAB, GROUP, EPOCHS = 64, 16, 64, 2048, 8, 2
WARM_UP, TIMED = 1, 3  # iterations
LR = 1e-4
PARITY_LR = (
    1e-6  # Adam's first step is lr times a gradient's sign: at a higher rate rounding of tiny ones shows
)
MODELS = {
    "5M": {"dim": 256, "layers": 4, "heads": 4, "ffn": 688},
    "60M": {"dim": 768, "layers": 8, "heads": 12, "ffn": 2048},
}


class Case(NamedTuple):
    """One comparison."""

    model: str
    grpo: bool = False
    micro: int = 16  # episodes in a training forward pass


CASES = {
    "PPO 5M": Case("5M"),
    "PPO 60M": Case("60M"),
    "GRPO 5M": Case("5M", grpo=True),
    "GRPO 60M": Case("60M", grpo=True),
}


def prompts(grpo: bool) -> list[list[int]]:
    """Random token ids, for one iteration after the other."""
    rng = random.Random(3)
    n = EPISODES // (GROUP if grpo else 1) * (WARM_UP + TIMED)
    return [[rng.randrange(4, VOCAB) for _ in range(PROMPT)] for _ in range(n)]


def scripted(tokens: list[int]) -> float:
    """The reward of a response: the share of even ids in it."""
    return sum(token % 2 == 0 for token in tokens) / len(tokens)


def write_model(name: str, folder: Path) -> None:
    """Random weights as a Hugging Face directory and, split, as ours; and a value head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from src.checkpoint.sources import open_source
    from src.checkpoint.split import split

    size = MODELS[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=size["dim"],
        intermediate_size=size["ffn"],
        max_position_embeddings=256,
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["heads"],
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "hf")
    torch.save(0.05 * torch.randn(1, size["dim"]), folder / "head.pth")
    split(open_source(str(folder / "hf")), folder / "ours", 1, "", "", "benchmark")


class Ids:
    """A tokenizer whose texts are token ids; none of them ends a response."""

    vocab_size, stop_ids, bos_id, chat, code = VOCAB, frozenset(), None, None, None

    def encode(self, text: str) -> list[int]:
        """Ids of a text of numbers."""
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        """The ids as a text."""
        return " ".join(map(str, ids))


class Ours(NamedTuple):
    """Our side, ready to iterate."""

    models: object
    config: object
    collect: Callable[[int], tuple[object, dict[str, float]]]


def our_side(case: Case, folder: Path, *, micro: int, lr: float, max_grad_norm: float) -> Ours:
    """Models, and how a buffer is collected."""
    import torch

    import ppo_train
    from src import parallel
    from src.data.examples import Prompt
    from src.runlog import Phases, RunLog
    from src.training.ppo_config import PPOConfig
    from src.training.ppo_setup import Inputs, load_models
    from src.training.rewards import Reward, on_first_rank
    from src.training.rollout import Rollout

    parallel.start()
    source = str(folder / "ours")
    critic = {} if case.grpo else {"critic_ckpt_dir": source, "critic_save_dir": str(folder / "critic")}
    config = PPOConfig(
        actor_ckpt_dir=source, actor_save_dir=str(folder / "actor"), advantage="grpo" if case.grpo else "gae",
        group_size=GROUP if case.grpo else -1, reward=["rule"], temperature=1.0, max_new_tokens=RESPONSE,
        rollout_batch_size=EPISODES, max_buffer_size=EPISODES, max_batch_size=micro, inner_epochs=EPOCHS, minibatches=1,
        kl_coef=0.0 if case.grpo else 0.05, clip_ratio=0.2, clip_high=0.2, value_clip=0.2, gae_lambda=0.95,
        missing_eos_penalty=0.0, lr=lr, critic_lr=lr, schedule="constant", warmup_ratio=0.0,
        max_grad_norm=max_grad_norm, critic_warmup=0, **critic,
    )  # fmt: skip
    models = load_models(config, RunLog(str(folder / "log"), {}), 100)
    models.load_reference(config, refreshed=False)
    if models.critic:
        models.critic.model.v_head.weight.data.copy_(torch.load(folder / "head.pth"))
    rows = [
        Prompt(str(index), " ".join(map(str, ids)), None, None, None)
        for index, ids in enumerate(prompts(case.grpo))
    ]

    def score(rollout: Rollout) -> tuple[list[float], dict]:
        return [scripted([int(word) for word in text.split()]) for text in rollout.responses], {}

    rewards, data = {"even": Reward(1.0, on_first_rank(score))}, Inputs(rows, [], 0, Ids(), [], 1)

    def collect(iteration: int) -> tuple[object, dict[str, float]]:
        n, timer = config.prompts_per_buffer, Phases()
        chosen = range(iteration * n, (iteration + 1) * n)
        buffer, _, _ = ppo_train.collect(config, models, data, rewards, chosen, iteration, 1.0, timer)
        return buffer, timer.seconds

    return Ours(models, config, collect)


def update(side: Ours, buffer: object, iteration: int) -> dict[str, float]:
    """The critic learns, then the actor."""
    from src.training import ppo

    found = ppo.update_critic(side.models.critic, buffer, side.config, iteration) if side.models.critic else {}
    return found | ppo.update_actor(side.models.actor, buffer, side.config, iteration)


def ours(case: Case, folder: Path) -> dict[str, object]:
    """Seconds of each phase of TIMED iterations."""
    side = our_side(case, folder, micro=case.micro, lr=LR, max_grad_norm=1.0)
    iterations = []
    for step in range(WARM_UP + TIMED):
        began = clock()
        found, _ = side.collect(step)
        collected = clock()
        metrics = update(side, found, step)
        assert metrics["grad_norm"] > 0 and int(found.rollout.lengths.min()) == RESPONSE
        iterations.append(phases_of(began, collected, clock()))
    return summary(iterations)


def clock() -> tuple[float, float]:
    """Wall clock and processor seconds of this process."""
    return time.perf_counter(), time.process_time()


def phases_of(
    began: tuple[float, float], collected: tuple[float, float], done: tuple[float, float]
) -> dict[str, float]:
    """Seconds of collecting a buffer and of learning from it, by both clocks."""
    return {
        "collect": collected[0] - began[0], "update": done[0] - collected[0],
        "collect_cpu": collected[1] - began[1], "update_cpu": done[1] - collected[1],
    }  # fmt: skip


def summary(iterations: list[dict[str, float]]) -> dict[str, object]:
    """Medians over the timed iterations, and the peak resident memory in bytes."""
    timed = iterations[WARM_UP:]
    found = {name: statistics.median(row[name] for row in timed) for name in timed[0]}
    # not getrusage()'s: a child inherits that of the process it was forked from
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return found | {"peak": 1024 * peak}


def theirs(case: Case, folder: Path) -> dict[str, object]:
    """The same of trl's trainers."""
    return trl_grpo(case, folder) if case.grpo else trl_ppo(case, folder, case.micro)


def trl_ppo(case: Case, folder: Path, micro: int, given: object = None) -> dict[str, object]:
    """trl 1.12's PPOTrainer. given: a tensor [B, S] of episodes to take in place of sampling its own; it then
    returns the tensors that parity() compares."""
    import datasets
    import torch
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    from trl.experimental.ppo import ppo_trainer as module

    torch.set_num_threads(1)
    hf = str(folder / "hf")
    policy, reference = (LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32) for _ in range(2))
    value = LlamaForSequenceClassification.from_pretrained(hf, num_labels=1, dtype=torch.float32)
    value.score.weight.data.copy_(torch.load(folder / "head.pth"))

    class Scripted(torch.nn.Module):
        """Hands trl scripted() as the last hidden state of a reward model."""

        base_model_prefix = "backbone"

        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.score = Counts(), torch.nn.Identity()

    class Counts(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **_: object) -> object:
            even = (input_ids[:, PROMPT:] % 2 == 0).float().cumsum(1) / RESPONSE
            hidden = torch.cat((torch.zeros(len(input_ids), PROMPT), even), 1)[..., None]
            return type("Output", (), {"hidden_states": [hidden]})()

    marks: list[tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = []
    seen: dict[str, list[torch.Tensor]] = {"whitened": [], "means": []}
    state: dict[str, tuple[float, float]] = {"began": clock()}
    whiten, mean, generate = module.masked_whiten, module.masked_mean, module.batch_generation

    def watched_whiten(values: torch.Tensor, mask: torch.Tensor, **options: object) -> torch.Tensor:
        found = whiten(values, mask, **options)
        seen["whitened"].append(found)
        state["collected"] = clock()
        return found

    def watched_mean(*arguments: object) -> torch.Tensor:
        seen["means"].append(mean(*arguments))
        return seen["means"][-1]

    def not_sampled(model: object, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return given, model(given).logits[:, PROMPT - 1 : -1]

    class Watch(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            marks.append((state["began"], state["collected"], clock()))
            state["began"] = clock()

    module.masked_whiten = watched_whiten
    module.masked_mean = watched_mean if given is not None else mean
    module.batch_generation = generate if given is None else not_sampled
    n_iterations = WARM_UP + TIMED if given is None else 1
    settings = PPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=micro, gradient_accumulation_steps=EPISODES // micro, num_mini_batches=1,
        num_ppo_epochs=EPOCHS, total_episodes=EPISODES * n_iterations, response_length=RESPONSE, temperature=1.0,
        local_rollout_forward_batch_size=EPISODES, learning_rate=LR if given is None else PARITY_LR,
        lr_scheduler_type="constant", warmup_steps=0,
        adam_beta2=0.95, weight_decay=0.0, kl_coef=0.05, vf_coef=1.0, cliprange=0.2, cliprange_value=0.2, gamma=1.0,
        lam=0.95, num_sample_generations=0, logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
        eval_strategy="no",
    )  # fmt: skip
    rows = datasets.Dataset.from_list([{"input_ids": ids} for ids in prompts(False)])
    trainer = PPOTrainer(
        args=settings, processing_class=words("pad"), model=policy, ref_model=reference, reward_model=Scripted(),
        value_model=value, train_dataset=rows, eval_dataset=rows.select(range(EPISODES)), callbacks=[Watch()],
    )  # fmt: skip
    trainer.train()
    if given is not None:
        # of each epoch, behind those of the whitening: the critic's loss and clip share, then the policy's
        means = [mean.item() for mean in seen["means"][-4 * EPOCHS :]]
        return {
            "advantages": seen["whitened"][0],
            "value": [0.5 * m for m in means[0::4]],
            "policy": means[2::4],
        }
    return summary([phases_of(*mark) for mark in marks])


def words(pad: str) -> object:
    """A tokenizer of transformers with a word for each id.

    pad: "pad", an id behind the embedding - PPO's trainer takes every id equal to it for padding, so it must not be
    sampled, and is never read, for all rows are equally long - or a word, where it is read.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {str(index): index for index in range(VOCAB)} | {"pad": VOCAB}
    model = Tokenizer(WordLevel(vocabulary, unk_token="0"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token=pad, eos_token="1", unk_token="0", padding_side="left"
    )


def trl_grpo(case: Case, folder: Path) -> dict[str, object]:
    """trl's GRPOTrainer: a batch of episodes is used in EPOCHS optimizer steps."""
    import datasets
    import torch
    from transformers import LlamaForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    marks: list[tuple[str, tuple[float, float]]] = [("began", clock())]

    class Watched(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: object) -> object:
            marks.append(("began", clock()))
            found = super()._generate_and_score_completions(inputs)
            marks.append(("collected", clock()))
            return found

    class Watch(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            marks.append(("done", clock()))

    def even(completion_ids: list[list[int]], **_: object) -> list[float]:
        return [scripted(ids) for ids in completion_ids]

    settings = GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=case.micro, gradient_accumulation_steps=EPISODES // case.micro,
        num_generations=GROUP, num_iterations=EPOCHS, max_completion_length=RESPONSE, temperature=1.0, top_k=0,
        beta=0.0, generation_kwargs={"eos_token_id": None},
        max_steps=EPOCHS * (WARM_UP + TIMED), learning_rate=LR, lr_scheduler_type="constant", warmup_steps=0,
        adam_beta2=0.95, weight_decay=0.0, epsilon=0.2, loss_type="grpo", shuffle_dataset=False,
        logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = Watched(
        model=LlamaForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32),
        reward_funcs=even,
        args=settings,
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": " ".join(map(str, ids))} for ids in prompts(True)]
        ),
        processing_class=words("0"),
        callbacks=[Watch()],
    )
    trainer.train()
    began = [at for name, at in marks[1:] if name == "began"]
    collected = [at for name, at in marks if name == "collected"]
    done = [at for name, at in marks if name == "done"][EPOCHS - 1 :: EPOCHS]
    return summary([phases_of(*mark) for mark in zip(began, collected, done, strict=True)])


def parity(folder: Path, trl_python: str) -> str:
    """The largest differences between the two PPOs on the same episodes; raises SystemExit beyond 1e-5."""
    import torch

    from src import losses
    from src.models.forward import response_logprobs, response_values
    from src.training import ppo

    side = our_side(CASES["PPO 5M"], folder, micro=EPISODES, lr=PARITY_LR, max_grad_norm=float("inf"))
    found, _ = side.collect(0)
    torch.save(found.batch.tokens, folder / "episodes.pth")
    mask, ours = found.batch.response_mask, {"policy": [], "value": []}
    for now in ppo.minibatches(found, side.config, 0):
        (micro,) = now.micros
        batch, pick = micro.of(found)
        values = response_values(side.models.critic.model, *batch.inputs)
        value = losses.ppo_value_loss(values, pick(found.values), pick(found.returns), side.config.value_clip)
        logprobs = response_logprobs(side.models.actor.model, *batch.inputs, n_ids=found.n_ids)
        ratio = losses.probability_ratio(logprobs, pick(found.logprobs))
        policy = losses.ppo_policy_loss(
            ratio, pick(found.advantages), side.config.clip_ratio, side.config.clip_high, side.config.dual_clip)
        value, policy = (each.sum() / now.tokens for each in (value, policy))
        for trainer, loss, name in ((side.models.critic, value, "value"), (side.models.actor, policy, "policy")):
            ours[name].append(loss.item())
            trainer.backward(loss)
            trainer.step()
    run_side("parity", "PPO 5M", folder, trl_python)
    their = torch.load(folder / "parity.pth")
    n = int(mask.sum())
    gaps = {
        "advantages": (
            found.advantages[mask].view(EPISODES, -1) * ((n - 1) / n) ** 0.5 - their["advantages"]
        ),
        "policy losses": torch.tensor(ours["policy"]) * ((n - 1) / n) ** 0.5
        - torch.tensor(their["policy"]),
        "value losses": torch.tensor(ours["value"]) - torch.tensor(their["value"]),
    }
    worst = {name: gap.abs().max().item() for name, gap in gaps.items()}
    line = "parity: " + ", ".join(f"{name} {gap:.1e}" for name, gap in worst.items())
    if max(worst.values()) > 1e-5:
        raise SystemExit(f"{line}\nours {ours}\ntheirs {their['policy']} {their['value']}")
    return f"{line}; losses ours {ours}"


def run_side(side: str, name: str, folder: Path, python: str) -> dict[str, object]:
    """One measurement in a process of its own."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    words = [python, __file__, "--side", side, "--only", name, "--folder", str(folder)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} {name} failed\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, folder: Path, trl_python: str, repeats: int) -> str:
    """A block of the table: medians of both sides, by phase, and their ratios."""
    pythons = {"ours": sys.executable, "theirs": sys.executable if CASES[name].grpo else trl_python}
    found: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    for repeat in range(repeats):
        for side in ("ours", "theirs") if repeat % 2 == 0 else ("theirs", "ours"):
            found[side].append(run_side(side, name, folder, pythons[side]))
    lines = []
    for clock_name, suffix in (("wall", ""), ("processor", "_cpu")):
        medians = {
            side: [statistics.median(row[phase + suffix] for row in rows) for phase in ("collect", "update")]
            for side, rows in found.items()
        }
        our, their = (sum(medians[side]) for side in ("ours", "theirs"))
        phases = "   ".join(
            f"{phase} {our:6.2f} {their:7.2f} {their / our:5.2f}x"
            for phase, our, their in zip(
                ("collect", "update"), medians["ours"], medians["theirs"], strict=True
            )
        )
        lines.append(f"{name:10} {clock_name:10} {our:7.2f} {their:8.2f} {their / our:6.2f}x   {phases}")
    peaks = {side: statistics.median(row["peak"] for row in rows) / 1e6 for side, rows in found.items()}
    lines.append(
        f"{name:10} peak MB    {peaks['ours']:7.0f} {peaks['theirs']:8.0f} {peaks['ours'] / peaks['theirs']:6.2f}"
    )
    return "\n".join(lines)


def main() -> None:
    """Print the table, or measure one side as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trl_python", default="")
    parser.add_argument("--only", default="", choices=["", *CASES])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", default="", choices=["", "ours", "theirs", "parity"])
    parser.add_argument("--folder", default="")
    options = parser.parse_args()
    if options.side == "parity":
        import torch

        folder = Path(options.folder)
        given = torch.load(folder / "episodes.pth")
        torch.save(trl_ppo(CASES[options.only], folder, EPISODES, given), folder / "parity.pth")
        print("{}")
        return
    if options.side:
        side = {"ours": ours, "theirs": theirs}[options.side]
        print(json.dumps(side(CASES[options.only], Path(options.folder))))
        return
    names = [options.only] if options.only else list(CASES)
    if not options.trl_python and any(not CASES[name].grpo for name in names):
        raise SystemExit("PPO needs --trl_python: a Python with trl==1.12.0")
    print(
        f"load {os.getloadavg()[0]:.1f}; seconds an iteration: ours, theirs, ratio; then by phase", flush=True
    )
    with tempfile.TemporaryDirectory() as scratch:
        for model in dict.fromkeys(CASES[name].model for name in names):
            folder = Path(scratch) / model
            folder.mkdir()
            write_model(model, folder)
            if model == "5M" and options.trl_python:
                print(parity(folder, options.trl_python), flush=True)
            for name in (name for name in names if CASES[name].model == model):
                print(compare(name, folder, options.trl_python, options.repeats), flush=True)


if __name__ == "__main__":
    main()
