"""Improve a solver by reinforcement learning - PPO, GRPO, RLOO, REINFORCE++ - against a verifier, a grader or both.

torchrun --nproc_per_node 8 ppo_train.py --actor_ckpt_dir out --actor_save_dir ppo/actor --critic_ckpt_dir verifier \
    --critic_save_dir ppo/critic --reward_model_ckpt_dir verifier --train_file dataset/GSM8K/train.json
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Literal

import torch

from src import assemble, cli, parallel, ppo_plan, runlog
from src.data.collate import chunks, epoch_order
from src.data.encoding import StepKind
from src.data.examples import Prompt, read_prompts
from src.errors import UserError
from src.evaluation.grade import Grader
from src.evaluation.user_reward import UserReward
from src.models.decoder import Decoder
from src.runlog import Phases, RunLog
from src.sharing import SharedBase
from src.training import buffer, health, ppo, ppo_settings, rewards, rollouts
from src.training.loop import TrainLoop
from src.training.ppo_settings import Advantage, Aggregation, KlLoss, Truncated
from src.training.residence import Arrangement
from src.training.resuming import find_start, run_facts
from src.training.rewards import OutcomeReward, Part, Shape, StepReward
from src.training.saver import Saver, Trained


def main(
    actor_ckpt_dir: str, actor_save_dir: str, critic_ckpt_dir: str = "", critic_save_dir: str = "",
    reward_model_ckpt_dir: str = "", reward: list[str] = ["verifier"], reward_weights: list[float] = [],  # noqa: B006
    train_file: str = "dataset/GSM8K/train.json", eval_file: str = "", task: Literal["GSM8K", "MATH", "toy"] = "GSM8K",
    log_dir: str = "", model_type: str = "", tokenizer_file: str = "", advantage: Advantage = "gae",
    group_size: int = -1, filter_groups: bool = False, max_refills: int = 0, max_new_tokens: int = 256,
    max_buffer_size: int = 96, max_batch_size: int = 4, rollout_batch_size: int = 64, epochs: int = 1,
    max_steps: int = -1, inner_epochs: int = 2, minibatches: int = 4, lr: float = 1e-6, critic_lr: float = 9e-6,
    critic_warmup: int = -1, schedule: Literal["cosine", "linear", "constant"] = "cosine", warmup_ratio: float = 0.03,
    min_lr_ratio: float = 0.1, weight_decay: float = 0.0, adam_eps: float = 1e-8, max_grad_norm: float = 1.0,
    activation_checkpointing: Literal["none", "selective", "full"] = "none", tensor_parallel_size: int = -1,
    temperature: float = 1.0, kl_coef: float = -1.0, kl_loss: KlLoss = "none", kl_loss_coef: float = 1e-3,
    kl_target: float = -1.0, kl_horizon: float = 10_000.0, reference_refresh: int = -1,
    clip_ratio: float = 0.2, clip_high: float = -1.0,
    dual_clip: float = 0.0, entropy_coef: float = 0.0, loss_aggregation: Literal["", Aggregation] = "",
    value_clip: float = 0.2, gamma: float = 1.0, gae_lambda: float = -1.0, critic_lambda: float = -1.0,
    whiten_rewards: bool = False, whiten_advantages: bool = True, tis_cap: float = 0.0,
    outcome_reward: OutcomeReward = "probability", step_reward: StepReward = "min-drop", step_bonus: float = 0.0,
    step: Literal["", StepKind] = "",
    reward_clip: float = 5.0, format_penalty: float = 0.0,
    truncated: Truncated = "penalty", missing_eos_penalty: float = 1.0, overlong_buffer: int = 0,
    lora_rank: int = -1, lora_alpha: float = 16.0,
    lora_targets: list[str] = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"],  # noqa: B006 (shown by --help, never changed)
    eval_every: int = -1, rollout_samples: int = 8, save_every: int = -1, keep_last: int = 1,
    background_save: bool = False,
    resume: Literal["none", "auto"] = "none",
    save_dtype: Literal["", "float32", "bfloat16", "float16"] = "", quantize: Literal["", "int8", "int4"] = "",
    share_base: bool = False, phases: bool = False, stop_on_alarm: bool = False, seed: int = 1, wandb: str = "",
    dry_run: bool = False,
) -> None:
    """Reinforcement learning; rewards at the ends of responses or of their steps, KL per token.

    actor_ckpt_dir: solver to improve; a frozen copy of it, or with LoRA itself without adapters, is the reference
    actor_save_dir: directory for the improved solver, metrics.jsonl, run.json and rollouts/
    critic_ckpt_dir: verifier that the critic starts from; a solver will do (its value head starts at zero)
    critic_save_dir: directory for the critic; only --advantage gae has one
    reward_model_ckpt_dir: verifier that scores responses; needed for --reward verifier
    reward: one or more, added up: verifier = its score (pairwise, outcome) or those of the steps (process); rule = 1
        for an answer that grades right against the label, else 0 (0 without a label beside another reward);
        FILE.py:FUNCTION = what your function (prompt, response, label or None) -> number says
    reward_weights: what each of them weighs, 0 to log it only; default: 1 each
    train_file: prompts, json array or jsonl of {"instruction", "label"?}; --reward rule alone needs labels. Those that
        fill a model's context are left out, counted and named
    eval_file: prompts with labels on which greedy accuracy is measured, first of all (step 0 in metrics.jsonl); the
        best actor is kept as best/ if it is better than the one started from. Those that fill the context are wrong
    task: how --reward rule and --eval_file find and compare answers
    log_dir: directory for metrics.jsonl, run.json and rollouts/; default: actor_save_dir
    model_type: a family or released size the actor must agree with; default: what params.json says
    tokenizer_file: tokenizer file of any kind; default: the one in actor_ckpt_dir
    advantage: gae = PPO with a critic; the others have none: grpo, dr_grpo and rloo compare the responses to one
        prompt, reinforce++ compares all of a buffer (and, in groups, takes off the group's mean)
    group_size: responses to each prompt; -1 = 8 for grpo, dr_grpo and rloo, else 1
    filter_groups: do not learn from groups whose rewards are all equal
    max_refills: how often a buffer is refilled with groups of further prompts for those that were filtered out
    max_new_tokens: longest response
    max_buffer_size: episodes in one rollout buffer, over all ranks
    max_batch_size: episodes in one training forward pass of a rank
    rollout_batch_size: sequences that decode at once on a rank
    epochs: passes over the prompts
    max_steps: stop after so many buffers; -1 = after all epochs
    inner_epochs: passes over each buffer
    minibatches: optimizer steps in each pass
    lr: peak learning rate of the actor
    critic_lr: peak learning rate of the critic
    critic_warmup: first buffers, from which only the critic learns; -1 = a tenth of all, at most 10
    schedule: how the rates fall after they have risen
    warmup_ratio: share of all optimizer steps in which the rates rise
    min_lr_ratio: share of the peak rate that the last step has, unless the schedule is constant
    weight_decay: decay of weight matrices
    adam_eps: what Adam adds to the root of its second moment
    max_grad_norm: gradients are clipped to this global norm
    activation_checkpointing: what the backward pass computes again to save memory: nothing, feed-forwards, or all
    tensor_parallel_size: ranks that share one model; the others take other episodes. -1 = the shards of
        actor_ckpt_dir, if they divide the ranks, else all ranks
    temperature: sampling temperature; ratios and KL are at the same temperature
    kl_coef: weight of the per-token KL (k1) to the reference in the reward; -1 = 0.02, for grpo and dr_grpo 0
    kl_loss: a KL term in the loss: k2 has the KL's gradient, k3 (GRPO's) less variance and a bias
    kl_loss_coef: its weight
    kl_target: nats of KL a response that both weights are steered to; -1 = weights stay fixed
    kl_horizon: episodes in which a KL twice the target multiplies the weights by 1.2
    reference_refresh: buffers after which the reference becomes the actor as it is saved then; -1 = it stays
    clip_ratio: probability ratios are clipped to 1 - this ... 1 + clip_high
    clip_high: -1 = 0.28 for grpo and dr_grpo, else as clip_ratio
    dual_clip: bound of the ratio also where the advantage is negative, 3 is usual; 0 = none
    entropy_coef: weight of the policy's entropy, which the loss then rewards; it is logged in any case
    loss_aggregation: what the policy loss is a mean over: tokens, or sequences of the mean or sum of their tokens or
        of their sum / max_new_tokens; default: token-mean, for grpo seq-mean, for dr_grpo seq-constant
    value_clip: the critic moves at most this far from its rollout values without penalty
    gamma: discount
    gae_lambda: lambda of generalised advantage estimation; -1 = 1 for --reward rule alone, else 0.95
    critic_lambda: lambda of the returns that the critic learns (VAPO's decoupled GAE); -1 = as gae_lambda
    whiten_rewards: divide the rewards, KL included, by their deviation over the buffer
    whiten_advantages: gae and reinforce++: bring the advantages of a buffer, over all ranks, to mean 0 and variance 1
    tis_cap: weigh each token by its probability in training over that in sampling, at most this (truncated importance
        sampling); 0 = off
    outcome_reward: what an outcome verifier gives: its probability, or its normalised logit
    step_reward: what a process verifier gives at the end of a step: raw = its probability; min-drop, prod-drop = how
        far it takes the least, or the product of, probabilities so far down
    step_bonus: added at the end of every step that a process verifier scores
    step: what a step is: a paragraph, with a blank line behind it, or a line; default: what it was in the verifier's
        training, which nothing else may be
    reward_clip: pairwise scores and outcome logits are kept within so many deviations of their mean; 0 = no limit
    format_penalty: taken from the reward of a response in which --task finds no answer
    truncated: what befalls a response that did not end: penalty; zero = it earns nothing, and keeps what it
        loses; mask = nothing is learned
    missing_eos_penalty: taken from the reward of a response that did not end by itself
    overlong_buffer: tokens before the limit in which that penalty sets in, growing linearly
    lora_rank: rank of LoRA adapters on actor and critic; -1 trains all weights
    lora_alpha: adapters are scaled by lora_alpha / lora_rank
    lora_targets: linears that carry an adapter
    eval_every: buffers between measurements on eval_file; -1 = after each epoch
    rollout_samples: episodes of each buffer written to rollouts/
    save_every: buffers between checkpoints to resume from; -1 = after each epoch
    keep_last: how many of those are kept
    background_save: write checkpoints to resume from while training goes on; a copy of what they hold is then in main
        memory until they are written
    resume: auto = go on from the newest complete one in both save directories, if there is one
    save_dtype: type of the stored weights; default: as in the directories started from (adapters: float32)
    quantize: hold the frozen models, verifier and (without LoRA) reference, in 8 or 4 bits a weight; with such a
        reference the first KL is not 0
    share_base: with --lora_rank: hold the weights below all adapters once; actor, critic and verifier must be the same
        full weights or adapters on them
    phases: hold each model, and its optimizer's state, only while a phase uses it; the rest waits in CPU memory, on a
        CPU in files; the results are the same
    stop_on_alarm: save and stop with status 1 at an alarm; with --resume auto the run goes on, and the same alarm stops
        it again 20 buffers later at the earliest
    seed: seed of prompt order, sampling and adapter initialisation
    wandb: PROJECT or PROJECT/NAME to show the metrics under in Weights & Biases; WANDB_MODE=offline keeps them in the
        run's directory
    dry_run: print the plan - buffers, disk, where rewards lie, a prompt, memory of each rank in every arrangement -
        and stop
    """
    flags = locals().copy()
    cli.check_numbers(flags)
    settings = ppo_settings.from_flags(flags)
    ppo_settings.check_together(flags)
    weights = rewards.weights_of(reward, reward_weights)
    user_rewards = {name: UserReward(name) for name in reward if name not in ("verifier", "rule")}
    kinds = ((actor_ckpt_dir, "solver"), (critic_ckpt_dir, ""), (reward_model_ckpt_dir, "verifier"))
    contexts = {folder: assemble.load_config(folder, kind=kind).max_seq_len for folder, kind in kinds if folder}
    prompts = read_prompts(train_file, need_label=reward == ["rule"])
    held_out = read_prompts(eval_file, need_label=True) if eval_file else []
    tokenizer = assemble.load_tokenizer(actor_ckpt_dir, tokenizer_file)
    if tokenizer.code:
        raise UserError(f"{actor_ckpt_dir} writes solutions with code, but rollouts run none; expected a solver that "
                        f"answers in text alone, trained without --chat_template code")
    assemble.check_tokenizer(tokenizer, critic_ckpt_dir, reward_model_ckpt_dir)
    prompts = rollouts.fitting_prompts(prompts, train_file, tokenizer, contexts, max_new_tokens)
    n_asked, own = len(held_out), {actor_ckpt_dir: contexts[actor_ckpt_dir]}
    if eval_file:
        held_out = rollouts.fitting_prompts(held_out, eval_file, tokenizer, own, max_new_tokens)
    if "verifier" in reward:
        assemble.check_step(reward_model_ckpt_dir, assemble.load_config(reward_model_ckpt_dir), step)
    elif step:
        raise UserError(f"--step {step} says what a verifier judges; give --reward verifier with it")
    lora = assemble.lora_config(lora_rank, lora_alpha, 0.0, lora_targets)
    buffers = [(epoch, rows) for epoch in range(1, epochs + 1)
               for rows in chunks(epoch_order(len(prompts), seed, epoch), settings.prompts_a_buffer)]
    buffers = buffers[: max_steps if max_steps >= 0 else None]
    critic_warmup = settings.critic_warmup(critic_warmup, len(buffers))
    if dry_run:
        runlog.table(ppo_plan.of_run(flags, settings, lora, weights, prompts, held_out, tokenizer, len(buffers)))
        return
    parallel.start(seed, assemble.tensor_parallel_size(actor_ckpt_dir, tensor_parallel_size))
    save_dirs = [actor_save_dir, critic_save_dir] if settings.has_critic else [actor_save_dir]
    for save_dir in save_dirs:
        assemble.check_save_dir(save_dir, actor_ckpt_dir, critic_ckpt_dir, reward_model_ckpt_dir)
    facts = run_facts("ppo_train", flags, **dataclasses.asdict(settings), critic_warmup=critic_warmup)
    find_start(save_dirs, resume, facts, len(buffers))
    log = RunLog(log_dir or actor_save_dir, flags, wandb=wandb)
    arrangement = Arrangement(Path(log_dir or actor_save_dir) / ".waiting" if phases else None)

    if share_base and parallel.data_parallel_size() > 1:
        raise UserError("--share_base: data-parallel ranks would cut the base for each model; make all ranks one "
                        "tensor-parallel group with --tensor_parallel_size")
    shared = SharedBase(actor_ckpt_dir) if share_base else None

    def solver(folder: str) -> Decoder:
        return shared.model(folder) if shared else assemble.load_solver(
            folder, model_type=model_type, dtype=torch.float32)

    def verifier_of(folder: str, *, trained: bool = False) -> Decoder:
        if shared:
            return shared.model(folder, value_head=True, from_solver=trained)
        return assemble.load_verifier(folder, dtype=torch.float32 if trained else None, from_solver=trained,
                                      quantize="" if trained else quantize)

    def trained(model: Decoder, peak: float, total_buffers: int) -> TrainLoop:
        assemble.put_lora_on(model, lora, seed)
        loop = TrainLoop(model, log, lr=peak, total_steps=total_buffers * inner_epochs * minibatches, seed=seed,
                         schedule=schedule, warmup_ratio=warmup_ratio, min_lr_ratio=min_lr_ratio,
                         weight_decay=weight_decay, adam_eps=adam_eps, max_grad_norm=max_grad_norm,
                         activation_checkpointing=activation_checkpointing)
        arrangement.add(model, loop)
        return loop

    def frozen_reference(folder: str) -> Decoder:
        # as the actor: their first KL is 0, unless the reference is quantised
        model = assemble.load_solver(folder, dtype=torch.float32, quantize=quantize)
        arrangement.add(model)
        return model

    actor_loop = trained(solver(actor_ckpt_dir), lr, len(buffers) - critic_warmup)
    critic_loop = None
    if settings.has_critic:
        critic_loop = trained(verifier_of(critic_ckpt_dir, trained=True), critic_lr, len(buffers))
    steps_per_epoch = -(-len(prompts) // settings.prompts_a_buffer)
    state: dict[str, object] = {"kl_scale": 1.0, "update_checked": False}
    alarms = health.Alarms(log.logger, state)
    saver = Saver(
        log, [Trained(save_dir, loop, lambda folder, state, model=loop.model, source=source: assemble.begin_save(
            model, folder, source, save_dtype, lora, tokenizer_file, state, background_save),
            lambda model=loop.model: arrangement.training(model))
              for save_dir, loop, source in ((actor_save_dir, actor_loop, actor_ckpt_dir),
                                             (critic_save_dir, critic_loop, critic_ckpt_dir)) if loop],
        save_every=save_every, keep_last=keep_last, steps_per_epoch=steps_per_epoch, total_steps=len(buffers),
        facts=facts, state=state, snapshots={"reference": reference_refresh} if reference_refresh > 0 else {})
    done = saver.resume(resume)
    refreshed = str(Path(actor_save_dir) / "reference")
    origin = "" if lora else actor_ckpt_dir  # with adapters: the actor without them
    if 0 < reference_refresh <= done:
        origin = refreshed
    models = buffer.Models(actor_loop.model, frozen_reference(origin) if origin else None,
                           critic_loop and critic_loop.model, arrangement)
    grader, outcomes = Grader(task), []

    def grade(responses: list[str], labels: list[str]) -> list[str]:
        return [verdict.outcome for verdict in grader.grade(responses, labels)]

    parts = {}
    for name in reward:
        if name == "verifier":
            verifier = verifier_of(reward_model_ckpt_dir)
            arrangement.add(verifier)
            scored = arrangement.lent(verifier, rewards.verifier_reward(
                verifier, tokenizer, max_batch_size, Shape(outcome_reward, step_reward, step_bonus, reward_clip)))
        else:
            scored = rewards.graded_reward(grade, outcomes) if name == "rule" else rewards.function_reward(
                user_rewards[name].score)
        parts[rewards.short_name(name)] = Part(weights[name], scored)
    if format_penalty:
        parts["format"] = Part(1.0, rewards.format_reward(grader.readable, format_penalty))

    def held_out_accuracy(timed: Phases) -> float:
        with timed("evaluate"), arrangement.using(actor_loop.model):
            return rollouts.greedy_accuracy(actor_loop.model, held_out, tokenizer, grade, settings,
                                            n_left_out=n_asked - len(held_out))

    log.progress(len(buffers), "buffer", done)
    with contextlib.ExitStack() as in_use:
        for each in (arrangement, grader, *user_rewards.values()):
            in_use.enter_context(each)
        if held_out and not done:
            timed = Phases()
            score = held_out_accuracy(timed)
            log.metrics(0, eval_accuracy=score, **timed.seconds)
            saver.measured_start(score)
        for index, (epoch, rows) in list(enumerate(buffers))[done:]:
            now, timed = settings.with_kl_scale(state["kl_scale"]), Phases()

            def drawn(refill: int, index: int = index, rows: list[int] = rows) -> list[Prompt]:
                more = buffer.refill_rows(len(prompts), len(rows), settings, index, refill) if refill else rows
                return [prompts[row] for row in more]

            found = buffer.collect(models, drawn, tokenizer, parts, now, index, timed)
            metrics = health.rollout_metrics(found, now) | rewards.outcome_shares(outcomes) | rewards.failed_shares(
                {rewards.short_name(name): function.counts() for name, function in user_rewards.items()})
            if index == 0:
                health.check_start(metrics, found, same_reference=bool(lora) or not quantize)
            with timed("update"):
                metrics |= ppo.update(actor_loop, critic_loop, found, now, index, arrangement=arrangement,
                                      critic_warmup=critic_warmup)
            if index >= critic_warmup and not state["update_checked"]:
                state["update_checked"] = health.check_first_update(metrics, found)
            if index >= critic_warmup:  # before, the policy is the reference
                state["kl_scale"] *= health.kl_factor(metrics["kl_response"], len(found.task_rewards), settings)
            score = None
            every = eval_every if eval_every > 0 else steps_per_epoch
            if held_out and ((index + 1) % every == 0 or index + 1 == len(buffers)):
                metrics["eval_accuracy"] = score = held_out_accuracy(timed)
            tokens = int(found.episodes.lengths.sum())
            shown = alarms.look(index + 1, metrics)
            log.metrics(index + 1, shown, epoch=epoch, **metrics, **timed.seconds, tokens_per_second=timed.rate(tokens))
            log.rows(f"rollouts/step-{index + 1:06}.jsonl", health.samples(found, rollout_samples))
            said = alarms.warn(index + 1, shown)
            log.advance(tokens=tokens, reward=metrics["reward"], kl=metrics["kl"])
            saver.step_done(index + 1, score, "; ".join(said) if stop_on_alarm else "")
            if reference_refresh > 0 and (index + 1) % reference_refresh == 0:
                saver.complete()
                arrangement.drop(models.reference)
                models = models._replace(reference=None)  # gone before the new one comes
                models = models._replace(reference=frozen_reference(refreshed))
        saver.finish()
        alarms.summary(len(buffers))


if __name__ == "__main__":
    cli.run(main)
