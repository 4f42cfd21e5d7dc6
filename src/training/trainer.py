"""One optimizer's life: accumulate, guard, clip, step, schedule, and come back from a checkpoint.

Every trainer drives its model through this. Losses must already be divided by the count over the whole step (all
micro-batches of all data-parallel ranks), so the update does not depend on how a step is cut up.
"""

import contextlib
import functools
import math
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from src import parallel
from src.checkpoint import shards
from src.checkpoint.foreign_config import left_out_in_training
from src.checkpoint.saving import MASTER, MOMENTS, TrainerState
from src.command.config import OptimizerFlags, Recomputed, Schedule
from src.errors import UserError
from src.models.cache import Cache
from src.models.decoder import Decoder
from src.processes import heap, watchdog
from src.runlog import RunLog
from src.training.optimizers import AdamW, AdamWIn8Bits, LazyTensors, OptimizerName

MAX_BAD_STEPS = 5  # non-finite steps in a row after which training cannot be saved

# float16 has no numbers below 6e-8: losses are scaled up by as much as gradients allow (Micikevicius et al. 2018)
FIRST_LOSS_SCALE, STEPS_TO_DOUBLE = 2**16, 2000  # PyTorch's GradScaler has the same


class StepReport(NamedTuple):
    """What one optimizer step did: the loss and gradient norm over all ranks, and the learning rate."""

    loss: float
    grad_norm: float
    lr: float


