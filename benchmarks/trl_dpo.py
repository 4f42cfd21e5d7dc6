"""trl's trainers on rows that are token ids already, in their order: what our preference training is held against."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from benchmarks.trl_common import words

Row = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected


class AsGiven(DPOTrainer):
    """Rows in the order given; `losses` holds that of every step."""

    def __init__(self, *given: object, **options: object) -> None:
        self.losses: list[float] = []
        super().__init__(*given, **options)

    def _prepare_dataset(self, dataset: object, *_: object) -> object:
        return dataset

    def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, *given: object, **options: object) -> torch.Tensor:
        """trl's loss, noted."""
        loss = super().compute_loss(*given, **options)
        self.losses.append(loss.item())
        return loss


def trainer(
    model: PreTrainedModel,
    rows: Sequence[Row],
    folder: Path,
    *,
    pairs_a_step: int,
    lr: float,
    beta: float,
    callbacks: Sequence[TrainerCallback] = (),
    logging: bool = False,
    bf16: bool = False,
) -> AsGiven:
    """A trainer of one epoch on the CPU with the settings that ours has, at a constant rate. bf16: under autocast.

    The reference's log-probs are computed before the first step. The tokenizer is one that nothing is tokenised with.
    """
    settings = DPOConfig(
        **_settings(folder, pairs_a_step, lr, logging) | {"bf16": bf16}, beta=beta, precompute_ref_log_probs=True,
        max_length=None,
    )
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return AsGiven(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list([dict(zip(names, row, strict=True)) for row in rows]),
        processing_class=words(2),
        callbacks=list(callbacks),
    )


def _settings(folder: Path, rows_a_step: int, lr: float, logging: bool) -> dict[str, object]:
    return {
        "output_dir": str(folder / "trl"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": rows_a_step,
        "num_train_epochs": 1,
        "learning_rate": lr,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_strategy": "steps" if logging else "no",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


class KTOAsGiven(KTOTrainer):
    """Rows in the order given, each with the mismatched response that it brings."""

    def _prepare_dataset(self, dataset: object, *_: object) -> object:
        return dataset


def kto_trainer(
    model: PreTrainedModel, rows: Sequence[Mapping[str, object]], folder: Path, *, rows_a_step: int, lr: float,
    **options: float,
) -> KTOAsGiven:
    """The same of KTO. rows: prompt_ids, completion_ids, KL_completion_ids, label; options: beta and the weights."""
    settings = KTOConfig(**_settings(folder, rows_a_step, lr, True), precompute_ref_log_probs=True, max_length=None,
                         train_sampling_strategy="sequential", **options)
    return KTOAsGiven(model=model, args=settings, train_dataset=Dataset.from_list(list(rows)),
                      processing_class=words(2))
