"""The softmax over a vocabulary whose logits lie on several ranks: log-probs and entropy, nothing gathered.

N rows, P vocabulary rows on this rank
"""

import torch
from torch import Tensor

from src.parallel import (
    max_over_tensor_parallel,
    sum_over_tensor_parallel,
    tensor_parallel_rank,
    tensor_parallel_size,
)


class _VocabLogprobs(torch.autograd.Function):
    """log softmax at one id a row, computed from vocabulary slices: two small all-reduces, nothing gathered."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local_logits: Tensor, targets: Tensor) -> Tensor:
        """[N, P] float32, [N] int64 global ids -> [N], nats."""
        local = local_logits.log_softmax(-1)  # [N, P], over this rank's slice; one fused pass
        index = targets - tensor_parallel_rank() * local.shape[-1]
        here = (index >= 0) & (index < local.shape[-1])
        index = index.clamp(0, local.shape[-1] - 1)
        of_slice = _slice_logprob(local_logits[:, 0] - local[:, 0])  # log of this slice's probability
        logprobs = sum_over_tensor_parallel(
            (local.gather(-1, index[:, None])[:, 0] + of_slice).masked_fill(~here, 0.0)  # -inf in padding
        )
        ctx.save_for_backward(local, of_slice, index, here)
        return logprobs

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        """[N] -> [N, P]: one-hot minus the softmax, times grad."""
        local, of_slice, index, here = ctx.saved_tensors
        grad_logits = local.exp().mul_(-(grad * of_slice.exp())[:, None])
        grad_logits.scatter_add_(-1, index[:, None], (grad * here)[:, None])
        return grad_logits, None


def _slice_logprob(log_normaliser: Tensor) -> Tensor:
    """log of the probability that lies in this rank's vocabulary slice, from its own log-sum-exp. [N] -> [N]."""
    if tensor_parallel_size() == 1:
        return torch.zeros_like(log_normaliser)
    highest = max_over_tensor_parallel(log_normaliser.clone())
    total = sum_over_tensor_parallel((log_normaliser - highest).exp())
    return log_normaliser - highest - total.log()


def vocab_logprobs(local_logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of one id a row under a vocabulary-parallel softmax.

    local_logits [N, P] (any float dtype), targets [N] int64 global ids -> [N] float32, nats. Differentiable.
    """
    return _VocabLogprobs.apply(local_logits.float(), targets)


class _VocabEntropy(torch.autograd.Function):
    """Entropy of a vocabulary-parallel softmax; its gradient -p (log p + H) needs no communication."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local_logits: Tensor) -> Tensor:
        """[N, P] float32 -> [N], nats."""
        local = local_logits.log_softmax(-1)  # [N, P]
        local += _slice_logprob(local_logits[:, 0] - local[:, 0])[:, None]
        local.clamp_min_(torch.finfo(local.dtype).min)  # -inf, an id that cannot be, times its probability 0 is 0
        entropy = -sum_over_tensor_parallel((local.exp() * local).sum(-1))
        ctx.save_for_backward(local, entropy)
        return entropy

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        """[N] -> [N, P]."""
        local, entropy = ctx.saved_tensors
        return -grad[:, None] * local.exp() * (local + entropy[:, None])


def vocab_entropy(local_logits: Tensor) -> Tensor:
    """Entropy of the vocabulary-parallel softmax. [N, P] -> [N] float32, nats. Differentiable."""
    return _VocabEntropy.apply(local_logits.float())
