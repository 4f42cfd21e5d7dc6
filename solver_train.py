"""Fine-tune a solver on instruction/output pairs, full or LoRA.

torchrun --nproc_per_node 8 solver_train.py --ckpt_dir ckpt/8 --save_dir out --train_file dataset/GSM8K/train.json
"""

from typing import Literal

import torch

from src import assemble, cli, parallel, plan, runlog
from src.data.batches import Batching
from src.data.examples import read_instructions
from src.memory import Training
from src.runlog import RunLog
from src.training.loop import TrainLoop
from src.training.meter import Meter
from src.training.resuming import find_start, run_facts
from src.training.saver import Saver, Trained
from src.training.solver import SolverData, n_supervised, sft_loss, validation_loss


def main(
    ckpt_dir: str, save_dir: str, train_file: str, eval_file: str = "", model_type: str = "", tokenizer_file: str = "",
    chat_template: str = "",
    loss_on: Literal["assistant_no_execution", "assistant", "all"] = "assistant_no_execution",
    max_seq_len: int = -1, truncation: Literal["error", "drop", "left", "right"] = "drop",
    max_batch_size: int = 1, accumulation_steps: int = 1, packing: bool = True, epochs: int = 1, max_steps: int = -1,
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw", lr: float = 1e-5,
    schedule: Literal["cosine", "linear", "constant"] = "cosine", warmup_ratio: float = 0.03,
    min_lr_ratio: float = 0.1, weight_decay: float = 0.0, max_grad_norm: float = 1.0,
    activation_checkpointing: Literal["none", "selective", "full"] = "none", tensor_parallel_size: int = -1,
    lora_rank: int = -1, lora_alpha: float = 16.0, lora_dropout: float = 0.0,
    lora_targets: list[str] = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"],  # noqa: B006 (shown by --help, never changed)
    quantize: Literal["", "bfloat16", "int8", "int4"] = "",
    eval_every: int = -1, save_every: int = -1, keep_last: int = 1, background_save: bool = False,
    resume: Literal["none", "auto"] = "none",
    save_dtype: Literal["", "float32", "bfloat16", "float16"] = "", seed: int = 1, wandb: str = "",
    dry_run: bool = False,
) -> None:
    """Supervised fine-tuning; the loss is on outputs and their EOS only.

    ckpt_dir: checkpoint directory to start from
    save_dir: directory for epoch-N checkpoints, the final checkpoint, metrics.jsonl and run.json
    train_file: json array, jsonl, parquet or a saved datasets directory of {"instruction", "output": text or list of
        texts} or {"messages": [{"role", "content"}, ...]}, where every answer of the assistant is learnt, and a
        content may be a list of blocks of text, code and execution (dataset/README.md)
    eval_file: rows of the same form whose loss is measured while training; the best checkpoint by it is kept as best
    model_type: a family or released size the checkpoint must agree with; default: what params.json says
    tokenizer_file: tokenizer file of any kind; default: the one in ckpt_dir
    chat_template: form of prompts and outputs: none, file (the tokenizer's own) or llama-2, llama-3, mistral, qwen,
        deepseek, gemma, internlm2, or code (solutions with code); recorded for later commands; default: what
        ckpt_dir was trained with, else none
    loss_on: the tokens to learn: the assistant's without what its code printed, all of the assistant's, or every one
    max_seq_len: longest prompt + output in tokens, at most the model's context; -1 = 512, or that if it is less
    truncation: for longer rows, counted: drop them; cut the prompt's left or the output's right; or end with an error.
        More than 1% of the outputs dropped or cut is an error always
    max_batch_size: rows in one forward pass
    accumulation_steps: forward passes in one optimizer step
    packing: lay the rows of a forward pass end to end instead of padding them; the update is the same
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
    quantize: under LoRA hold the frozen weights in bfloat16, or in 8 or 4 bits in groups of 128 or 32 that share a
        scale; adapters stay float32. Default: float32
    eval_every: steps between measurements on eval_file; -1 = after each epoch
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
    config = assemble.load_config(ckpt_dir, model_type, "solver")
    tokenizer = assemble.load_tokenizer(ckpt_dir, tokenizer_file, chat_template)
    longest = assemble.context_limit(max_seq_len, ckpt_dir, config)
    data, held = (SolverData(read_instructions(file), tokenizer, max_seq_len=longest, truncation=truncation,
                             loss_on=loss_on, source=file) if file else None for file in (train_file, eval_file))
    lora = assemble.lora_config(lora_rank, lora_alpha, lora_dropout, lora_targets)
    assemble.check_quantize(quantize, lora)
    n_ranks = assemble.tensor_parallel_size(ckpt_dir, tensor_parallel_size)
    batching = Batching(max_batch_size=max_batch_size, accumulation_steps=accumulation_steps, seed=seed,
                        rank=parallel.rank() // n_ranks, ranks=parallel.world_size() // n_ranks)
    steps_per_epoch = batching.steps_per_epoch(len(data.rows))
    total_steps = min(epochs * steps_per_epoch, max_steps if max_steps >= 0 else epochs * steps_per_epoch)
    if dry_run:
        examples = [encoded for row in data.rows for encoded in row]
        how = Training(lora, quantize, activation_checkpointing, batching.ranks, accumulation_steps > 1,
                       parallel.device().type == "cuda", optimizer)
        largest = data.largest_pass(batching, packing=packing, epochs=epochs, stop=total_steps)
        runlog.table(plan.training(config, assemble.planned_ranks(ckpt_dir, tensor_parallel_size), how, largest,
                                   examples, tokenizer, epochs=epochs, steps=total_steps))
        return
    parallel.start(seed, n_ranks)
    assemble.check_save_dir(save_dir, ckpt_dir)
    facts = run_facts("solver_train", flags, rows=len(data.rows), rows_a_step=batching.rows_a_step,
                      chat_template=tokenizer.chat_template)
    find_start([save_dir], resume, facts, total_steps)
    model = assemble.load_solver(ckpt_dir, dtype=None if quantize else torch.float32, quantize=quantize)
    assemble.set_chat_template(model, tokenizer)
    assemble.put_lora_on(model, lora, seed)
    log = RunLog(save_dir, flags, wandb=wandb)
    log.logger.info("%s", data.report)
    log.logger.info("first example: %s", plan.masked_text(data.rows[0][0], tokenizer))
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
    steps = data.steps(batching, packing=packing, epochs=epochs, done=done, stop=total_steps)
    for epoch, number, batches in meter.timed(steps):
        normaliser = parallel.sum_over_data_parallel(n_supervised(batches))
        for batch in batches:
            loop.backward(sft_loss(model, batch.to(parallel.device()), normaliser), last=batch is batches[-1])
        report = loop.step()
        measured = meter.measure(batches, normaliser)
        log.metrics(number, epoch=epoch, **report._asdict(), supervised_tokens=normaliser, **measured)
        log.advance(tokens=int(measured["tokens"]), loss=report.loss)
        score = None
        if held and (number == total_steps or number % (eval_every if eval_every >= 0 else steps_per_epoch) == 0):
            eval_loss = validation_loss(model, held, batching, packing=packing)
            log.metrics(number, epoch=epoch, eval_loss=eval_loss)
            score = -eval_loss
        saver.step_done(number, score)
    saver.finish()


if __name__ == "__main__":
    cli.run(main)
