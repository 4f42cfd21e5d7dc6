"""Improve a solver by reinforcement learning - PPO, GRPO, RLOO, REINFORCE++ - against a verifier, a grader or both.

torchrun --nproc_per_node 8 ppo_train.py --actor_ckpt_dir out --actor_save_dir ppo/actor --critic_ckpt_dir verifier \
    --critic_save_dir ppo/critic --reward_model_ckpt_dir verifier --train_file dataset/GSM8K/train.json
"""

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from src import cli, load, losses, parallel, plan, runlog
from src.checkpoint import saving, storage
from src.data.collate import chunks, epoch_order
from src.data.examples import Prompt, read_prompts
from src.errors import UserError
from src.grading.grader import Grader
from src.inference.sampling import Sampling
from src.runlog import Phases, RunLog
from src.text.tokenizer import Tokenizer
from src.training import monitor, ppo, rewards
from src.training.checkpointer import Checkpointer, Trainee
from src.training.ppo import PPOBuffer
from src.training.ppo_config import PPOConfig
from src.training.ppo_models import PPOModels, load_models
from src.training.resuming import find_start, run_facts
from src.training.rewards import Reward, Scores
from src.training.rollout import (
    Rollout,
    fitting_prompts,
    greedy_accuracy,
    rollout_logprobs,
    rollout_values,
    sample_rollout,
)
from src.training.user_reward import UserReward


def main(config: PPOConfig) -> None:
    """An iteration samples a buffer of responses, scores them, and updates critic and actor on their advantages."""
    data = read_inputs(config)
    n_iterations = len(data.iterations)
    critic_warmup = config.warmup_iterations(n_iterations)
    if config.dry_run:
        runlog.table(plan.ppo(config, data.prompts, data.held_out, data.tokenizer, n_iterations))
        return
    parallel.start(config.seed, load.tensor_parallel_size(config.actor_ckpt_dir, config.tensor_parallel_size))
    for save_dir in config.save_dirs:
        saving.check_save_dir(
            save_dir, config.actor_ckpt_dir, config.critic_ckpt_dir, config.reward_model_ckpt_dir)
    storage.claim(Path(config.run_dir))
    facts = run_facts("ppo_train", config.flags(), critic_warmup=critic_warmup,
                      precision=str(parallel.compute_dtype(config.precision)))
    find_start(config.save_dirs, config.resume, facts, n_iterations)
    log = RunLog(config.run_dir, config.flags(), wandb=config.wandb)
    models = load_models(config, log, n_iterations)
    actor, critic, loaded = models.actor, models.critic, models.offloader.loaded
    state: dict[str, object] = {"kl_scale": 1.0, "update_checked": False}
    alerts = monitor.Monitor(log.logger, state)
    checkpointer = open_checkpointer(config, models, log, state, data, facts)
    done = checkpointer.resume(config.resume)
    models.load_reference(config, refreshed=0 < config.reference_refresh <= done)
    n_ids = data.tokenizer.vocab_size
    log.progress(n_iterations, "buffer", done)

    with contextlib.ExitStack() as in_use:
        in_use.enter_context(models.offloader)
        grader = in_use.enter_context(Grader(config.task))
        parts = open_rewards(config, models, data.tokenizer, grader, in_use)
        if data.held_out and not done:
            timer = Phases()
            score = held_out_accuracy(config, models, data, grader, timer)
            log.metrics(0, eval_accuracy=score, **timer.seconds)
            checkpointer.measured_start(score)

        for iteration, (epoch, rows) in list(enumerate(data.iterations))[done:]:
            timer, now = Phases(), config.with_kl_scale(state["kl_scale"])

            rollout, scores, groups = ppo.fill_buffer(
                partial(sample_and_score, config, models, data, parts, rows, iteration, timer), config)
            buffer = make_buffer(models, rollout, scores, now, n_ids, timer)
            metrics = monitor.rollout_metrics(buffer, scores, groups, now) | ppo.NOTHING_LEARNED
            if iteration == 0:
                monitor.check_start(metrics, buffer, same_reference=config.lora_rank > 0 or not config.quantize)

            # The critic learns first, then the actor: neither reads the other, only one need be in memory
            if critic:
                with timer("update"), loaded(critic.model, optimizer=True):
                    metrics |= ppo.update_critic(critic, buffer, now, iteration)
            if iteration >= critic_warmup:
                with timer("update"), loaded(actor.model, optimizer=True):
                    metrics |= ppo.update_actor(actor, buffer, now, iteration, critic_warmup)
                if not state["update_checked"]:
                    state["update_checked"] = monitor.check_first_update(metrics, buffer)
                # before, the policy is the reference
                state["kl_scale"] *= monitor.kl_factor(metrics["kl_response"], len(rollout.prompts), config)

            score = None
            if data.held_out and data.is_due(iteration + 1, config.eval_every):
                metrics["eval_accuracy"] = score = held_out_accuracy(config, models, data, grader, timer)
            tokens = int(rollout.lengths.sum())
            shown = alerts.check(iteration + 1, metrics)
            log.metrics(iteration + 1, shown, epoch=epoch, **metrics, **timer.seconds,
                        tokens_per_second=timer.rate(tokens))
            log.rows(f"rollouts/step-{iteration + 1:06}.jsonl",
                     monitor.readable_rows(buffer, scores, config.rollout_samples))
            said = alerts.warn(iteration + 1, shown)
            log.advance(tokens=tokens, reward=metrics["reward"], kl=metrics["kl"])
            checkpointer.step_done(iteration + 1, score, "; ".join(said) if config.stop_on_alarm else "")
            if config.reference_refresh > 0 and (iteration + 1) % config.reference_refresh == 0:
                checkpointer.complete()
                models.load_reference(config, refreshed=True)
        checkpointer.finish()
        alerts.summary(n_iterations)


