"""What the ranks of the trainers' tests compute; each function also runs in the test's own process, on one rank.

They import nothing heavier than src: every rank pays for it.
"""

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import ppo_train
from src import load, parallel
from src.checkpoint import shards
from src.checkpoint.saving import begin_save
from src.code_solutions.tool_hook import Coding
from src.command import cli
from src.command.config import LoraFlags, OptimizerFlags, SavingFlags
from src.data.batch import Batch, BatchSampler
from src.data.examples import Instruction, Pair, Prompt, StepLabels
from src.errors import UserError
from src.grading.tasks import find_task
from src.models import linear
from src.models.decoder import Decoder
from src.models.forward import response_logprobs
from src.models.lora import LoraConfig
from src.processes import watchdog
from src.runlog import Phases, RunLog
from src.text.tokenizer import Tokenizer
from src.training import ppo, preference
from src.training.checkpointer import Checkpointer, Trainee
from src.training.monitor import rollout_metrics
from src.training.offload import ModelOffloader
from src.training.ppo import PPOBuffer
from src.training.ppo_config import PPOConfig
from src.training.ppo_setup import Inputs, PPOModels
from src.training.reference import reference_logprobs
from src.training.reward_model import pair_dataset
from src.training.rewards import (
    Reward,
    function_reward,
    on_first_rank,
    score_rollout,
    share_out,
    verifier_reward,
)
from src.training.rollout import Rollout
from src.training.sft import n_supervised, sft_dataset, sft_loss
from src.training.trainer import Trainer
from src.training.user_reward import UserReward

INSTRUCTIONS = [
    Instruction("1+1=", ["2"]),
    Instruction("a", ["bcdefgh 0123"]),
    Instruction("", ["7"]),
    Instruction("which is it: 3 or 4", ["abc", "4", "2+2=4\n\n#### 4"]),
    Instruction("0-0=", ["0 0 0"]),
    Instruction("a b c", ["d"]),
    Instruction("9-8=", ["#### 1"]),
]
PAIRS = [
    Pair("1+1=", ["2"], ["3", "abcdefgh 01"]),
    Pair("a", ["b c d e", "f"], ["g"]),
    Pair("", ["7"], ["8"]),
    Pair("2+2=", ["4\n\n#### 4"], ["5\n\n#### 5"], "2+2\n\n"),
    Pair("0-0=", ["0"], ["1 1 1 1 1 1 1 1"]),
]
OUTCOMES = [
    StepLabels(pair.instruction, [text], [label])
    for pair in PAIRS for label, side in ((1.0, pair.chosen), (0.0, pair.rejected)) for text in side
]
PROMPTS = [
    Prompt(str(index), text, "4", None, None)
    for index, text in enumerate(("2+2=", "a", "", "1 2 3 4 5", "b-c"))
]


def lora_of(rank: int, **kinds: bool) -> LoraConfig | None:
    """Adapters on some of the linears; None for rank -1."""
    return load.lora_config(
        LoraFlags(lora_rank=rank, lora_targets=["wq", "wo", "w1", "w2"], **kinds)) if rank > 0 else None


def local_weights(model: Decoder) -> dict[str, Tensor]:
    """This rank's parameters, for join_weights()."""
    return {name: parameter.detach().clone() if type(parameter) is nn.Parameter else parameter.detach().full_tensor()
            for name, parameter in model.named_parameters()}


def join_weights(ranks: list[dict[str, Tensor]], model: Decoder) -> dict[str, Tensor]:
    """The whole parameters from every rank's part; `model` is the same model on one rank."""
    return {
        name: shards.join([rank[name] for rank in ranks], shards.cut_of(name, model.config, len(ranks)))
        for name in ranks[0]
    }


def first_logprobs(folder: str) -> dict[str, Tensor]:
    """In bfloat16: what a frozen model says of two responses, and what it says under fresh adapters, to be trained."""
    rows = Batch(torch.arange(1, 25).view(2, 12), torch.arange(12).expand(2, 12) > 3)
    kinds = {"frozen": None, **{name: load.Trained(lora_of(4, dora=name == "dora")) for name in ("lora", "dora")}}
    with torch.no_grad():
        return {name: response_logprobs(load.load_solver(folder, precision="bfloat16", trained=trained), *rows.inputs)
                for name, trained in kinds.items()}


