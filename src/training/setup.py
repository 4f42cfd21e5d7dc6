"""What the trainers that go over the rows of a file set up alike: how rows become steps, the run."""

from collections.abc import Mapping
from functools import partial

from src import load, parallel
from src.checkpoint import saving
from src.config import TrainConfig
from src.data.batches import Batching
from src.models.decoder import Decoder
from src.runlog import RunLog
from src.training.checkpointer import Checkpointer, Trainee
from src.training.resuming import find_start, run_facts
from src.training.trainer import Trainer


def open_batching(config: TrainConfig) -> Batching:
    """How rows become steps on the ranks that run. Raises UserError for ranks that cannot share the model."""
    n = load.tensor_parallel_size(config.ckpt_dir, config.tensor_parallel_size)
    return Batching(max_batch_size=config.max_batch_size, accumulation_steps=config.accumulation_steps,
                    seed=config.seed, rank=parallel.rank() // n, ranks=parallel.world_size() // n)  # fmt: skip


def start(
    config: TrainConfig, trainer: str, batching: Batching, n_rows: int, total_steps: int, **derived: object
) -> dict[str, object]:
    """Start the ranks. Returns what the run is known by; derived: values that flags left to something else.

    Raises UserError for a save_dir that would overwrite what the run reads, or that holds another run.
    """
    parallel.start(config.seed, load.tensor_parallel_size(config.ckpt_dir, config.tensor_parallel_size))
    saving.check_save_dir(config.save_dir, config.ckpt_dir)
    facts = run_facts(trainer, config.flags(), rows=n_rows, rows_a_step=batching.rows_a_step,
                      precision=str(parallel.compute_dtype(config.precision)), **derived)
    find_start([config.save_dir], config.resume, facts, total_steps)
    return facts


def open_run(
    config: TrainConfig, model: Decoder, log: RunLog, batching: Batching, n_rows: int, total_steps: int,
    facts: Mapping[str, object],
) -> tuple[Trainer, Checkpointer]:  # fmt: skip
    """Give the model its adapters, an optimizer and a place to be saved. facts: those of start()."""
    lora = load.lora_config(config, config.lora_dropout)
    load.put_lora_on(model, lora, config.seed)
    trainer = Trainer(model, log, config, total_steps=total_steps, optimizer=config.optimizer)
    begin_save = partial(saving.begin_save, model, ckpt_dir=config.ckpt_dir, dtype=config.save_dtype, lora=lora,
                         tokenizer_file=config.tokenizer_file, background=config.background_save)  # fmt: skip
    checkpointer = Checkpointer(log, [Trainee(config.save_dir, trainer, begin_save)], config,
                                steps_per_epoch=batching.steps_per_epoch(n_rows), total_steps=total_steps,
                                facts=facts)  # fmt: skip
    model.train()
    return trainer, checkpointer
