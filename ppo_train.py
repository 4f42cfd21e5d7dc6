"""Improve a solver by reinforcement learning - PPO, GRPO, RLOO, REINFORCE++ - against a verifier, a grader or both.

torchrun --nproc_per_node 8 ppo_train.py --actor_ckpt_dir out --actor_save_dir ppo/actor --critic_ckpt_dir verifier \
    --critic_save_dir ppo/critic --reward_model_ckpt_dir verifier --train_file dataset/GSM8K/train.json
"""

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from src import load, losses, parallel, runlog
from src.checkpoint import saving, storage
from src.command import cli
from src.data.batch import epoch_order
from src.grading.grader import Grader
from src.inference.sampling import Sampling
from src.models.lora import without_adapters
from src.planning import plan
from src.report.page import write_report
from src.runlog import Phases, RunLog
from src.trackers import check_trackers
from src.training import monitor, ppo
from src.training.monitor import measure_held_out
from src.training.policy_server import PolicyServers
from src.training.ppo import PPOBuffer
from src.training.ppo_config import PPOConfig
from src.training.ppo_setup import (
    Inputs,
    PPOModels,
    load_models,
    open_checkpointer,
    open_rewards,
    read_inputs,
)
from src.training.resuming import find_start, run_fingerprint
from src.training.rewards import Reward, Scores, apply_length_penalty, score_rollout
from src.training.rollout import Rollout, requests_of, rollout_logprobs, rollout_values, sample_rollout


def main(config: PPOConfig) -> None:
    """Every iteration fills a buffer with scored responses of the policy, and updates critic and actor with it."""
    data = read_inputs(config)
    n_iterations = len(data.iterations)
    critic_warmup = config.warmup_iterations(n_iterations)
    if config.dry_run:
        runlog.table(plan.ppo(config, data.prompts, data.held_out, data.tokenizer, n_iterations))
        return
    parallel.start(config.seed, load.tensor_parallel_size(config.actor_ckpt_dir, config.tensor_parallel_size),
                   config.replicas, config.context_parallel_size)
    for save_dir in config.save_dirs:
        saving.check_save_dir(save_dir, config.actor_ckpt_dir, config.critic_ckpt_dir, config.reward_model_ckpt_dir,
                              config.teacher_ckpt_dir)
    check_trackers(config.trackers)
    storage.claim(Path(config.run_dir))
    fingerprint = run_fingerprint("ppo_train", config.flags(), data.tokenizer, critic_warmup=critic_warmup,
                                  precision=str(parallel.compute_dtype(config.precision)).removeprefix("torch."))
    # what cannot go on is refused here, before the minutes that models take
    find_start(config.save_dirs, config.resume, fingerprint, n_iterations)
    log = RunLog(config.run_dir, config.flags(), trackers=config.trackers)
    models = load_models(config, log, n_iterations)
    models.servers = PolicyServers(config, data.tokenizer) if config.rollout_backend == "openai" else None
    actor, critic = models.actor, models.critic
    state: dict[str, object] = {"kl_scale": 1.0, "update_checked": False}  # saved, and resumed with
    alerts = monitor.Monitor(log.logger, state)
    checkpointer = open_checkpointer(config, models, log, state, data, fingerprint)
    done = checkpointer.resume(config.resume)
    # after the actor has come back: a reference that was refreshed was saved with it
    models.load_reference(config, refreshed=0 < config.reference_refresh <= done)
    log.progress(n_iterations, "buffer", done)

    with contextlib.ExitStack() as in_use:
        in_use.enter_context(models.offloader)
        grader = in_use.enter_context(Grader(data.task))
        rewards = open_rewards(config, models, data.tokenizer, grader, in_use)
        if data.held_out and not done:  # what `best` must beat
            timer = Phases()
            held_out = measure_held_out(config, models, data, grader, timer)
            log.metrics(0, **held_out, **timer.seconds)
            checkpointer.measured_start(held_out["eval_accuracy"])

        for iteration, (epoch, rows) in list(enumerate(data.iterations))[done:]:
            timer, kl_scale, learned = Phases(), state["kl_scale"], dict(ppo.NOTHING_LEARNED)
            # All that the updates learn from is computed before the first of them, by the policy that sampled
            buffer, stats = collect(config, models, data, rewards, rows, iteration, kl_scale, timer)

            # The critic learns first, then the actor: neither reads the other, only one need be in memory
            if critic:
                with models.phase(timer, "update", critic.model, optimizer=True):
                    learned |= ppo.update_critic(critic, buffer, config, iteration)
            if iteration >= critic_warmup:
                with models.phase(timer, "update", actor.model, optimizer=True):
                    learned |= ppo.update_actor(actor, buffer, config, iteration, critic_warmup, kl_scale)

            metrics = monitor.rollout_metrics(buffer, config, kl_scale) | stats | learned
            if iteration == 0:
                monitor.check_start(metrics, buffer, config, actor.model.dtype)
            if iteration >= critic_warmup:  # before, the policy is the reference
                if not state["update_checked"]:
                    state["update_checked"] = monitor.check_first_update(metrics, buffer, actor.model.dtype)
                # for the next buffer: its KL is steered to --kl_target
                state["kl_scale"] *= monitor.kl_factor(metrics["kl_response"], len(buffer.rollout.prompts), config)
            if data.held_out and config.is_eval_due(iteration + 1, data.per_epoch, n_iterations):
                metrics |= measure_held_out(config, models, data, grader, timer)

            shown, warned = alerts.check(iteration + 1, metrics)
            tokens = int(stats.get("sampled_tokens", buffer.rollout.lengths.sum()))
            log.metrics(iteration + 1, shown, epoch=epoch, **metrics, **timer.seconds,
                        tokens_per_second=timer.rate(tokens))
            log.rows(f"rollouts/step-{iteration + 1:06}.jsonl",
                     monitor.readable_rows(buffer, config.rollout_samples, data.tokenizer))
            log.advance(tokens=tokens, reward=stats.get("sampled_reward", metrics["reward"]), kl=metrics["kl"])
            checkpointer.step_done(iteration + 1, metrics.get("eval_accuracy"), warned if config.stop_on_alarm else ())
            if config.reference_refresh > 0 and (iteration + 1) % config.reference_refresh == 0:
                checkpointer.complete()  # it is read from the files of this save
                models.load_reference(config, refreshed=True)
        checkpointer.finish()
        alerts.summary(n_iterations)
        if parallel.rank() == 0:
            runlog.table(f"look at {write_report(Path(config.run_dir))}")


