"""trl's SFTTrainer on rows that are token ids already, in their order."""

from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from benchmarks.paired import Watch
from benchmarks.trl_common import Clock, words


def train(
    model: PreTrainedModel, rows: Sequence[dict[str, list[int]]], folder: Path, watch: Watch, *, rows_a_step: int,
    max_length: int, packing: bool, bf16: bool, lr: float,
) -> None:
    """One epoch on the CPU. The watch's work is the tokens that are learnt; packed rows count as one of rows_a_step."""

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, model: object, inputs: dict[str, torch.Tensor], **options: object) -> torch.Tensor:
            watch.work.append(int((inputs["labels"][:, 1:] != -100).sum()))
            loss = super().compute_loss(model, inputs, **options)
            watch.losses.append(loss.item())
            return loss

    settings = SFTConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=bf16, fp16=False, gradient_checkpointing=False,
        per_device_train_batch_size=rows_a_step, num_train_epochs=1, learning_rate=lr, lr_scheduler_type="constant",
        warmup_steps=0, adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0, packing=packing, max_length=max_length,
        logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True, dataloader_num_workers=0,
    )
    InOrder(
        model=model, args=settings, train_dataset=Dataset.from_list(list(rows)), callbacks=[Clock(watch)],
        processing_class=words(2),
    ).train()
