"""Train a verifier (reward model) from a solver checkpoint and pairs of solutions, full or LoRA.

torchrun --nproc_per_node 8 verifier_train.py --ckpt_dir out --save_dir verifier --train_file pairs.json
"""

from typing import Literal

import torch

from src import assemble, cli, parallel, plan, runlog
from src.data.batches import Batching
from src.data.examples import read_pairs
from src.runlog import RunLog
from src.training.loop import TrainLoop
from src.training.saver import Saver, Trained
from src.training.verifier import PairData, evaluate_pairs, n_pairs, pairwise_loss, split_by_problem


def main(
    ckpt_dir: str, save_dir: str, train_file: str, label_file: str = "", held_out: float = 0.1,
    objective: Literal["pairwise"] = "pairwise", score: Literal["last", "mean"] = "last",
    model_type: str = "", tokenizer_file: str = "",
    max_seq_len: int = 512, truncation: Literal["error", "drop", "left", "right"] = "drop",
    max_batch_size: int = 1, accumulation_steps: int = 1, packing: bool = False, epochs: int = 1, max_steps: int = -1,
    lr: float = 1e-5, schedule: Literal["cosine", "linear", "constant"] = "cosine", warmup_ratio: float = 0.03,
    min_lr_ratio: float = 0.1, weight_decay: float = 0.0, max_grad_norm: float = 1.0,
    activation_checkpointing: Literal["none", "selective", "full"] = "none", tensor_parallel_size: int = -1,
    lora_rank: int = -1, lora_alpha: float = 16.0, lora_dropout: float = 0.0,
    lora_targets: list[str] = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"],  # noqa: B006 (shown by --help, never changed)
    eval_every: int = -1, save_every: int = -1, keep_last: int = 1, resume: Literal["none", "auto"] = "none",
    save_dtype: Literal["", "float32", "bfloat16", "float16"] = "", seed: int = 1, dry_run: bool = False,
) -> None:
    """Reward-model training on a value head.

    ckpt_dir: solver to start from (its value head starts at zero), or a verifier to train on
    save_dir: directory for epoch-N checkpoints, the final checkpoint, metrics.jsonl and run.json
    train_file: json array or jsonl of {"instruction", "chosen", "rejected"}; each side a text or a list
    label_file: held-out pairs in the same form; default: a share of train_file
    held_out: share of train_file's problems, its last, kept for evaluation when there is no label_file
    objective: pairwise = Bradley-Terry on the two scores
    score: a solution's score is read at its last token, or is the mean over its tokens
    model_type: a family or released size the checkpoint must agree with; default: what params.json says
    tokenizer_file: tokenizer file of any kind; default: the one in ckpt_dir
    max_seq_len: longest prompt + solution in tokens
    truncation: for pairs with a longer one, counted: drop them; cut the prompt's left or the solution's right; or end
        with an error. More than 1% of the pairs dropped or cut on the right is an error always
    max_batch_size: pairs in one forward pass
    accumulation_steps: forward passes in one optimizer step
    packing: lay the texts of a forward pass end to end instead of padding them; the update is the same
    epochs: passes over the training file
    max_steps: stop after so many optimizer steps; -1 = after all epochs
    lr: peak learning rate of AdamW
    schedule: how the rate falls after it has risen
    warmup_ratio: share of all steps in which the rate rises
    min_lr_ratio: share of the peak rate that the last step has, unless the schedule is constant
    weight_decay: decay of weight matrices
    max_grad_norm: gradients are clipped to this global norm
    activation_checkpointing: what the backward pass computes again to save memory: nothing, feed-forwards, or all
    tensor_parallel_size: ranks that share one model; the others take other pairs. -1 = the shards of ckpt_dir, if they
        divide the ranks, else all ranks
    lora_rank: rank of LoRA adapters; -1 trains all weights
    lora_alpha: adapters are scaled by lora_alpha / lora_rank
    lora_dropout: dropout before the adapters
    lora_targets: linears that carry an adapter
    eval_every: steps between measurements on held-out pairs; -1 = after each epoch
    save_every: steps between checkpoints to resume from; -1 = after each epoch
    keep_last: how many of those are kept
    resume: auto = go on from the newest complete one in save_dir, if there is one
    save_dtype: type of the stored weights; default: as in ckpt_dir (adapters: float32)
    seed: seed of data order and adapter initialisation
    dry_run: print the plan - steps, memory of each rank, disk, an example with its loss in brackets - and stop
    """
    flags = locals().copy()
    cli.check_numbers(flags)
    rows = read_pairs(train_file)
    train_rows, held_rows = (rows, read_pairs(label_file)) if label_file else split_by_problem(rows, held_out)
    config = assemble.load_config(ckpt_dir, model_type)
    tokenizer = assemble.load_tokenizer(ckpt_dir, tokenizer_file)
    data, held = (PairData(part, tokenizer, max_seq_len=max_seq_len, truncation=truncation, source=source)
                  for part, source in ((train_rows, train_file), (held_rows, label_file or train_file)))
    lora = assemble.lora_config(lora_rank, lora_alpha, lora_dropout, lora_targets)
    n_ranks = assemble.tensor_parallel_size(ckpt_dir, tensor_parallel_size)
    batching = Batching(max_batch_size=max_batch_size, accumulation_steps=accumulation_steps, seed=seed,
                        rank=parallel.rank() // n_ranks, ranks=parallel.world_size() // n_ranks)
    steps_per_epoch = batching.steps_per_epoch(len(data.pairs))
    total_steps = min(epochs * steps_per_epoch, max_steps if max_steps >= 0 else epochs * steps_per_epoch)
    if dry_run:
        examples = [encoded for pair in data.pairs for encoded in pair]
        runlog.table(plan.training(assemble.solver_to_verifier(config), assemble.n_shards(ckpt_dir), lora, examples,
                                   tokenizer, epochs=epochs, rows_a_forward=2 * max_batch_size, steps=total_steps))
        return
    parallel.start(seed, n_ranks)
    assemble.check_save_dir(save_dir, ckpt_dir)
    model = assemble.load_verifier(ckpt_dir, dtype=torch.float32, from_solver=True)
    assemble.set_score(model, score=score)
    assemble.put_lora_on(model, lora, seed)
    log = RunLog(save_dir, flags)
    log.logger.info("%s; %d pairs held out", data.report, len(held.pairs))
    log.logger.info("first example, the chosen side: %s", plan.masked_text(data.pairs[0][0], tokenizer))
    loop = TrainLoop(model, log, lr=lr, total_steps=total_steps, schedule=schedule, warmup_ratio=warmup_ratio,
                     min_lr_ratio=min_lr_ratio, weight_decay=weight_decay, max_grad_norm=max_grad_norm, seed=seed,
                     activation_checkpointing=activation_checkpointing)
    saver = Saver(
        log, [Trained(save_dir, loop, lambda folder, state: assemble.save_model(
            model, folder, ckpt_dir, save_dtype, lora, tokenizer_file, state))],
        save_every=save_every, keep_last=keep_last, steps_per_epoch=steps_per_epoch, total_steps=total_steps,
        facts={"seed": seed, "pairs": len(data.pairs), "pairs_a_step": batching.rows_a_step})
    done = saver.resume(resume)
    model.train()
    log.progress(total_steps, "step", done)
    for epoch, number, batches in data.steps(batching, packing=packing, epochs=epochs, done=done, stop=total_steps):
        normaliser = parallel.sum_over_data_parallel(n_pairs(batches))
        for batch in batches:
            loop.backward(pairwise_loss(model, batch.to(parallel.device()), normaliser), last=batch is batches[-1])
        report = loop.step()
        log.metrics(number, epoch=epoch, **report._asdict(), pairs=normaliser)
        log.advance(tokens=sum(batch.tokens.numel() for batch in batches), loss=report.loss)
        accuracy = None
        if number == total_steps or number % (eval_every if eval_every >= 0 else steps_per_epoch) == 0:
            held_report = evaluate_pairs(model, held, max_batch_size)
            accuracy = held_report.held_out_accuracy
            log.metrics(number, epoch=epoch, **held_report._asdict())
            log.logger.info("step %d: held-out pair accuracy %.3f", number, accuracy)
            assemble.set_score(model, score_mean=held_report.score_mean, score_std=held_report.score_std)
        saver.step_done(number, accuracy)
    saver.finish()


if __name__ == "__main__":
    cli.run(main)