def collect(
    config: PPOConfig, models: PPOModels, data: Inputs, rewards: Mapping[str, Reward], rows: Sequence[int],
    iteration: int, kl_scale: float, timer: Phases,
) -> tuple[PPOBuffer, dict[str, float]]:
    """Fill a buffer: sample and score responses to some prompts, and compute what an update needs of each token.

    Per-token tensors are [B, S] float32 on the CPU. kl_scale: what the KL's weight is multiplied by. Returns what the
    log says of groups that were dropped.
    """
    phase, distribution = partial(models.phase, timer), data.distribution(config.temperature)
    actor, critic, reference = models.actor.model, models.critic and models.critic.model, models.reference
    sample = partial(sample_and_score, config, models, data, rewards, rows, iteration, timer)
    (rollout, scores), stats = sample(), {}
    if config.filter_groups:  # before the passes that score tokens: what nothing is learned from costs none
        rollout, scores, stats = ppo.refill_groups(rollout, scores, sample, config.group_size, config.max_refills)
    batch, mask = rollout.batch, rollout.batch.response_mask

    # Log-probs come from the forward passes that training uses, not from the sampler: the update's first ratio is 1
    trainable = ppo.trainable_rows(scores.total.sum(1), rollout, config)
    passes = ppo.scoring_passes(rollout, trainable, config, iteration)
    with phase("score", actor):
        logprobs = rollout_logprobs(actor, batch, distribution, passes)
    if models.servers:
        monitor.check_mismatch(rollout, logprobs, config.mismatch_limit)
    with phase("score", reference), without_adapters(reference):
        reference_logprobs = rollout_logprobs(reference, batch, distribution, passes)
    values = None
    if critic:
        with phase("score", critic):
            values = rollout_values(critic, batch, passes)

    # Scores stand at the ends of responses or steps, the KL penalty at every token. k1 may be negative at one: in a
    # reward its mean counts, which is the KL without bias
    kl = losses.kl_k1(logprobs, reference_logprobs)
    earned = apply_length_penalty(scores.total, rollout, config)
    token_rewards = (earned - config.kl_coef * kl_scale * kl) * mask
    if config.advantage == "gdpo":
        token_rewards = ppo.decoupled_rewards(scores, [each.weight for each in rewards.values()], rollout, config)
    advantages, returns = ppo.compute_advantages(token_rewards, values, mask, trainable, config)
    if models.teacher:
        with phase("score", models.teacher):
            teacher = rollout_logprobs(models.teacher, batch, distribution, passes)
        advantages = advantages + losses.distillation_advantages(logprobs, teacher, config.teacher_coef) * mask
        stats |= {"teacher_kl": losses.kl_k1(logprobs, teacher)[mask].mean().item()}
    if config.tis_cap:  # the loss is proportional to the advantages: to weigh them is to weigh it
        advantages *= losses.truncated_importance(logprobs, rollout.sampled_logprobs, config.tis_cap)
    # what a token weighs in a mean over tokens or over sequences; 0 in prompts and in what code printed
    weights = losses.sequence_weights(rollout.lengths, config.loss_aggregation, config.max_new_tokens)[:, None] * mask
    return PPOBuffer(rollout, scores, logprobs, reference_logprobs, values, advantages, returns, weights, trainable,
                     distribution), stats


def sample_and_score(
    config: PPOConfig, models: PPOModels, data: Inputs, rewards: Mapping[str, Reward], rows: Sequence[int],
    iteration: int, timer: Phases, refill: int = 0,
) -> tuple[Rollout, Scores]:
    """Responses to the prompts of an iteration, or to as many others that it is refilled with, and what they earn."""
    if refill:
        order = -(iteration * config.max_refills + refill)
        rows = epoch_order(len(data.prompts), config.seed, order)[: len(rows)]
    sampling = Sampling(temperature=config.temperature, max_new_tokens=config.max_new_tokens,
                        stop=data.task.stop, seed=config.seed)
    with models.phase(timer, "sample", models.actor.model):
        if models.servers:
            models.servers.hand_over(models.actor.model, iteration)
        rollout = sample_rollout(
            models.actor.model, [data.prompts[row] for row in rows], data.tokenizer, sampling,
            numbers=config.sample_numbers(iteration, refill), max_batch_size=config.rollout_batch_size,
            servers=models.servers, coding=data.coding)
        if config.rollout_ahead and not refill and parallel.rank() == 0 and iteration + 1 < len(data.iterations):
            coming = [data.prompts[row] for row in data.iterations[iteration + 1][1]]
            groups = requests_of(coming, data.tokenizer, config.sample_numbers(iteration + 1))
            models.servers.sample_ahead(list(itertools.chain(*groups)), sampling)
    with models.phase(timer, "reward", models.verifier):
        return rollout, score_rollout(rewards, rollout)


if __name__ == "__main__":
    cli.run(main)