def clipped_steps(folder: str, log_dir: str) -> dict[str, Tensor]:
    """Reports of 3 clipped steps, full and LoRA, as tensors [3, loss norm lr]."""
    reports = {}
    rows = Batch(torch.arange(1, 25).view(2, 12), torch.arange(12).expand(2, 12) > 3)
    for name in ("full", "lora"):
        model = load.load_solver(folder)
        if name == "lora":
            load.put_lora_on(model, lora_of(4), seed=1)
        trainer = Trainer(
            model, RunLog(log_dir, {}), OptimizerFlags(lr=1e-2, max_grad_norm=0.5), total_steps=3
        )
        found = []
        for _ in range(3):
            trainer.backward(sft_loss(model, rows) / n_supervised([rows]))
            found.append(trainer.step())
        reports[name] = torch.tensor(found, dtype=torch.float64)
    return reports


def invariance_cases(
    folder: str, log_dir: str, cases: list[dict[str, object]]
) -> dict[str, dict[str, Tensor]]:
    """sft_epochs() of every case, by its place in the list; oneDNN multiplies, as in models of real width."""
    linear.SMALL = 0
    return {str(index): sft_epochs(folder, log_dir, **case) for index, case in enumerate(cases)}


def sft_epochs(
    folder: str,
    log_dir: str,
    max_batch_size: int = 2,
    accumulation_steps: int = 2,
    packing: bool = False,
    lora_rank: int = -1,
    schedule: str = "cosine",
    activation_checkpointing: str = "none",
    dora: bool = False,
) -> dict[str, Tensor]:
    """This tensor-parallel rank's weights after two epochs on INSTRUCTIONS, and every step's loss under `losses`."""
    lora = lora_of(lora_rank, dora=dora)
    model = load.load_solver(folder, trained=load.Trained(lora))
    tokenizer = load.load_tokenizer(folder)
    data = sft_dataset(INSTRUCTIONS, tokenizer, max_seq_len=64, source="INSTRUCTIONS")
    trainer = Trainer(
        model,
        RunLog(log_dir, {}),
        OptimizerFlags(
            lr=1e-4, weight_decay=0.1, schedule=schedule, activation_checkpointing=activation_checkpointing
        ),
        total_steps=4,
    )
    found = []
    batching = BatchSampler(
        max_batch_size=max_batch_size,
        accumulation_steps=accumulation_steps,
        seed=3,
        rank=parallel.data_parallel_rank(),
        ranks=parallel.data_parallel_size(),
    )
    for _, _, batches in batching.steps(data, packing=packing, epochs=2):
        n_tokens = parallel.sum_over_data_parallel(n_supervised(batches))
        for batch in batches:
            trainer.backward(sft_loss(model, batch) / n_tokens, last=batch is batches[-1])
        found.append(trainer.step().loss)
    return local_weights(model) | {"losses": torch.tensor(found)}


def preference_cases(
    folder: str, log_dir: str, cases: list[dict[str, object]]
) -> dict[str, dict[str, Tensor]]:
    """preference_epochs() of every case, by its place in the list."""
    return {str(index): preference_epochs(folder, log_dir, **case) for index, case in enumerate(cases)}


