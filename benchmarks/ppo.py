"""PPO and GRPO beside trl: the same nets, prompts, episodes, epochs and scripted reward; parity first, then rates.

python benchmarks/ppo.py --trl_python VENV/bin/python [--only "PPO 5M ragged,GRPO 5M ragged"] [--repeats 3]

trl has no PPO since 1.13: --trl_python is a Python with trl==1.12.0 and transformers==5.23.0 on the same torch; GRPO
runs against the trl of this Python. On a CPU, one thread, 64 episodes, 2 epochs, nothing logged or saved; bfloat16 is
--precision bfloat16 here and autocast there. Responses are either all 64 tokens, or ragged: they end by themselves at
EOS, to which the random model gives 1/96 everywhere, or are cut at 256 tokens, 90 on average (SmolLM2's on GSM8K: 110).
Rates count response tokens, sampled, scored and learnt from. The number of tokens an episode has is random; a side
whose mean is 30% off ours is not compared.

Parity, in float32: theirs is given our episodes. PPO's advantages and the mean losses of policy and critic over both
epochs (the second after a step of Adam) must agree with ours within 1e-5 where the definitions do; GRPO's mean loss
within 1e-5 and norms of gradients within 0.1%, on ragged episodes too. PPO's definitions differ in
- the variance advantages are divided by: theirs is n - 1's, ours n's; the comparison takes that factor out
- where an episode with EOS is paid: theirs after EOS, on padding, ours on EOS; the episodes compared have none
- means: theirs over each micro-batch, ours over the optimizer step; for parity a step is one micro-batch
- the gradient: theirs is not clipped, with one optimizer for both nets; ours is clipped at 1, for parity never
"""

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import paired  # noqa: E402
from benchmarks.paired import Run, Watch  # noqa: E402

EPISODES, PROMPT, VOCAB, GROUP, EPOCHS = 64, 16, 2048, 8, 2
PADDING, EOS, MEAN_LENGTH = 0, 1, 96
WARM_UP, TIMED = 1, 1  # iterations
LR = 1e-6  # at which lengths stay alike; Adam's first step is lr times a gradient's sign, so parity wants it small too


class Case(NamedTuple):
    """One comparison."""

    model: str
    grpo: bool = False
    ragged: bool = False
    micro: int = 16  # episodes in a training forward pass

    @property
    def response(self) -> int:
        """Tokens at most."""
        return 256 if self.ragged else 64


CASES = {
    f"{kind} {model}{' ragged' * ragged}": Case(model, kind == "GRPO", ragged)
    for kind in ("PPO", "GRPO") for model in ("tiny", "5M", "60M") for ragged in (False, True)
}


def prompts(case: Case) -> list[list[int]]:
    """Random token ids, for one iteration after the other."""
    rng = random.Random(3)
    n = EPISODES // (GROUP if case.grpo else 1) * (WARM_UP + TIMED)
    return [[rng.randrange(4, VOCAB) for _ in range(PROMPT)] for _ in range(n)]


