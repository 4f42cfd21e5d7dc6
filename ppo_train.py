"""Improve a solver by PPO against a verifier or a grader.

torchrun --nproc_per_node 8 ppo_train.py --actor_ckpt_dir out --actor_save_dir ppo/actor --critic_ckpt_dir verifier \
    --critic_save_dir ppo/critic --reward_model_ckpt_dir verifier --train_file dataset/GSM8K/train.json
"""

from pathlib import Path
from typing import Literal

import torch

from src import assemble, cli, parallel, plan, runlog
from src.data.collate import chunks, encode_prompt, epoch_order
from src.data.examples import read_prompts
from src.errors import UserError
from src.evaluation.grade import Grader
from src.runlog import RunLog
from src.training import ppo
from src.training.loop import TrainLoop
from src.training.saver import Saver, Trained


def main(
    actor_ckpt_dir: str, actor_save_dir: str, critic_ckpt_dir: str, critic_save_dir: str,
    reward_model_ckpt_dir: str = "", reward: Literal["verifier", "rule"] = "verifier",
    train_file: str = "dataset/GSM8K/train.json", task: Literal["GSM8K", "MATH", "toy"] = "GSM8K",
    log_dir: str = "", model_type: str = "", tokenizer_file: str = "", max_new_tokens: int = 256,
    max_buffer_size: int = 96, max_batch_size: int = 4, rollout_batch_size: int = 64, epochs: int = 1,
    max_steps: int = -1, inner_epochs: int = 2, minibatches: int = 4, lr: float = 1e-6, critic_lr: float = 9e-6,
    critic_warmup: int = -1, warmup_ratio: float = 0.03, weight_decay: float = 0.0, max_grad_norm: float = 1.0,
    temperature: float = 1.0, kl_coef: float = 0.02, clip_ratio: float = 0.2, value_clip: float = 0.2,
    gamma: float = 1.0, gae_lambda: float = 0.95, missing_eos_penalty: float = 1.0,
    lora_rank: int = -1, lora_alpha: float = 16.0,
    lora_targets: list[str] = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"],  # noqa: B006 (shown by --help, never changed)
    save_every: int = -1, keep_last: int = 1, resume: Literal["none", "auto"] = "none",
    save_dtype: Literal["", "float32", "bfloat16", "float16"] = "", quantize: Literal["", "int8", "int4"] = "",
    seed: int = 1, dry_run: bool = False,
) -> None:
    """Proximal policy optimisation with a critic; rewards at the end of a response, KL per token.

    actor_ckpt_dir: solver to improve; a frozen copy of it is the reference
    actor_save_dir: directory for the improved solver, metrics.jsonl and run.json
    critic_ckpt_dir: verifier that the critic starts from; a solver will do (its value head starts at zero)
    critic_save_dir: directory for the critic
    reward_model_ckpt_dir: verifier that scores responses; needed for --reward verifier
    reward: verifier = its normalised score; rule = 1 for an answer that grades right against the label, else 0
    train_file: prompts, json array or jsonl of {"instruction", "label"?}; --reward rule needs labels
    task: how --reward rule finds and compares answers
    log_dir: directory for metrics.jsonl and run.json; default: actor_save_dir
    model_type: a family or released size the actor must agree with; default: what params.json says
    tokenizer_file: tokenizer file of any kind; default: the one in actor_ckpt_dir
    max_new_tokens: longest response
    max_buffer_size: episodes in one rollout buffer
    max_batch_size: episodes in one training forward pass
    rollout_batch_size: sequences that decode at once
    epochs: passes over the prompts
    max_steps: stop after so many buffers; -1 = after all epochs
    inner_epochs: passes over each buffer
    minibatches: optimizer steps in each pass
    lr: peak learning rate of the actor
    critic_lr: peak learning rate of the critic
    critic_warmup: first buffers, from which only the critic learns; -1 = a tenth of all, at most 10
    warmup_ratio: share of all steps in which the rates rise; they then fall along a cosine to a tenth
    weight_decay: decay of weight matrices
    max_grad_norm: gradients are clipped to this global norm
    temperature: sampling temperature; ratios and KL are at the same temperature
    kl_coef: weight of the per-token KL to the reference in the reward
    clip_ratio: probability ratios are clipped to 1 +- this
    value_clip: the critic moves at most this far from its rollout values without penalty
    gamma: discount
    gae_lambda: lambda of generalised advantage estimation
    missing_eos_penalty: taken from the reward of a response that did not end by itself
    lora_rank: rank of LoRA adapters on actor and critic; -1 trains all weights
    lora_alpha: adapters are scaled by lora_alpha / lora_rank
    lora_targets: linears that carry an adapter
    save_every: buffers between checkpoints to resume from; -1 = after each epoch
    keep_last: how many of those are kept
    resume: auto = go on from the newest complete one in both save directories, if there is one
    save_dtype: type of the stored weights; default: as in the directories started from (adapters: float32)
    quantize: hold the frozen models, reference and verifier, in 8 or 4 bits a weight; the first KL is then not 0
    seed: seed of prompt order, sampling and adapter initialisation
    dry_run: print the plan - buffers, memory of each rank for each model - and stop
    """
    flags = locals().copy()
    cli.check_numbers(flags)
    if reward == "verifier" and not reward_model_ckpt_dir:
        raise UserError("--reward verifier needs --reward_model_ckpt_dir; or grade answers with --reward rule")
    if temperature <= 0:
        raise UserError(f"--temperature {temperature}: PPO learns from sampled responses; expected more than 0")
    if Path(actor_save_dir).resolve() == Path(critic_save_dir).resolve():
        raise UserError("--actor_save_dir and --critic_save_dir are the same directory; one would overwrite the other")
    prompts = read_prompts(train_file, need_label=reward == "rule")
    tokenizer = assemble.load_tokenizer(actor_ckpt_dir, tokenizer_file)
    assemble.check_tokenizer(tokenizer, critic_ckpt_dir, reward_model_ckpt_dir)
    lora = assemble.lora_config(lora_rank, lora_alpha, 0.0, lora_targets)
    buffers = [(epoch, rows) for epoch in range(1, epochs + 1)
               for rows in chunks(epoch_order(len(prompts), seed, epoch), max_buffer_size)]
    buffers = buffers[: max_steps if max_steps >= 0 else None]
    if critic_warmup > len(buffers):
        raise UserError(f"--critic_warmup is {critic_warmup}, but there are only {len(buffers)} buffers; lower it")
    if dry_run:
        actor_config, critic_config = (assemble.load_config(folder) for folder in (actor_ckpt_dir, critic_ckpt_dir))
        runlog.table(plan.ppo(actor_config, assemble.solver_to_verifier(critic_config),
                              assemble.n_shards(actor_ckpt_dir), lora,
                              [encode_prompt(tokenizer, prompt.instruction) for prompt in prompts],
                              max_new_tokens=max_new_tokens, n_rows=max_batch_size, n_decoding=rollout_batch_size,
                              buffers=len(buffers), with_verifier=reward == "verifier", quantize=quantize))
        return
    parallel.start(seed=seed)
    for save_dir in (actor_save_dir, critic_save_dir):
        assemble.check_save_dir(save_dir, actor_ckpt_dir, critic_ckpt_dir, reward_model_ckpt_dir)
    actor = assemble.load_solver(actor_ckpt_dir, model_type=model_type, dtype=torch.float32)
    # as the actor: their first KL is 0, unless the reference is quantised
    reference = assemble.load_solver(actor_ckpt_dir, dtype=torch.float32, quantize=quantize)
    critic = assemble.load_verifier(critic_ckpt_dir, dtype=torch.float32, from_solver=True)
    assemble.put_lora_on(actor, lora, seed)
    assemble.put_lora_on(critic, lora, seed)
    settings = ppo.Settings(
        temperature=temperature, max_new_tokens=max_new_tokens, rollout_batch_size=rollout_batch_size,
        max_batch_size=max_batch_size, inner_epochs=inner_epochs, minibatches=minibatches, kl_coef=kl_coef,
        clip_ratio=clip_ratio, value_clip=value_clip, gamma=gamma, gae_lambda=gae_lambda,
        missing_eos_penalty=missing_eos_penalty, seed=seed,
    )
    grader = Grader(task)
    if reward == "verifier":
        verifier = assemble.load_verifier(reward_model_ckpt_dir, quantize=quantize)
        task_reward = ppo.verifier_reward(verifier, max_batch_size)
    else:
        task_reward = ppo.graded_reward(lambda responses, labels: [
            verdict.outcome == "right" for verdict in grader.grade(responses, labels)])
    log = RunLog(log_dir or actor_save_dir, flags)
    critic_warmup = critic_warmup if critic_warmup >= 0 else min(10, len(buffers) // 10)
    per_buffer = inner_epochs * minibatches
    schedule = {"warmup_ratio": warmup_ratio, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm,
                "seed": seed}
    actor_loop = TrainLoop(actor, log, lr=lr, total_steps=(len(buffers) - critic_warmup) * per_buffer, **schedule)
    critic_loop = TrainLoop(critic, log, lr=critic_lr, total_steps=len(buffers) * per_buffer, **schedule)
    saver = Saver(
        log, [Trained(save_dir, loop, lambda folder, state, model=model, source=source: assemble.save_model(
            model, folder, source, save_dtype, lora, tokenizer_file, state))
              for save_dir, loop, model, source in ((actor_save_dir, actor_loop, actor, actor_ckpt_dir),
                                                    (critic_save_dir, critic_loop, critic, critic_ckpt_dir))],
        save_every=save_every, keep_last=keep_last, steps_per_epoch=-(-len(prompts) // max_buffer_size),
        total_steps=len(buffers), facts={"seed": seed, "prompts": len(prompts), "max_buffer_size": max_buffer_size})
    done = saver.resume(resume)
    log.progress(len(buffers), "buffer", done)
    with grader:
        for step, (epoch, rows) in list(enumerate(buffers))[done:]:
            batch_prompts = [prompts[row] for row in rows]
            rollouts = ppo.collect(ppo.Models(actor, reference, critic), batch_prompts, tokenizer, task_reward,
                                   settings, step)
            metrics = ppo.rollout_metrics(rollouts) | ppo.update(
                actor_loop, critic_loop, rollouts, settings, step, train_actor=step >= critic_warmup)
            log.metrics(step + 1, epoch=epoch, **metrics)
            log.advance(tokens=int(rollouts.batch.response_mask.sum()), reward=metrics["reward"], kl=metrics["kl"])
            saver.step_done(step + 1)
    saver.finish()


if __name__ == "__main__":
    cli.run(main)