def preference_epochs(
    folder: str,
    log_dir: str,
    max_batch_size: int = 8,
    accumulation_steps: int = 1,
    packing: bool = False,
    lora_rank: int = -1,
    **options: object,
) -> dict[str, Tensor]:
    """This tensor-parallel rank's weights after two steps of 8 on PAIRS, and the reports of every step."""
    tokenizer, log = load.load_tokenizer(folder), RunLog(log_dir, {})
    if options.pop("kto", False):
        kind: preference.Preference | preference.KTO = preference.KTO(beta=0.1, **options)
        data = preference.outcome_dataset(OUTCOMES, tokenizer, max_seq_len=64, source="OUTCOMES")
    else:
        kind = preference.Preference(**{"objective": "dpo", "beta": 0.1} | options)
        data = pair_dataset(PAIRS, tokenizer, max_seq_len=64, source="PAIRS")._replace(collate=preference.collate_sides)
    model, reference = load.load_solver(folder), None
    if kind.needs_reference:
        path = Path(log_dir) / f"{folder.replace('/', '_')}.jsonl"
        reference = reference_logprobs(model, data.samples, path, "identity", max_batch_size=2, log=log)
    data = preference.with_reference(data, reference)
    load.put_lora_on(model, lora_of(lora_rank), seed=1)
    trainer = Trainer(model, log, OptimizerFlags(lr=1e-4, weight_decay=0.1), total_steps=2)
    batching = BatchSampler(
        max_batch_size=max_batch_size,
        accumulation_steps=accumulation_steps,
        seed=3,
        rank=parallel.data_parallel_rank(),
        ranks=parallel.data_parallel_size(),
    )
    model.train()
    losses, reports = [], []
    for _, _, batches in batching.steps(data, packing=packing, epochs=2):
        in_step, tallies = parallel.sum_over_data_parallel(kind.count(batches)), []
        measured = kind.of_step(model, batches)
        for batch in batches:
            loss, tally = measured.loss(model, batch)
            trainer.backward(loss / in_step, last=batch is batches[-1])
            tallies.append(tally)
        losses.append(trainer.step().loss)
        reports.append(kind.report(tallies))
    if kind.needs_reference:
        reports[0] = reports[0]._replace(accuracy=0.0)  # margins of 0: rounding decides who is ahead
    held = preference.evaluate(model, data, kind, batching, packing=packing)
    found = {"losses": losses, "reports": reports, "held": held}
    return local_weights(model) | {name: torch.tensor(values) for name, values in found.items()}


def ppo_config(**changes: object) -> PPOConfig:
    """PPO's numbers for a buffer of a few short episodes; directories are given where they are needed."""
    numbers = {
        "temperature": 0.8,
        "max_new_tokens": 6,
        "rollout_batch_size": 4,
        "max_buffer_size": 16,
        "max_batch_size": 2,
        "inner_epochs": 2,
        "minibatches": 2,
        "kl_coef": 0.1,
        "missing_eos_penalty": 0.5,
        "seed": 11,
        "lr": 1e-4,
        "reward": ["rule"],
    }
    numbers |= {"actor_ckpt_dir": "actor", "actor_save_dir": "save"}
    if changes.get("advantage", "gae") == "gae":
        numbers |= {"critic_ckpt_dir": "critic", "critic_save_dir": "save-critic", "gae_lambda": 0.95}
    numbers |= {"kl_loss_coef": 0.01} if "kl_loss" in changes else {}
    numbers |= {"kl_horizon": 100.0} if "kl_target" in changes else {}
    if changes.get("truncated", "penalty") != "penalty":
        del numbers["missing_eos_penalty"]
    return PPOConfig(**numbers | changes)


def ppo_models(
    actor: str, critic: str, log_dir: str, lora_rank: int = -1, adam_eps: float = 1e-8,
    lora: LoraConfig | None = None, **flags: object,
) -> PPOModels:
    """Actor and reference from one directory, the critic from another (empty: none)."""
    log, flags = RunLog(log_dir, {}), OptimizerFlags(**({"lr": 1e-4} | flags))
    lora = lora or lora_of(lora_rank)
    model, reference = load.load_solver(actor), None if lora else load.load_solver(actor)
    load.put_lora_on(model, lora, seed=1)
    value = load.load_verifier(critic, from_solver=True) if critic else None
    trainers = (each and Trainer(each, log, flags, total_steps=8, adam_eps=adam_eps) for each in (model, value))
    return PPOModels(*trainers, None, ModelOffloader(), reference)


def collect(
    models: PPOModels, tokenizer: Tokenizer, reward: Callable[[Rollout], Tensor], config: PPOConfig, iteration: int,
    question: str = "",
) -> tuple[PPOBuffer, dict[str, float]]:
    """A buffer of PROMPTS, or of as many times one question, with one reward, by ppo_train.py."""
    prompts = [prompt._replace(instruction=question or prompt.instruction) for prompt in PROMPTS]
    rewards = {"length": Reward(1.0, lambda rollout: (reward(rollout), {}))}
    coding = Coding(tokenizer, max_rounds=8) if tokenizer.code else None
    data, rows = Inputs(prompts, [], 0, tokenizer, find_task("toy"), [], 1, coding), range(len(PROMPTS))
    return ppo_train.collect(config, models, data, rewards, rows, iteration, 1.0, Phases())


