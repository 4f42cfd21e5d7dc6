"""Fine-tune a solver on instruction/output pairs, full or LoRA.

torchrun --nproc_per_node 8 solver_train.py --ckpt_dir ckpt/8 --save_dir out --train_file dataset/GSM8K/train.json
"""

from typing import Literal

import torch

from src import assemble, cli, parallel, plan, runlog
from src.data.batches import Batching
from src.data.examples import read_instructions
from src.runlog import RunLog
from src.training.loop import TrainLoop
from src.training.solver import SolverData, n_supervised, sft_loss


def main(
    ckpt_dir: str, save_dir: str, train_file: str, model_type: str = "", tokenizer_file: str = "",
    max_seq_len: int = 512, max_batch_size: int = 1, accumulation_steps: int = 1, packing: bool = False,
    epochs: int = 1, lr: float = 1e-5, warmup_ratio: float = 0.03,
    weight_decay: float = 0.0, max_grad_norm: float = 1.0,
    lora_rank: int = -1, lora_alpha: float = 16.0, lora_dropout: float = 0.0,
    lora_targets: list[str] = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"],  # noqa: B006 (shown by --help, never changed)
    save_dtype: Literal["", "float32", "bfloat16", "float16"] = "", seed: int = 1, dry_run: bool = False,
) -> None:
    """Supervised fine-tuning; the loss is on outputs and their EOS only.

    ckpt_dir: checkpoint directory to start from
    save_dir: directory for epoch-N checkpoints, the final checkpoint, metrics.jsonl and run.json
    train_file: json array or jsonl of {"instruction", "output": text or list of texts}
    model_type: a family or released size the checkpoint must agree with; default: what params.json says
    tokenizer_file: sentencepiece model; default: the one in ckpt_dir
    max_seq_len: longest prompt + output in tokens; longer rows are dropped and counted, more than 1% is an error
    max_batch_size: rows in one forward pass
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
    config = assemble.load_config(ckpt_dir, model_type)
    tokenizer = assemble.load_tokenizer(ckpt_dir, tokenizer_file)
    data = SolverData(read_instructions(train_file), tokenizer, max_seq_len=max_seq_len, source=train_file)
    lora = assemble.lora_config(lora_rank, lora_alpha, lora_dropout, lora_targets)
    batching = Batching(max_batch_size=max_batch_size, accumulation_steps=accumulation_steps, seed=seed)
    steps_per_epoch = batching.steps_per_epoch(len(data.rows))
    if dry_run:
        examples = [encoded for row in data.rows for encoded in row]
        runlog.table(plan.training(config, assemble.n_shards(ckpt_dir), lora, examples, tokenizer, epochs=epochs,
                                   rows_a_forward=max_batch_size, steps=epochs * steps_per_epoch))
        return
    parallel.start(seed=seed)
    assemble.check_save_dir(save_dir, ckpt_dir)
    model = assemble.load_solver(ckpt_dir, dtype=torch.float32)
    assemble.put_lora_on(model, lora, seed)
    log = RunLog(save_dir, flags)
    log.logger.info("%d rows (%d too long, dropped)", len(data.rows), data.dropped)
    loop = TrainLoop(model, log, lr=lr, total_steps=steps_per_epoch * epochs, warmup_ratio=warmup_ratio,
                     weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    model.train()
    log.progress(steps_per_epoch * epochs, "step")
    for epoch, number, batches in data.steps(batching, packing=packing, epochs=epochs):
        normaliser = n_supervised(batches)
        for batch in batches:
            loop.backward(sft_loss(model, batch.to(parallel.device()), normaliser))
        report = loop.step()
        log.metrics(number, epoch=epoch, **report._asdict(), supervised_tokens=normaliser)
        log.advance(tokens=sum(batch.tokens.numel() for batch in batches), loss=report.loss)
        if number % steps_per_epoch == 0:
            assemble.save_model(model, f"{save_dir}/epoch-{epoch}", ckpt_dir, save_dtype, lora, tokenizer_file)
    assemble.publish(f"{save_dir}/epoch-{epochs}", save_dir)
    log.close_progress()
    log.logger.info("saved %s", save_dir)


if __name__ == "__main__":
    cli.run(main)
