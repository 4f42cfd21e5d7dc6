"""Train a verifier (reward model) from a solver checkpoint on pairs of solutions, on their outcomes or on their steps.

torchrun --nproc_per_node 8 verifier_train.py --ckpt_dir out --save_dir verifier --train_file pairs.json
torchrun --nproc_per_node 8 verifier_train.py --ckpt_dir out --save_dir prm --train_file steps.json --objective process
"""

from typing import Literal

import torch

from src import assemble, cli, parallel, plan, runlog
from src.data.batches import Batching
from src.data.encoding import StepKind
from src.errors import UserError
from src.memory import Training
from src.runlog import RunLog
from src.training.loop import TrainLoop
from src.training.meter import Meter
from src.training.resuming import find_start, run_facts
from src.training.saver import Saver, Trained
from src.training.verifier import open_data


def main(
    ckpt_dir: str, save_dir: str, train_file: list[str], weights: list[float] = [],  # noqa: B006 (never changed)
    label_file: str = "", held_out: float = 0.1, objective: Literal["pairwise", "outcome", "process"] = "pairwise",
    score: Literal["last", "mean"] = "last", margin: float = 0.0, centring: float = 0.0,
    label_tokens: Literal["all", "last"] = "all", balance: bool = False, step: Literal["", StepKind] = "",
    model_type: str = "", tokenizer_file: str = "",
    max_seq_len: int = -1, truncation: Literal["error", "drop", "left", "right"] = "drop",
    max_batch_size: int = 1, accumulation_steps: int = 1, packing: bool = True, epochs: int = 1, max_steps: int = -1,
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw", lr: float = 1e-5,
    schedule: Literal["cosine", "linear", "constant"] = "cosine", warmup_ratio: float = 0.03,
    min_lr_ratio: float = 0.1, weight_decay: float = 0.0, max_grad_norm: float = 1.0,
    activation_checkpointing: Literal["none", "selective", "full"] = "none", tensor_parallel_size: int = -1,
    lora_rank: int = -1, lora_alpha: float = 16.0, lora_dropout: float = 0.0,
    lora_targets: list[str] = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"],  # noqa: B006 (shown by --help, never changed)
    eval_every: int = -1, save_every: int = -1, keep_last: int = 1, background_save: bool = False,
    resume: Literal["none", "auto"] = "none",
    save_dtype: Literal["", "float32", "bfloat16", "float16"] = "", seed: int = 1, wandb: str = "",
    dry_run: bool = False,
) -> None:
    """Reward-model training on a value head.

    ckpt_dir: solver to start from (its value head starts at zero), or a verifier to train on
    save_dir: directory for epoch-N checkpoints, the final checkpoint, metrics.jsonl and run.json
    train_file: json array or jsonl, or several. pairwise: {"instruction", "chosen", "rejected"}, each side a text or a
        list; outcome: {"instruction", "output", "correct"}; process: {"instruction", "steps", "labels"}, and outcomes
    weights: how often the rows of each training file count, such as 1,0.5; default: once
    label_file: held-out rows in the same form; default: a share of the training rows
    held_out: share of the problems, the last ones, kept for evaluation when there is no label_file
    objective: pairwise = Bradley-Terry on two scores; outcome = is the solution right; process = is each step right
    score: pairwise: a solution's score is read at its last token, or is the mean over its tokens
    margin: pairwise: what a chosen score should be ahead by
    centring: pairwise: weight of the squared sum of the two scores, which keeps scores around 0
    label_tokens: outcome: a solution is judged at each of its tokens, or at its last. Held-out ones are judged at the
        last alone, and so are outcomes among the rows of process
    balance: outcome and process: let right labels weigh as much in all as wrong ones
    step: outcome and process: what a step is: a paragraph, with a blank line behind it, or a line, as in GSM8K and
        MetaMath; later commands follow it. Default: as the verifier in ckpt_dir learnt it, else paragraph
    model_type: a family or released size the checkpoint must agree with; default: what params.json says
    tokenizer_file: tokenizer file of any kind; default: the one in ckpt_dir
    max_seq_len: longest prompt + solution in tokens, at most the model's context; -1 = 512, or that if it is less
    truncation: for rows with a longer one, counted: drop them; cut the prompt's left or the solution's right; or end
        with an error. More than 1% of the rows dropped or cut on the right is an error always
    max_batch_size: pairs or solutions in one forward pass
    accumulation_steps: forward passes in one optimizer step
    packing: lay the texts of a forward pass end to end instead of padding them; the update is the same
    epochs: passes over the training file
    max_steps: stop after so many optimizer steps; -1 = after all epochs
    optimizer: AdamW with its moments in float32, or in 8 bits (torchao), a quarter of their memory
    lr: peak learning rate of AdamW
    schedule: how the rate falls after it has risen
    warmup_ratio: share of all steps in which the rate rises
    min_lr_ratio: share of the peak rate that the last step has, unless the schedule is constant
    weight_decay: decay of weight matrices
    max_grad_norm: gradients are clipped to this global norm
    activation_checkpointing: what the backward pass computes again to save memory: nothing, feed-forwards, or all
    tensor_parallel_size: ranks that share one model; the others take other rows. -1 = the shards of ckpt_dir, if they
        divide the ranks, else all ranks
    lora_rank: rank of LoRA adapters; -1 trains all weights
    lora_alpha: adapters are scaled by lora_alpha / lora_rank
    lora_dropout: dropout before the adapters
    lora_targets: linears that carry an adapter
    eval_every: steps between measurements on held-out rows; -1 = after each epoch
    save_every: steps between checkpoints to resume from; -1 = after each epoch
    keep_last: how many of those are kept
    background_save: write checkpoints to resume from while training goes on; a copy of what they hold is then in main
        memory until they are written
    resume: auto = go on from the newest complete one in save_dir, if there is one
    save_dtype: type of the stored weights; default: as in ckpt_dir (adapters: float32)
    seed: seed of data order and adapter initialisation
    wandb: PROJECT or PROJECT/NAME to show the metrics under in Weights & Biases; WANDB_MODE=offline keeps them in the
        run's directory
    dry_run: print the plan - steps, memory of each rank, disk, an example with its loss in brackets - and stop
    """
    flags = locals().copy()
    cli.check_numbers(flags)
    config = assemble.load_config(ckpt_dir, model_type)
    tokenizer = assemble.load_tokenizer(ckpt_dir, tokenizer_file)
    if step and objective == "pairwise":
        raise UserError(f"--step {step} goes with --objective outcome or process; pairwise scores know no steps")
    if config.value_head and config.objective != "pairwise":
        assemble.check_step(ckpt_dir, config, step)
    step = step or config.step
    options = {"margin": margin, "centring": centring} if objective == "pairwise" else {
        "label_tokens": label_tokens if objective == "outcome" else "last", "balance": balance, "step": step}
    data, held = open_data(objective, train_file, weights, label_file, held_out, tokenizer, seed=seed,
                           max_seq_len=assemble.context_limit(max_seq_len, ckpt_dir, config), truncation=truncation,
                           **options)
    lora = assemble.lora_config(lora_rank, lora_alpha, lora_dropout, lora_targets)
    n_ranks = assemble.tensor_parallel_size(ckpt_dir, tensor_parallel_size)
    batching = Batching(max_batch_size=max_batch_size, accumulation_steps=accumulation_steps, seed=seed,
                        rank=parallel.rank() // n_ranks, ranks=parallel.world_size() // n_ranks)
    steps_per_epoch = batching.steps_per_epoch(len(data.samples))
    total_steps = min(epochs * steps_per_epoch, max_steps if max_steps >= 0 else epochs * steps_per_epoch)
    if dry_run:
        examples = [encoded for sample in data.samples for encoded in sample]
        how = Training(lora, "", activation_checkpointing, batching.ranks, accumulation_steps > 1,
                       parallel.device().type == "cuda", optimizer)
        largest = plan.largest_pass(examples, len(data.samples[0]) * max_batch_size, packing=packing)
        runlog.table(plan.training(assemble.solver_to_verifier(config),
                                   assemble.planned_ranks(ckpt_dir, tensor_parallel_size), how, largest, examples,
                                   tokenizer, epochs=epochs, steps=total_steps))
        return
    parallel.start(seed, n_ranks)
    assemble.check_save_dir(save_dir, ckpt_dir)
    facts = run_facts("verifier_train", flags, rows=len(data.samples), rows_a_step=batching.rows_a_step)
    find_start([save_dir], resume, facts, total_steps)
    model = assemble.load_verifier(ckpt_dir, dtype=torch.float32, from_solver=True)
    score = {"pairwise": score, "outcome": "last", "process": "steps"}[objective]
    assemble.set_score(model, objective=objective, score=score, step=step)
    assemble.put_lora_on(model, lora, seed)
    log = RunLog(save_dir, flags, wandb=wandb)
    log.logger.info("%s; held out: %s", data.report, held.report)
    log.logger.info("first example: %s", plan.masked_text(data.samples[0][0], tokenizer))
    loop = TrainLoop(model, log, lr=lr, total_steps=total_steps, schedule=schedule, warmup_ratio=warmup_ratio,
                     min_lr_ratio=min_lr_ratio, weight_decay=weight_decay, max_grad_norm=max_grad_norm, seed=seed,
                     activation_checkpointing=activation_checkpointing, optimizer=optimizer)
    saver = Saver(
        log, [Trained(save_dir, loop, lambda folder, state: assemble.begin_save(
            model, folder, ckpt_dir, save_dtype, lora, tokenizer_file, state, background_save))],
        save_every=save_every, keep_last=keep_last, steps_per_epoch=steps_per_epoch, total_steps=total_steps,
        facts=facts)
    done = saver.resume(resume)
    model.train()
    log.progress(total_steps, "step", done)
    meter = Meter(model.config)
    steps = data.steps(batching, packing=packing, epochs=epochs, done=done, stop=total_steps)
    for epoch, number, batches in meter.timed(steps):
        normaliser = parallel.sum_over_data_parallel(data.n_judged(batches))
        for batch in batches:
            loop.backward(data.loss(model, batch.to(parallel.device()), normaliser), last=batch is batches[-1])
        report = loop.step()
        measured = meter.measure(batches, normaliser)
        log.metrics(number, epoch=epoch, **report._asdict(), judged=normaliser, **measured)
        log.advance(tokens=int(measured["tokens"]), loss=report.loss)
        accuracy = None
        if number == total_steps or number % (eval_every if eval_every >= 0 else steps_per_epoch) == 0:
            held_report = held.evaluate(model, max_batch_size)
            accuracy = held_report.held_out_accuracy
            log.metrics(number, epoch=epoch, **held_report._asdict())
            log.logger.info("step %d: held-out accuracy %.3f", number, accuracy)
            assemble.set_score(model, score_mean=held_report.score_mean, score_std=held_report.score_std)
        saver.step_done(number, accuracy)
    saver.finish()


if __name__ == "__main__":
    cli.run(main)