def ppo_update(
    models: PPOModels, buffer: PPOBuffer, config: PPOConfig, iteration: int, critic_warmup: int = 0
) -> dict[str, float]:
    """What ppo_train.py does with a buffer: the critic learns, then the actor."""
    metrics = dict(ppo.NOTHING_LEARNED)
    if models.critic:
        metrics |= ppo.update_critic(models.critic, buffer, config, iteration)
    if iteration >= critic_warmup:
        metrics |= ppo.update_actor(models.actor, buffer, config, iteration, critic_warmup)
    return metrics


def ppo_cases(
    actor: str, critic: str, log_dir: str, cases: list[dict[str, object]]
) -> dict[str, dict[str, dict[str, Tensor]]]:
    """ppo_buffers() of every case, by its place in the list; oneDNN multiplies, as in models of real width."""
    linear.SMALL = 0
    return {str(index): ppo_buffers(actor, critic, log_dir, **case) for index, case in enumerate(cases)}


def ppo_buffers(
    actor: str,
    critic: str,
    log_dir: str,
    max_batch_size: int = 2,
    lora_rank: int = -1,
    question: str = "",
    **changes: object,
) -> dict[str, dict[str, Tensor]]:
    """Two buffers against the critic as verifier: weights, the rollouts' numbers, and what was logged."""
    config = ppo_config(max_batch_size=max_batch_size, **changes)
    models = ppo_models(actor, critic if config.has_critic else "", log_dir, lora_rank, config.adam_eps, lr=config.lr)
    if config.teacher_ckpt_dir:
        models.teacher = load.load_solver(actor)
    tokenizer, verifier = load.load_tokenizer(actor), load.load_verifier(critic)
    found: dict[str, dict[str, Tensor]] = {"rollouts": {}}
    for iteration in range(2):
        buffer, stats = collect(
            models, tokenizer,
            lambda rollout: verifier_reward(verifier, tokenizer, config, max_batch_size, None, rollout)[0],
            config, iteration, question,
        )
        metrics = ppo_update(models, buffer, config, iteration)
        values = buffer._asdict() | buffer.batch._asdict() | rollout_metrics(buffer, config) | stats | metrics
        found["rollouts"] |= {
            f"{name} {iteration}": torch.as_tensor(value)
            for name, value in values.items()
            if isinstance(value, Tensor | float)
        }
    parallel.barrier()
    trained = {"actor": models.actor.model} | ({"critic": models.critic.model} if models.critic else {})
    return found | {name: local_weights(model) for name, model in trained.items()}


def graded_once(file: str) -> dict[str, Tensor]:
    """One right episode, on however many data-parallel ranks: what it earns, and how many episodes were graded.

    And two of them by the function `count` of a file, with its `n` of the log.
    """
    batch = Batch(torch.tensor([[1, 5, 2]]), torch.tensor([[False, True, True]]))
    rollout = Rollout(PROMPTS[:1], ["4"], batch, torch.tensor([True]), torch.zeros(1, 3), [[]])
    reward = partial(on_first_rank, lambda rollout: ([1.0], {"graded_right": (1, 1)}))
    scores = score_rollout({"rule": Reward(1.0, partial(share_out, reward))}, rollout)
    found = {"earned": scores.total, "graded": torch.tensor(scores.counts["graded_right"][1])}
    with UserReward(f"{file}:count") as function:
        count = Reward(1.0, partial(function_reward, function, "count"))
        scores = score_rollout({"count": count}, rollout.take(torch.tensor([0, 0])))
    return found | {"counted": scores.total, "n": torch.tensor(scores.counts["reward_count/n"])}


