"""One optimizer's life: accumulate, guard, clip, step, schedule. Every trainer drives its model through this."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from src import parallel
from src.checkpoint import shards
from src.errors import UserError
from src.models.decoder import Decoder
from src.runlog import RunLog

MAX_BAD_STEPS = 5  # non-finite steps in a row after which training cannot be saved


class StepReport(NamedTuple):
    """What one optimizer step did."""

    loss: float
    grad_norm: float
    lr: float


class TrainLoop:
    """AdamW over a model's trainable parameters with warm-up, cosine decay and true global-norm clipping.

    backward() any number of times, then step(). Losses must already be divided by the count over the whole
    step (all micro-batches), so the update does not depend on how a step is cut into micro-batches.
    """

    def __init__(
        self,
        model: Decoder,
        log: RunLog,
        *,
        lr: float,
        total_steps: int,
        warmup_ratio: float = 0.03,
        min_lr_ratio: float = 0.1,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
    ) -> None:
        self.model, self.log = model, log
        self.total_steps, self.warmup_steps = total_steps, math.ceil(warmup_ratio * total_steps)
        self.max_lr, self.min_lr_ratio, self.max_grad_norm = lr, min_lr_ratio, max_grad_norm
        self.steps = 0
        self._loss = 0.0
        self._bad_steps = 0
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        n, rank = parallel.tensor_parallel_size(), parallel.tensor_parallel_rank()
        self._copies = [
            (p, shards.copies(shards.cut_of(name, model.config, n), rank)) for name, p in trainable
        ]
        matrices = [p for _, p in trainable if p.dim() > 1]
        vectors = [p for _, p in trainable if p.dim() <= 1]  # norms are not decayed
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=lr,
            betas=(0.9, 0.95),
        )

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient."""
        loss.backward()
        self._loss += loss.item()

    def step(self) -> StepReport:
        """Clip, update, advance the schedule. A non-finite step is skipped and reported; several end the run."""
        lr = self.max_lr * lr_factor(self.steps, self.total_steps, self.warmup_steps, self.min_lr_ratio)
        grad_norm = self._clip()
        loss, self._loss = self._loss, 0.0
        if math.isfinite(grad_norm) and math.isfinite(loss):
            self._bad_steps = 0
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        else:
            self._bad_steps += 1
            self.log.logger.warning("step %d skipped: loss %s, gradient norm %s", self.steps, loss, grad_norm)
            if self._bad_steps == MAX_BAD_STEPS:
                raise UserError(
                    f"{MAX_BAD_STEPS} steps in a row had a non-finite loss or gradient; "
                    f"lower the learning rate or look for broken rows in the data"
                )
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return StepReport(loss, grad_norm, lr)

    def _clip(self) -> float:
        """Scale gradients to the maximum global norm; the norm before scaling, alike on every rank."""
        norm = math.sqrt(parallel.sum_over_tensor_parallel(_sum_of_squares(self._copies)).item())
        if norm > self.max_grad_norm:
            for parameter, _ in self._copies:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.max_grad_norm / norm)
        return norm


def _sum_of_squares(parameters: list[tuple[nn.Parameter, int]]) -> Tensor:
    """This rank's part of the sum of squared gradient entries, float32: what several ranks hold counts once."""
    total = torch.zeros((), device=parallel.device())
    for parameter, copies in parameters:
        if parameter.grad is not None:
            total += parameter.grad.float().square().sum() / copies
    return total


def lr_factor(step: int, total_steps: int, warmup_steps: int, min_ratio: float) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then cosine down to min_ratio at the last step."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
