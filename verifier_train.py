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
from src.training.verifier import PairData, evaluate_pairs, n_pairs, pairwise_loss, split_by_problem


def main(
    ckpt_dir: str, save_dir: str, train_file: str, label_file: str = "", held_out: float = 0.1,
    objective: Literal["pairwise"] = "pairwise", score: Literal["last", "mean"] = "last",
    model_type: str = "", tokenizer_file: str = "",
    max_seq_len: int = 512, max_batch_size: int = 1, accumulation_steps: int = 1, packing: bool = False,
    epochs: int = 1, lr: float = 1e-5, warmup_ratio: float = 0.03,
    weight_decay: float = 0.0, max_grad_norm: float = 1.0,
    lora_rank: int = -1, lora_alpha: float = 16.0, lora_dropout: float = 0.0,
    lora_targets: list[str] = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"],  # noqa: B006 (shown by --help, never changed)
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
    tokenizer_file: sentencepiece model; default: the one in ckpt_dir
    max_seq_len: longest prompt + solution in tokens; longer pairs are dropped and counted, more than 1% is an error
    max_batch_size: pairs in one forward pass
    accumulation_steps: forward passes in one optimizer step
    packing: lay the rows of a forward pass end to end instead of padding them; the update is the same
    epochs: passes over the training file
    lr: peak learning rate of AdamW
    warmup_ratio: share of all steps in which the rate rises; it then falls along a cosine to a tenth
    weight_decay: decay of weight matrices
    max_grad_norm: gradients are clipped to this global norm
    lora_rank: rank of LoRA adapters; -1 trains all weights
    lora_alpha: adapters are scaled by lora_alpha / lora_rank
    lora_dropout: dropout before the adapters
    lora_targets: linears that carry an adapter
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
    data, held = (PairData(part, tokenizer, max_seq_len=max_seq_len, source=source)
                  for part, source in ((train_rows, train_file), (held_rows, label_file or train_file)))
    lora = assemble.lora_config(lora_rank, lora_alpha, lora_dropout, lora_targets)
    batching = Batching(max_batch_size=max_batch_size, accumulation_steps=accumulation_steps, seed=seed)
    steps_per_epoch = batching.steps_per_epoch(len(data.pairs))
    if dry_run:
        examples = [encoded for pair in data.pairs for encoded in pair]
        runlog.table(plan.training(assemble.solver_to_verifier(config), assemble.n_shards(ckpt_dir), lora, examples,
                                   tokenizer, epochs=epochs, rows_a_forward=2 * max_batch_size,
                                   steps=epochs * steps_per_epoch))
        return
    parallel.start(seed=seed)
    assemble.check_save_dir(save_dir, ckpt_dir)
    model = assemble.load_verifier(ckpt_dir, dtype=torch.float32, from_solver=True)
    assemble.set_score(model, score=score)
    assemble.put_lora_on(model, lora, seed)
    log = RunLog(save_dir, flags)
    log.logger.info("%d pairs (%d too long, dropped), %d held out", len(data.pairs), data.dropped, len(held.pairs))
    loop = TrainLoop(model, log, lr=lr, total_steps=steps_per_epoch * epochs, warmup_ratio=warmup_ratio,
                     weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    model.train()
    log.progress(steps_per_epoch * epochs, "step")
    for epoch, number, batches in data.steps(batching, packing=packing, epochs=epochs):
        normaliser = n_pairs(batches)
        for batch in batches:
            loop.backward(pairwise_loss(model, batch.to(parallel.device()), normaliser))
        report = loop.step()
        log.metrics(number, epoch=epoch, **report._asdict(), pairs=normaliser)
        log.advance(tokens=sum(batch.tokens.numel() for batch in batches), loss=report.loss)
        if number % steps_per_epoch:
            continue
        held_report = evaluate_pairs(model, held, max_batch_size)
        log.metrics(loop.steps, epoch=epoch, **held_report._asdict())
        log.logger.info("epoch %d: held-out pair accuracy %.3f", epoch, held_report.held_out_accuracy)
        assemble.set_score(model, score_mean=held_report.score_mean, score_std=held_report.score_std)
        assemble.save_model(model, f"{save_dir}/epoch-{epoch}", ckpt_dir, save_dtype, lora, tokenizer_file)
    assemble.publish(f"{save_dir}/epoch-{epochs}", save_dir)
    log.close_progress()
    log.logger.info("saved %s", save_dir)


if __name__ == "__main__":
    cli.run(main)