def sample_and_score(
    config: PPOConfig, models: PPOModels, data: "Inputs", parts: dict[str, Reward], rows: Sequence[int], iteration: int,
    timer: Phases, refill: int = 0,
) -> tuple[Rollout, Scores]:
    """Responses to the prompts of an iteration, or to those that it is refilled with, and what they earn."""
    if refill:
        order = -(iteration * config.max_refills + refill)
        rows = epoch_order(len(data.prompts), config.seed, order)[: len(rows)]
    sampling = Sampling(temperature=config.temperature, max_new_tokens=config.max_new_tokens, seed=config.seed)
    first = (iteration * (1 + config.max_refills) + refill) * config.group_size
    with timer("sample"), models.offloader.loaded(models.actor.model):
        rollout = sample_rollout(
            models.actor.model, [data.prompts[row] for row in rows], data.tokenizer, sampling,
            group_size=config.group_size, first_sample=first, max_batch_size=config.rollout_batch_size)
    with timer("reward"), models.offloader.loaded(models.verifier):
        return rollout, rewards.score_rollout(parts, rollout)


def make_buffer(
    models: PPOModels, rollout: Rollout, scores: Scores, config: PPOConfig, n_ids: int, timer: Phases
) -> PPOBuffer:
    """What the update needs of scored responses: log-probs, values, and the advantages of rewards minus KL.

    The log-probs come from the forward pass that training uses, not from the sampler, so that the first ratio of the
    update is 1 by construction. n_ids: ids that the sampler could draw.
    """
    batch, mask, loaded = rollout.batch, rollout.batch.response_mask, models.offloader.loaded
    with timer("score"), loaded(models.actor.model):
        logprobs = rollout_logprobs(models.actor.model, batch, config.temperature, n_ids, config.max_batch_size)
    with timer("score"), models.reference_loaded() as reference:
        reference_logprobs = rollout_logprobs(reference, batch, config.temperature, n_ids, config.max_batch_size)
    values = None
    if models.critic:
        with timer("score"), loaded(models.critic.model):
            values = rollout_values(models.critic.model, batch, config.max_batch_size)

    # Scores lie at the ends of responses or steps, the KL penalty on every token
    earned = rewards.apply_length_penalty(scores.total, rollout, config, config.max_new_tokens)
    token_rewards = (earned - config.kl_coef * losses.kl_k1(logprobs, reference_logprobs)) * mask
    trainable = ppo.trainable_rows(scores.total.sum(1), rollout, config)
    advantages, returns = ppo.compute_advantages(token_rewards, values, mask, trainable, config, config.group_size)
    if config.tis_cap:  # the loss is proportional to the advantages: to weigh them is to weigh it
        advantages *= losses.truncated_importance(logprobs, rollout.sampled_logprobs, config.tis_cap)
    weights = losses.sequence_weights(rollout.lengths, config.loss_aggregation, config.max_new_tokens)
    return PPOBuffer(rollout, logprobs, reference_logprobs, values, advantages, returns,
                     weights[:, None] * mask, trainable, n_ids)


class Inputs(NamedTuple):
    """What a run reads before it starts: prompts, and the rows of them that each iteration answers."""

    prompts: list[Prompt]
    held_out: list[Prompt]
    n_held_out: int  # with those that are too long to be answered
    tokenizer: Tokenizer
    iterations: list[tuple[int, list[int]]]  # epoch and rows of prompts
    per_epoch: int

    def is_due(self, n_done: int, every: int) -> bool:
        """Whether held-out prompts are answered after so many iterations."""
        return n_done % (every if every > 0 else self.per_epoch) == 0 or n_done == len(self.iterations)