def write_model(case: Case, folder: Path) -> None:
    """Random weights as a Hugging Face directory and as ours, and a value head.

    Channel 0 of the hidden state says the same everywhere, for no layer writes there: it gives EOS its probability, and
    padding, which trl's PPO recognises by its id, none.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = paired.MODELS[case.model]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, max_position_embeddings=512, num_key_value_heads=size["num_attention_heads"],
        tie_word_embeddings=False, pad_token_id=PADDING, bos_token_id=None, eos_token_id=EOS, **size,
    ))
    logits = {PADDING: -30.0, EOS: math.log(VOCAB / MEAN_LENGTH) if case.ragged else -30.0}
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.1
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[:, 0] = 0.0
        constant = model.model(torch.tensor(prompts(case)[:4])).last_hidden_state[..., 0].mean()
        for token, logit in logits.items():
            model.lm_head.weight[token] = 0.0
            model.lm_head.weight[token, 0] = logit / constant
    paired.save_model(model, folder)
    torch.save(0.05 * torch.randn(1, size["hidden_size"]), folder / "head.pth")


class Ids:
    """A tokenizer whose texts are token ids."""

    vocab_size, bos_id, chat, code = VOCAB, None, None, None
    stop_ids = frozenset({EOS})

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
    collect: Callable[[int], object]  # the buffer of an iteration


def our_side(
    case: Case, folder: Path, *, micro: int, max_grad_norm: float = 1.0, precision: str = "float32"
) -> Ours:
    """Models, and how a buffer is collected. The reward is the share of even ids among a response's tokens."""
    import torch

    import ppo_train
    from src import parallel
    from src.data.examples import Prompt
    from src.grading.tasks import find_task
    from src.runlog import Phases, RunLog
    from src.training.ppo_config import PPOConfig
    from src.training.ppo_setup import Inputs, load_models
    from src.training.rewards import Reward, on_first_rank, share_out
    from src.training.rollout import Rollout

    parallel.start()
    source = str(folder / "ours")
    critic = {} if case.grpo else {
        "critic_ckpt_dir": source, "critic_save_dir": str(folder / "critic"), "critic_lr": LR, "critic_warmup": 0,
        "value_clip": 0.2, "gae_lambda": 0.95}
    config = PPOConfig(
        actor_ckpt_dir=source, actor_save_dir=str(folder / "actor"), advantage="grpo" if case.grpo else "gae",
        group_size=GROUP if case.grpo else -1, reward=["rule"], temperature=1.0, max_new_tokens=case.response,
        rollout_batch_size=EPISODES, max_buffer_size=EPISODES, max_batch_size=micro, inner_epochs=EPOCHS, minibatches=1,
        kl_coef=0.0 if case.grpo else 0.05, clip_ratio=0.2, clip_high=0.2,
        missing_eos_penalty=0.0, lr=LR, schedule="constant", warmup_ratio=0.0, precision=precision,
        max_grad_norm=max_grad_norm, **critic,
    )
    models = load_models(config, RunLog(str(folder / "log"), {}), 100)
    models.load_reference(config, refreshed=False)
    if models.critic:
        models.critic.model.v_head.weight.data.copy_(torch.load(folder / "head.pth"))
    rows = [Prompt(str(n), " ".join(map(str, ids)), None, None, None) for n, ids in enumerate(prompts(case))]

    def score(rollout: Rollout) -> tuple[list[float], dict]:
        mask = rollout.batch.response_mask
        return (((rollout.batch.tokens % 2 == 0) & mask).sum(1) / mask.sum(1)).tolist(), {}

    rewards = {"even": Reward(1.0, partial(share_out, partial(on_first_rank, score)))}
    data = Inputs(rows, [], 0, Ids(), find_task(config.task), [], 1)

    def collect(iteration: int) -> object:
        n = config.prompts_per_buffer
        chosen = range(iteration * n, (iteration + 1) * n)
        return ppo_train.collect(config, models, data, rewards, chosen, iteration, 1.0, Phases())[0]

    return Ours(models, config, collect)


def update(side: Ours, buffer: object, iteration: int) -> dict[str, float]:
    """The critic learns, then the actor. Means over the epochs."""
    from src.training import ppo

    found = ppo.update_critic(side.models.critic, buffer, side.config, iteration) if side.models.critic else {}
    return found | ppo.update_actor(side.models.actor, buffer, side.config, iteration)


def ours(case: Case, folder: Path, *, precision: str) -> Run:
    """Our iterations."""
    side, watch = our_side(case, folder, micro=case.micro, precision=precision), Watch()
    watch.start()
    for step in range(WARM_UP + TIMED):
        buffer = side.collect(step)
        watch.collected()
        watch.work.append(int(buffer.rollout.lengths.sum()))
        assert update(side, buffer, step)["grad_norm"] > 0
        watch.tick()
    return watch.record()


def theirs(case: Case, folder: Path, *, bf16: bool = False, parity: bool = False) -> dict[str, object]:
    """trl's iterations; or what parity() compares, computed from our episodes."""
    import torch

    from benchmarks.trl_common import Setting

    torch.set_num_threads(1)
    iterations = 1 if parity else WARM_UP + TIMED
    setting = Setting(
        folder, prompts(case), VOCAB, EPISODES, EPISODES if parity else case.micro, case.response, EPOCHS, iterations,
        LR, bf16, torch.load(folder / "episodes.pth") if parity else None,
    )
    if case.grpo:
        from benchmarks import trl_grpo

        return (trl_grpo.parity if parity else trl_grpo.measure)(setting, GROUP)
    from benchmarks import trl_ppo

    return (trl_ppo.parity if parity else trl_ppo.measure)(setting)


