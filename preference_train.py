"""Train a solver on preferences: DPO, conservative DPO, IPO, ORPO or SimPO.

torchrun --nproc_per_node 8 preference_train.py --ckpt_dir out --save_dir preferred --train_file pairs.json
torchrun --nproc_per_node 8 preference_train.py --ckpt_dir out --save_dir preferred --train_file pairs.json \\
    --objective orpo --lora_rank 8 --lr 3e-5
"""

from pathlib import Path
from typing import Literal

import torch

from src import assemble, cli, parallel, plan, runlog
from src.checkpoint import storage
from src.data.batches import Batching
from src.memory import Training
from src.runlog import RunLog
from src.training.loop import TrainLoop
from src.training.meter import Meter
from src.training.preference import Preference, evaluate, n_pairs, open_preferences, report
from src.training.reference import reference_identity, reference_logprobs
from src.training.resuming import find_start, run_facts
from src.training.saver import Saver, Trained
from src.training.solver import n_supervised


def main(
    ckpt_dir: str, save_dir: str, train_file: str, label_file: str = "", held_out: float = 0.1,
    objective: Literal["dpo", "cdpo", "ipo", "orpo", "simpo"] = "dpo", beta: float = 0.1, margin: float = 0.0,
    label_smoothing: float = 0.0, length_normalize: bool = False, nll_weight: float = 0.0,
    reference_ckpt_dir: str = "", reference_file: str = "", model_type: str = "", tokenizer_file: str = "",
    max_seq_len: int = -1, truncation: Literal["error", "drop", "left", "right", "keep_end"] = "drop",
    max_batch_size: int = 1, accumulation_steps: int = 1, packing: bool = True, epochs: int = 1, max_steps: int = -1,
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw", lr: float = 5e-7,
    schedule: Literal["cosine", "linear", "constant"] = "cosine", warmup_ratio: float = 0.1,
    min_lr_ratio: float = 0.1, weight_decay: float = 0.0, max_grad_norm: float = 1.0,
    activation_checkpointing: Literal["none", "selective", "full"] = "none", tensor_parallel_size: int = -1,
    lora_rank: int = -1, lora_alpha: float = 16.0, lora_dropout: float = 0.0,
    lora_targets: list[str] = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"],  # noqa: B006 (shown by --help, never changed)
    eval_every: int = -1, save_every: int = -1, keep_last: int = 1, background_save: bool = False,
    resume: Literal["none", "auto"] = "none",
    save_dtype: Literal["", "float32", "bfloat16", "float16"] = "", seed: int = 1, wandb: str = "",
    dry_run: bool = False,
) -> None:
    """Preference optimisation of a solver.

    ckpt_dir: solver to start from
    save_dir: directory for epoch-N checkpoints, the final checkpoint, metrics.jsonl and run.json
    train_file: {"instruction", "chosen", "rejected", "prefix"?} as json array or jsonl, each side a text or a list;
        prefix is a partial answer that both sides go on from, and carries no loss
    label_file: held-out rows in the same form; default: a share of the training rows
    held_out: share of the problems, the last ones, kept for evaluation when there is no label_file
    objective: dpo; cdpo = DPO for labels of which some are wrong; ipo, orpo and simpo take means a token; orpo and
        simpo have no reference
    beta: how hard the policy is held to the reference, or weight of ORPO's preference term, or SimPO's scale (2 to 10)
    margin: simpo: beta times what chosen should be ahead by (the paper's gamma)
    label_smoothing: cdpo: the share of labels taken to be wrong
    length_normalize: dpo and cdpo: mean log-probs a token instead of their sums
    nll_weight: weight of the chosen response's negative log-likelihood a token, added to the loss (orpo has its own)
    reference_ckpt_dir: frozen solver to measure against; default: ckpt_dir, also with adapters on it
    reference_file: file that keeps the reference's log-probs, also for other runs; default: reference.jsonl in save_dir
    model_type: a family or released size the checkpoint must agree with; default: what params.json says
    tokenizer_file: tokenizer file of any kind; default: the one in ckpt_dir
    max_seq_len: longest prompt + response in tokens, at most the model's context; -1 = 512, or that if it is less
    truncation: for pairs with a longer one, counted: drop them; cut the prompt's left or the response's right; or end
        with an error; keep_end, as trl 0.7.10, keeps half of max_seq_len of the prompt's end, even where that cuts the
        question. More than 1% of the pairs dropped or short of response tokens is an error always
    max_batch_size: pairs in one forward pass
    accumulation_steps: forward passes in one optimizer step
    packing: lay the pairs of a forward pass end to end, the prompt of each only once, instead of padding both texts;
        the update is the same. On a GPU false may be faster for many short pairs: attention takes them in turn
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
    preference = Preference(objective=objective, beta=beta, margin=margin, label_smoothing=label_smoothing,
                            length_normalize=length_normalize, nll_weight=nll_weight)
    against = preference.reference_dir(ckpt_dir, reference_ckpt_dir, reference_file)
    config = assemble.load_config(ckpt_dir, model_type, "solver")
    if reference_ckpt_dir:
        assemble.load_config(reference_ckpt_dir, kind="solver")
    tokenizer = assemble.load_tokenizer(ckpt_dir, tokenizer_file)
    data, held = open_preferences(train_file, label_file, held_out, tokenizer, truncation=truncation,
                                  max_seq_len=assemble.context_limit(max_seq_len, ckpt_dir, config))
    lora = assemble.lora_config(lora_rank, lora_alpha, lora_dropout, lora_targets)
    n_ranks = assemble.tensor_parallel_size(ckpt_dir, tensor_parallel_size)
    batching = Batching(max_batch_size=max_batch_size, accumulation_steps=accumulation_steps, seed=seed,
                        rank=parallel.rank() // n_ranks, ranks=parallel.world_size() // n_ranks)
    steps_per_epoch = batching.steps_per_epoch(len(data.samples))
    total_steps = min(epochs * steps_per_epoch, max_steps if max_steps >= 0 else epochs * steps_per_epoch)
    if dry_run:
        examples = [encoded for pair in data.samples for encoded in pair]
        how = Training(lora, "", activation_checkpointing, batching.ranks, accumulation_steps > 1,
                       parallel.device().type == "cuda", optimizer)
        largest = plan.largest_pass(examples, 2 * max_batch_size, packing=packing)
        runlog.table(plan.training(config, assemble.planned_ranks(ckpt_dir, tensor_parallel_size), how, largest,
                                   examples, tokenizer, epochs=epochs, steps=total_steps))
        return
    parallel.start(seed, n_ranks)
    assemble.check_save_dir(save_dir, ckpt_dir, reference_ckpt_dir)
    assemble.check_tokenizer(tokenizer, reference_ckpt_dir)
    facts = run_facts("preference_train", flags, rows=len(data.samples), rows_a_step=batching.rows_a_step)
    find_start([save_dir], resume, facts, total_steps)
    fingerprint = storage.fingerprint(Path(against)) if against else None
    log = RunLog(save_dir, flags, {"reference": {"ckpt_dir": against, "fingerprint": fingerprint}}, wandb=wandb)
    log.logger.info("%s; held out: %s", data.report, held.report)
    log.logger.info("first example: %s", plan.masked_text(data.samples[0][0], tokenizer))
    model, reference = assemble.load_solver(against or ckpt_dir, dtype=torch.float32), None
    if against:
        reference = reference_logprobs(
            model, [*data.samples, *held.samples], Path(reference_file or Path(save_dir) / "reference.jsonl"),
            reference_identity(fingerprint, tokenizer), max_batch_size=2 * max_batch_size, log=log)
    if reference_ckpt_dir:
        del model  # before the policy takes its place
        model = assemble.load_solver(ckpt_dir, dtype=torch.float32)
    assemble.put_lora_on(model, lora, seed)
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
    meter = Meter(config)
    steps = data.steps(batching, reference, packing=packing, epochs=epochs, done=done, stop=total_steps)
    for epoch, number, batches in meter.timed(steps):
        normaliser, tallies = parallel.sum_over_data_parallel(n_pairs(batches)), []
        for batch in batches:
            loss, tally = preference.loss(model, batch.to(parallel.device()), normaliser)
            loop.backward(loss, last=batch is batches[-1])
            tallies.append(tally)
        step = loop.step()
        plain = [batch.batch for batch in batches]
        measured = meter.measure(plain, parallel.sum_over_data_parallel(n_supervised(plain)))
        log.metrics(number, epoch=epoch, **report(tallies)._asdict() | step._asdict(), pairs=normaliser, **measured)
        log.advance(tokens=int(measured["tokens"]), loss=step.loss)
        score = None
        if number == total_steps or number % (eval_every if eval_every >= 0 else steps_per_epoch) == 0:
            found = evaluate(model, held, reference, preference, batching, packing=packing)
            log.metrics(number, epoch=epoch, **{f"eval_{name}": value for name, value in found._asdict().items()})
            log.logger.info("step %d: held-out loss %.4f, accuracy %.3f", number, found.loss, found.accuracy)
            score = -found.loss
        saver.step_done(number, score)
    saver.finish()


if __name__ == "__main__":
    cli.run(main)