def read_inputs(config: PPOConfig) -> Inputs:
    """Read prompts and tokenizer, and check that they fit the models. Raises UserError."""
    rewards.reward_weights(config)
    # pairs: one directory may be given twice
    kinds = [(config.actor_ckpt_dir, "solver"), (config.critic_ckpt_dir, ""),
             (config.reward_model_ckpt_dir, "verifier")]
    contexts = {folder: load.load_config(folder, kind=kind).max_seq_len for folder, kind in kinds if folder}
    prompts = read_prompts(config.train_file, need_label=config.reward == ["rule"])
    held_out = read_prompts(config.eval_file, need_label=True) if config.eval_file else []
    tokenizer = load.load_tokenizer(config.actor_ckpt_dir, config.tokenizer_file)
    if tokenizer.code:
        raise UserError(f"{config.actor_ckpt_dir} writes solutions with code, but rollouts run none; expected a solver "
                        f"that answers in text alone, trained without --chat_template code")
    load.check_tokenizer(tokenizer, config.critic_ckpt_dir, config.reward_model_ckpt_dir)
    prompts = fitting_prompts(prompts, config.train_file, tokenizer, contexts, config.max_new_tokens)
    n_held_out, own = len(held_out), {config.actor_ckpt_dir: contexts[config.actor_ckpt_dir]}
    if held_out:
        held_out = fitting_prompts(held_out, config.eval_file, tokenizer, own, config.max_new_tokens)
    if "verifier" in config.reward:
        verifier = config.reward_model_ckpt_dir
        load.check_step(verifier, load.load_config(verifier), config.step)
    iterations = [(epoch, rows) for epoch in range(1, config.epochs + 1)
                  for rows in chunks(epoch_order(len(prompts), config.seed, epoch), config.prompts_per_buffer)]
    iterations = iterations[: config.max_steps if config.max_steps >= 0 else None]
    per_epoch = -(-len(prompts) // config.prompts_per_buffer)
    return Inputs(prompts, held_out, n_held_out, tokenizer, iterations, per_epoch)


def open_rewards(
    config: PPOConfig, models: PPOModels, tokenizer: Tokenizer, grader: Grader, in_use: contextlib.ExitStack
) -> dict[str, Reward]:
    """The rewards that are added up, by their names in the log."""
    opened = {}
    for name, weight in rewards.reward_weights(config).items():
        short = rewards.short_name(name)
        if name == "verifier":
            score = rewards.verifier_reward(models.verifier, tokenizer, config, config.max_batch_size)
        elif name == "rule":
            score = rewards.on_first_rank(partial(rewards.graded_reward, grader))
        else:
            function = in_use.enter_context(UserReward(name))
            score = rewards.on_first_rank(partial(rewards.function_reward, function, short))
        opened[short] = Reward(weight, score)
    if config.format_penalty:
        score = rewards.on_first_rank(partial(rewards.format_reward, grader, config.format_penalty))
        opened["format"] = Reward(1.0, score)
    return opened


def held_out_accuracy(
    config: PPOConfig, models: PPOModels, data: Inputs, grader: Grader, timer: Phases
) -> float:
    """Share of the held-out prompts whose greedy response grades right; one too long to be answered is not."""
    sampling = Sampling(max_new_tokens=config.max_new_tokens, seed=config.seed)
    with timer("evaluate"), models.offloader.loaded(models.actor.model):
        accuracy = greedy_accuracy(
            models.actor.model, data.held_out, data.tokenizer, sampling, grader, config.rollout_batch_size)
    return accuracy * len(data.held_out) / data.n_held_out


def open_checkpointer(
    config: PPOConfig, models: PPOModels, log: RunLog, state: dict[str, object], data: Inputs, facts: dict[str, object]
) -> Checkpointer:
    """What saves actor and critic together, and brings them back."""
    trainees = [
        Trainee(save_dir, trainer,
                partial(saving.begin_save, trainer.model, ckpt_dir=ckpt_dir, dtype=config.save_dtype,
                        lora=load.lora_config(config), tokenizer_file=config.tokenizer_file,
                        background=config.background_save),
                partial(models.offloader.loaded, trainer.model, optimizer=True))
        for trainer, save_dir, ckpt_dir in ((models.actor, config.actor_save_dir, config.actor_ckpt_dir),
                                            (models.critic, config.critic_save_dir, config.critic_ckpt_dir))
        if trainer]
    snapshots = {"reference": config.reference_refresh} if config.reference_refresh > 0 else {}
    return Checkpointer(log, trainees, config, steps_per_epoch=data.per_epoch, total_steps=len(data.iterations),
                        facts=facts, state=state, snapshots=snapshots)


if __name__ == "__main__":
    cli.run(main)
