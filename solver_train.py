"""Fine-tune a solver on instruction/output pairs, full or LoRA.

torchrun --nproc_per_node 8 solver_train.py --ckpt_dir ckpt/8 --save_dir out --train_file dataset/GSM8K/train.json
"""

from dataclasses import dataclass
from typing import Literal

from src import load, parallel, runlog
from src.command import cli
from src.command.config import TrainConfig, flag
from src.data.encoding import masked_text
from src.data.examples import read_instructions
from src.planning import plan
from src.runlog import RunLog
from src.training.run import Run
from src.training.sft import n_supervised, sft_dataset, sft_loss, validation_loss


@dataclass(frozen=True, kw_only=True)
class SolverTrainConfig(TrainConfig):
    """Supervised fine-tuning"""

    train_file: str = flag(help="""json array, jsonl, parquet or a saved datasets directory of {"instruction",
        "output": text or list of texts} or {"messages": [{"role", "content"}, ...]}, where every answer of
        the assistant is learnt, and a content may be a list of blocks of text, code and execution
        (dataset/README.md)""")
    eval_file: str = flag("", """rows of the same form whose loss is measured while training; the best
        checkpoint by it is kept as best""")
    loss_on: Literal["assistant_no_execution", "assistant", "all"] = flag("assistant_no_execution", """the
        tokens to learn: the assistant's without what its code printed, all of the assistant's, or every
        one""")
    truncation: Literal["error", "drop", "left", "right"] = flag("drop", """for longer rows, counted: drop
        them; cut the prompt's left or the output's right; or end with an error. More than 1% of the outputs
        dropped or cut is an error always""")

    def __post_init__(self) -> None:
        """Raise UserError for a measurement of rows that are not given."""
        super().__post_init__()
        if not self.eval_file:
            self.refuse(("eval_every",), "there is no --eval_file")


def main(config: SolverTrainConfig) -> None:
    """The loss is on outputs and their end only, a mean over the tokens of a whole step."""
    tokenizer = load.load_tokenizer(config.ckpt_dir, config)
    model_config = load.load_config(config.ckpt_dir, config.model_type, "solver")
    longest = load.context_limit(config.max_seq_len, config.ckpt_dir, model_config)
    run = Run(config, "solver_train", tokenizer, model_config)
    data, held_out = (sft_dataset(read_instructions(file, config.renamed), tokenizer, max_seq_len=longest, source=file,
                                  truncation=config.truncation, loss_on=config.loss_on, keep=run.keep(name))
                      if file else None for name, file in (("train", config.train_file), ("eval", config.eval_file)))
    run.begin(data)
    if config.dry_run:
        runlog.table(plan.training(config, model_config, run.planned_steps(data), data.samples, tokenizer,
                                   run.sampler.ranks))
        return
    model = load.load_solver(config.ckpt_dir, precision=config.precision, trained=run.trained,
                             quantize=config.quantize)
    log = RunLog(config.save_dir, config.flags(), trackers=config.trackers)
    log.logger.info("%s", data.report)
    log.logger.info("first example: %s", masked_text(data.samples[0][0], tokenizer))
    run.open(model, log)

    for step in run.steps(data):
        # A mean over the tokens of all micro-batches and ranks: how a step is cut up does not change its update
        n_tokens = parallel.sum_over_data_parallel(n_supervised(step.batches))
        for batch in step.batches:
            loss = sft_loss(model, batch) / n_tokens
            run.trainer.backward(loss, last=batch is step.batches[-1])
        run.log_step(step, run.trainer.step(), n_tokens, supervised_tokens=n_tokens)
        score = None
        if held_out and run.is_eval_due(step):
            eval_loss = validation_loss(model, held_out, run.sampler, packing=config.packing)
            log.metrics(step.number, epoch=step.epoch, eval_loss=eval_loss)
            score = -eval_loss
        run.checkpointer.step_done(step.number, score)
    run.checkpointer.finish()


if __name__ == "__main__":
    cli.run(main)