def resumed_epochs(
    folder: str,
    save_dir: str,
    first: int,
    last: int,
    lora_rank: int = -1,
    background: bool = False,
    optimizer: str = "adamw",
    precision: str = "",
) -> dict[str, Tensor]:
    """Steps `first` + 1 .. `last` of a run of 8 on INSTRUCTIONS, saved after each; losses and every rank's weights."""
    lora = lora_of(lora_rank)
    model = load.load_solver(folder, precision=precision, trained=load.Trained(lora))
    data = sft_dataset(INSTRUCTIONS, load.load_tokenizer(folder), max_seq_len=64, source="INSTRUCTIONS")
    ranks = parallel.data_parallel_size()
    batching = BatchSampler(
        max_batch_size=2,
        accumulation_steps=2 // ranks,
        seed=3,
        rank=parallel.data_parallel_rank(),
        ranks=ranks,
    )
    log = RunLog(save_dir, {})
    trainer = Trainer(
        model, log, OptimizerFlags(lr=1e-3, weight_decay=0.1), total_steps=8, optimizer=optimizer
    )
    flags = SavingFlags(save_every=1, keep_last=1, background_save=background)
    checkpointer = Checkpointer(
        log, [Trainee(save_dir, trainer, folder)], flags, lora=lora, steps_per_epoch=2, total_steps=8,
        run_fingerprint={},
    )
    assert checkpointer.resume("auto") == first
    model.train()
    losses = []
    for step in batching.steps(data, packing=True, epochs=4, done=first, stop=last):
        n_tokens = parallel.sum_over_data_parallel(n_supervised(step.batches))
        for batch in step.batches:
            trainer.backward(sft_loss(model, batch) / n_tokens, last=batch is step.batches[-1])
        losses.append(trainer.step().loss)
        checkpointer.step_done(step.number)
    checkpointer.complete()
    return local_weights(model) | {"losses": torch.tensor(losses)}


def hash_for(seconds: float) -> None:
    """One call that only computes, about so long on whatever processor this is."""
    trial, spent = 500_000, []
    for _ in range(3):
        start = time.process_time()
        hashlib.pbkdf2_hmac("sha256", b"", b"", trial)
        spent.append(time.process_time() - start)
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(trial * seconds / min(spent)))


def interrupted(folder: str, save_dir: str, how: str) -> None:
    """Two steps of a run that catches SIGTERM; in the second something befalls one rank, or one waits for the other."""
    model = load.load_solver(folder, trained=load.Trained())
    log = RunLog(save_dir, {})
    trainer = Trainer(model, log, OptimizerFlags(lr=1e-3), total_steps=2)
    trainee = Trainee(save_dir, trainer, folder)
    saving = SavingFlags(save_every=-1, keep_last=1)
    Checkpointer(log, [trainee], saving, steps_per_epoch=9, total_steps=9, run_fingerprint={})
    for step in range(2):
        if step == 1 and how.startswith("asks"):
            if how == "asks-nobody" and parallel.rank() == 0:
                time.sleep(1000)
            (Path(save_dir) / "since").write_text(str(time.time()), encoding="utf-8")

            def answer() -> str:
                if how == "asks-in-vain":
                    raise UserError("row 7 is broken")
                time.sleep(8)
                return "answer"

            assert parallel.from_first_rank(answer) == "answer"
        elif step == 1 and how == "writes":
            (Path(save_dir) / "since").write_text(str(time.time()), encoding="utf-8")
            save = begin_save(model, f"{save_dir}/slowly", folder)
            with watchdog.patiently():
                for _ in range(70 * parallel.rank()):  # tensors, to a slow disk
                    time.sleep(0.1)
                    watchdog.got_on()
                save.complete()
        elif step == 1 and parallel.rank() == 1:
            (Path(save_dir) / "since").write_text(str(time.time()), encoding="utf-8")
            if how == "hangs":
                time.sleep(1000)
            if how in ("stops", "dies"):
                time.sleep(1)
                os.kill(os.getpid(), signal.SIGSTOP if how == "stops" else signal.SIGKILL)
            if how == "fails":
                raise UserError("row 7 is broken")
            with watchdog.patiently():
                time.sleep(6)
            hash_for(2 * watchdog.STILL_SECONDS)
        trainer.backward(
            sft_loss(model, Batch(torch.tensor([[1, 5, 2]]), torch.tensor([[False, True, True]]))) / 2.0
        )
        trainer.step()


if __name__ == "__main__":  # a rank whose mistakes end as those of an entry script
    watchdog.LOOK_SECONDS, watchdog.SILENT_SECONDS, watchdog.STILL_SECONDS = 0.2, 3.0, 4.0
    watchdog.GRACE_SECONDS = 3.0
    if {"--how=asks", "--how=writes"} & {*sys.argv}:
        watchdog.LONGEST_SECONDS = {"cpu": 3.0}
    parallel.start(1)
    cli.run(interrupted)