def parity(name: str, folder: Path, python: str) -> str:
    """How far the two sides lie apart on the same episodes; raises SystemExit beyond the bounds."""
    import torch

    case = CASES[name]
    side = our_side(case, folder, micro=EPISODES, max_grad_norm=1e9)
    buffer = side.collect(0)
    torch.save(buffer.batch.tokens, folder / "episodes.pth")
    mask, found = buffer.batch.response_mask, update(side, buffer, 0)
    their = paired.run_side(__file__, "parity", name, folder, python=python)
    if case.grpo:
        gaps = {
            "loss": abs(found["policy_loss"] - their["policy_loss"]) / 1e-5,
            "norm of the gradient": abs(found["grad_norm"] / their["grad_norm"] - 1) / 1e-3,
        }
    else:
        n = int(mask.sum())
        unbiased = ((n - 1) / n) ** 0.5
        advantages = buffer.advantages[mask].view(EPISODES, -1) * unbiased - torch.tensor(their["advantages"])
        gaps = {
            "advantages": advantages.abs().max().item() / 1e-5,
            "policy loss": abs(found["policy_loss"] * unbiased - their["policy_loss"]) / 1e-5,
            "value loss": abs(found["value_loss"] - their["value_loss"]) / 1e-5,
        }
    shares = ", ".join(f"{what} {gap:.2g}" for what, gap in gaps.items())
    line = f"{name}, parity, as a share of what is allowed: {shares}"
    if max(gaps.values()) > 1:
        raise SystemExit(f"{line}\nours {found}\ntheirs {their}")
    return line


SIDES = {
    "ours": lambda case, folder: ours(case, folder, precision="float32"),
    "ours, bfloat16": lambda case, folder: ours(case, folder, precision="bfloat16"),
    "trl": theirs,
    "trl, bfloat16": lambda case, folder: theirs(case, folder, bf16=True),
    "parity": lambda case, folder: theirs(case, folder, parity=True),
}


def compare(name: str, folder: Path, trl_python: str, repeats: int) -> str:
    """The table of one case."""

    def measure(side: str) -> Run:
        ours = side.startswith("ours") or CASES[name].grpo
        return paired.run_side(__file__, side, name, folder, python=sys.executable if ours else trl_python)

    def phases(run: Run) -> tuple[float, float]:
        """Mean processor seconds of collecting and of learning from a buffer."""
        times, middles = ([mark[0] for mark in run[marks]] for marks in ("times", "middles"))
        collect = sum(middle - start for middle, start in zip(middles[WARM_UP:], times[WARM_UP:-1], strict=True))
        return collect / TIMED, (times[-1] - times[WARM_UP] - collect) / TIMED

    def length(run: Run) -> float:
        return sum(run["work"]) / len(run["work"]) / EPISODES

    found = paired.in_turns([side for side in SIDES if side != "parity"], repeats, measure)
    columns = {
        "tokens/cpu s": lambda run: paired.rate(run, 0, WARM_UP),
        "tokens/s": lambda run: paired.rate(run, 1, WARM_UP),
        "collect cpu s": lambda run: phases(run)[0],
        "learn cpu s": lambda run: phases(run)[1],
        "tokens/episode": length,
        "peak MiB": lambda run: run["peak"] / 2**20,
    }
    base = sum(map(length, found["ours"])) / repeats
    gaps = {side: (abs(sum(map(length, runs)) / repeats / base - 1), 0.3) for side, runs in found.items()}
    return paired.table(name, found, columns, gaps)


def check_trl(python: str) -> None:
    """Raise SystemExit unless it is a Python with a trl that has PPO."""
    command = [python, "-c", "import importlib.metadata as m; print(m.version('trl'))"]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if python else None
    if not done or done.stdout.strip() != "1.12.0":
        found = done.stdout.strip() or done.stderr.strip()[-200:] if done else "no --trl_python"
        raise SystemExit(f"PPO needs --trl_python, a Python with trl==1.12.0; found {found}")


def main() -> None:
    """Print the tables, or measure one side as JSON."""
    parser = argparse.ArgumentParser()
    everything = ",".join(name for name in CASES if "tiny" not in name)
    parser.add_argument("--only", default=everything, help="cases, with commas between")
    parser.add_argument("--trl_python", default="", help="a Python with trl 1.12, for PPO")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", default="", choices=["", *SIDES])
    parser.add_argument("--folder", default="")
    options = parser.parse_args()
    names = options.only.split(",")
    if options.side:
        print(json.dumps(SIDES[options.side](CASES[names[0]], Path(options.folder))))
        return
    if not all(CASES[name].grpo for name in names):
        check_trl(options.trl_python)
    print(f"{paired.machine('trl', 'transformers')}; for PPO trl 1.12.0", flush=True)
    for name in names:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            write_model(case, Path(folder))
            if case.grpo or not case.ragged:
                print(parity(name, Path(folder), sys.executable if case.grpo else options.trl_python), flush=True)
            print(compare(name, Path(folder), options.trl_python, options.repeats), flush=True)


if __name__ == "__main__":
    main()