class Trainer:
    """AdamW over a model's trainable parameters with warm-up, decay and true global-norm clipping.

    backward() any number of times, then step(). All ranks must call both equally often. Once it is made the
    parameters belong to it: they are shared over the data-parallel ranks.
    """

    def __init__(
        self, model: Decoder, log: RunLog, flags: OptimizerFlags, *, total_steps: int,
        lr: float | None = None, adam_eps: float = 1e-8, optimizer: OptimizerName = "adamw",
    ) -> None:
        """lr: the peak rate where it is not flags.lr, as for a critic."""
        self.model, self.log, self.flags = model, log, flags
        if left_out := left_out_in_training(model.config):
            log.logger.warning("%s of the model's config.json: transformers would train so, here the model learns "
                               "without it", ", ".join(left_out))
        self.total_steps, self.warmup_steps = total_steps, math.ceil(flags.warmup_ratio * total_steps)
        self.max_lr = flags.lr if lr is None else lr
        self.steps = self._updates = self._bad_steps = 0
        self._loss_scale, self._scaled_steps = FIRST_LOSS_SCALE if model.dtype == torch.float16 else 1, 0
        # in float64: the same sum, however many passes a step is cut into
        self._loss = torch.zeros((), dtype=torch.float64, device=parallel.device())
        # compiled first, shared last: FSDP's hooks then stay outside of what is compiled
        if flags.compile:
            compile_blocks(model)
        checkpoint_activations(model, flags.activation_checkpointing)
        parallel.shard_over_data_parallel(model, model.layers, model.dtype)
        # after they are shared: the optimizer holds moments of this rank's parts alone
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        n, rank = parallel.tensor_parallel_size(), parallel.tensor_parallel_rank()
        # how many ranks hold the same parameter: its gradient counts once in the norm
        self._copies = [parallel.replicas() * shards.copies(shards.cut_of(name, model.config, n), rank)
                        for name in self._trainable]
        matrices = [p for p in self._trainable.values() if p.dim() > 1]
        vectors = [p for p in self._trainable.values() if p.dim() <= 1]  # norms are not decayed
        groups = [{"params": matrices, "weight_decay": flags.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        kind = AdamWIn8Bits if optimizer == "adamw_8bit" else AdamW
        self.optimizer = kind([group for group in groups if group["params"]], adam_eps)
        self._heap = heap.HeapTrimmer()
        self._seed_step()

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradient of a micro-batch's loss []. Data-parallel ranks exchange gradients in a step's `last`."""
        parallel.communicate_gradients(self.model, last)
        (self._loss_scale * loss).backward()
        self._loss += loss.detach()  # read in step(): to read it here would be to wait for the device

    def step(self) -> StepReport:
        """Clip, update, advance the schedule. A non-finite step is skipped and reported; several end the run."""
        lr = self.max_lr * lr_factor(
            self.steps, self.total_steps, self.warmup_steps, self.flags.min_lr_ratio, self.flags.schedule)
        loss, grad_norm = self._reduce()
        # both are sums over all ranks: all take the same way here
        if math.isfinite(grad_norm) and math.isfinite(loss):
            self._bad_steps = 0
            # down to the maximal norm, and back by what the loss was scaled up
            factor = min(1.0, self.flags.max_grad_norm / max(grad_norm, 1e-30)) / self._loss_scale
            for parameter in self._trainable.values() if factor != 1 else ():
                if parameter.grad is not None:
                    parallel.local(parameter.grad).mul_(factor)
            self.optimizer.step(lr)
            self._updates += 1
            self._scaled_steps += 1
            if self.model.dtype == torch.float16 and self._scaled_steps % STEPS_TO_DOUBLE == 0:
                self._loss_scale *= 2
        elif self._loss_scale > 1 and math.isfinite(loss):
            self._loss_scale, self._scaled_steps = self._loss_scale // 2, 0
            self.log.logger.info("step %d skipped: gradients left float16's range; the loss is scaled by %d now",
                                 self.steps, self._loss_scale)
        else:
            self._bad_steps += 1
            self.log.logger.warning("step %d skipped: loss %s, gradient norm %s", self.steps, loss, grad_norm)
            if self._bad_steps == MAX_BAD_STEPS:
                raise UserError(f"{MAX_BAD_STEPS} steps in a row had a non-finite loss or gradient; lower the learning "
                                "rate or look for broken rows in the data")
        self.optimizer.zero_grad()
        self._loss.zero_()
        if parallel.device().type == "cpu":
            self._heap.after_step()
        self.steps += 1
        watchdog.at_step(self.steps)
        self._seed_step()
        return StepReport(loss, grad_norm, lr)

    def set_step(self, step: int) -> None:
        """Let the next step be this one of the schedule, where fewer were done than it counted on."""
        self.steps = step
        self._seed_step()

    def _reduce(self) -> tuple[float, float]:
        """Loss and gradient norm over all ranks, in one all-reduce; alike on every rank.

        The loss is summed over data-parallel ranks. The squares of the gradient are summed over all: what several
        tensor-parallel ranks or replicas hold counts once.
        """
        squares = torch.zeros((), dtype=torch.float64, device=parallel.device())
        for parameter, copies in zip(self._trainable.values(), self._copies, strict=True):
            if parameter.grad is not None:
                norm = torch.linalg.vector_norm(parallel.local(parameter.grad), dtype=torch.float32)
                # squared in float64: with the loss scaled up a square may leave float32's range
                squares += (norm.double() / self._loss_scale).square() / copies
        sums = parallel.sum_over_all(torch.stack((self._loss / parallel.ranks_per_batch(), squares)))
        loss, norm = torch.stack((sums[0], sums[1].sqrt())).tolist()
        return loss, norm

    def _seed_step(self) -> None:
        """Make every random draw of the next step (dropout) a pure function of (seed, step, tensor-parallel group)."""
        place = f"{self.flags.seed}/{self.steps}/{parallel.rank() // parallel.tensor_parallel_size()}"
        parallel.seed_all(random.Random(place).getrandbits(63))

    def state(self) -> TrainerState:
        """What a checkpoint must hold besides the weights. Tensors are parts of this rank, made as they are asked for.
        Random states are not among it: they follow from the seed and the step."""
        makers: dict[str, Callable[[], Tensor]] = {}
        for name, parameter in self._trainable.items():
            for moment in MOMENTS:
                makers[f"{name}/{moment}"] = functools.partial(self.optimizer.moment, parameter, moment)
            makers[f"{name}/{MASTER}"] = functools.partial(torch.Tensor.detach, parameter)
        counts = {"steps": self.steps, "updates": self._updates, "bad_steps": self._bad_steps,
                  "loss_scale": self._loss_scale, "scaled_steps": self._scaled_steps}
        return TrainerState(LazyTensors(makers), counts)

    def load(self, counts: dict[str, int], read: Callable[[str], Tensor]) -> None:
        """Take up what state() gave. read(name): a tensor [...] of this tensor-parallel rank, whole over dp ranks."""
        self.steps, self._updates, self._bad_steps = (counts[k] for k in ("steps", "updates", "bad_steps"))
        if self._loss_scale > 1:
            self._loss_scale, self._scaled_steps = counts["loss_scale"], counts["scaled_steps"]
        for name, parameter in self._trainable.items():
            with torch.no_grad():
                parallel.local(parameter).copy_(parallel.rows_like(read(f"{name}/{MASTER}"), parameter))
            if self._updates:
                moments = {moment: parallel.part_like(read(f"{name}/{moment}"), parameter) for moment in MOMENTS}
                self.optimizer.load(parameter, self._updates, moments)
        watchdog.at_step(self.steps)
        self._seed_step()


@contextlib.contextmanager
def evaluating(model: Decoder) -> Iterator[None]:
    """Evaluate a model that is being trained: no gradients, no dropout, and no gathered weights left afterwards."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(was_training)
    parallel.free_gathered(model)


def compile_blocks(model: Decoder) -> None:
    """Let blocks run compiled, for any number of tokens; eagerly where a cache is read, whose rows come and go.

    In half precision compiled code rounds where eager code does: PPO compares what it computes with a gradient with
    what it has computed without, for which the compiler joins other operations.
    """
    for layer in model.layers:
        compiled = torch.compile(layer.forward, dynamic=True, options={"emulate_precision_casts": True})
        layer.forward = functools.partial(_forward, layer.forward, compiled)


def _forward(
    eager: Callable[..., Tensor], compiled: Callable[..., Tensor], *inputs: object, cache: Cache | None = None
) -> Tensor:
    """A block's forward() in one of two ways. -> hidden states, of the shape of the first input [B, S, D]."""
    return compiled(*inputs, None) if cache is None else eager(*inputs, cache)


def checkpoint_activations(model: Decoder, kind: Recomputed) -> None:
    """Let the backward pass compute again what blocks (full) or their feed-forward halves (selective) produced."""
    for layer in model.layers if kind != "none" else ():
        module = layer if kind == "full" else layer.feed_forward
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def lr_factor(step: int, total_steps: int, warmup_steps: int, min_ratio: float, schedule: Schedule = "cosine") -> float:
    """Share of the peak learning rate at a step: linear warm-up, then down to min_ratio at the last step. The way down
    is a cosine or a line; a constant schedule stays at the peak."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps  # above 0 at the first step, which then learns
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return min_ratio + (1 - min_ratio) * left[schedule]
