"""Hidden states to log-probs and entropies, under a vocabulary whose rows lie on several ranks; nothing is gathered.

N response tokens, n of them in a chunk, D width, P vocabulary rows on this rank
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from src.models.linear import input_gradient, linear, rounded, weight_gradient
from src.parallel import (
    max_over_tensor_parallel,
    sum_over_tensor_parallel,
    tensor_parallel_rank,
    tensor_parallel_size,
)

# Logits of this many bytes are made at once. Each chunk adds a gradient of the whole output layer: few are faster, but
# on a CPU 192 MiB were no faster than 96.
CHUNK_BYTES = {"cpu": 96 * 2**20, "cuda": 512 * 2**20}
# Float32 bytes of logits whose softmax is taken at once: few stay in a CPU's cache.
SOFTMAX_BYTES = {"cpu": 2 * 2**20, "cuda": 512 * 2**20}

Entropy = Literal["none", "logged", "learned"]
Finish = Callable[[Tensor], Tensor]  # products of the output layer to logits, [n, P] float32 each


def output_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, finish: Finish, entropy: Entropy, *, summed: bool
) -> tuple[Tensor, Tensor]:
    """Log-probs of ids and entropies, empty if `none`; differentiable, the entropies if `learned`.

    hidden [N, D], weight [P, D], targets [N] int64 global ids -> [N], [N] float32, nats. summed: promises that all
    log-probs will have the same gradient.
    """
    gradient = "later" if torch.is_grad_enabled() else "never"
    # in float16 what is not yet scaled is too small: see Trainer
    known = (summed or not weight.requires_grad) and entropy != "learned" and hidden.dtype != torch.float16
    if known and gradient == "later":
        gradient = "now"
    return _OutputLogprobs.apply(hidden, weight, targets, finish, entropy, gradient)


class _OutputLogprobs(torch.autograd.Function):
    """One chunk of logits is made at a time, and becomes its own gradient in place.

    That happens `now`, in the forward pass, where the gradient is known but for factors that come later: of hidden
    states, or of a sum. Otherwise the first chunk is kept for the backward pass, and others are made again in it.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, weight: Tensor, targets: Tensor,
        finish: Finish, entropy: Entropy, gradient: Literal["now", "later", "never"],
    ) -> tuple[Tensor, Tensor]:
        """hidden [N, D], weight [P, D], targets [N] int64 -> [N], [N] float32."""
        weight = rounded(weight.detach(), hidden.dtype)
        row_bytes = weight.element_size() * len(weight)
        factors = hidden.new_ones(len(hidden), dtype=torch.float32) if gradient == "now" else None
        found, of_hidden, of_weight, ctx.kept = [], [], None, None
        for rows, *each in _split(CHUNK_BYTES, row_bytes, hidden, targets, factors):
            logits = linear(rows, weight)  # [n, P]
            found += _read(logits, finish, entropy, *each)
            if gradient == "now":
                of_hidden.append(input_gradient(logits, weight))
                of_weight = _add_gradient(of_weight, logits, rows) if ctx.needs_input_grad[1] else None
            elif gradient == "later" and ctx.kept is None:
                ctx.kept = logits
            del logits  # before there is another chunk
        if gradient == "now":
            ctx.save_for_backward(torch.cat(of_hidden), of_weight)
        elif gradient == "later":
            ctx.save_for_backward(hidden, weight, targets)
        ctx.how = finish, entropy, gradient
        logprobs, entropies = map(torch.cat, zip(*found, strict=True))
        if entropy != "learned":
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, of_logprobs: Tensor, of_entropies: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        """[N], [N] -> [N, D], [P, D]."""
        finish, entropy, gradient = ctx.how
        if gradient == "now":
            of_hidden, of_weight = ctx.saved_tensors
            if of_weight is not None:
                of_weight.mul_(of_logprobs[:1].sum())  # of a sum: all are the same
            return of_hidden.mul_(of_logprobs[:, None]), of_weight, None, None, None, None
        hidden, weight, targets = ctx.saved_tensors
        parts, of_weight = [], None
        entropy, of_entropies = ("learned", of_entropies) if entropy == "learned" else ("none", None)
        row_bytes = weight.element_size() * len(weight)
        for rows, *each in _split(CHUNK_BYTES, row_bytes, hidden, targets, of_logprobs, of_entropies):
            logits, ctx.kept = linear(rows, weight) if ctx.kept is None else ctx.kept, None
            _read(logits, finish, entropy, *each)
            parts.append(input_gradient(logits, weight))
            of_weight = _add_gradient(of_weight, logits, rows) if ctx.needs_input_grad[1] else None
            del logits
        return torch.cat(parts), of_weight, None, None, None, None


def _split(limits: dict[str, int], n_bytes: int, *tensors: Tensor | None) -> Iterator[list[Tensor | None]]:
    """Tensors [N, ...], or None, cut to as many rows as the limit allows with n_bytes each."""
    size = max(1, limits[tensors[0].device.type] // n_bytes)
    for start in range(0, max(1, len(tensors[0])), size):
        yield [None if each is None else each[start : start + size] for each in tensors]


def _add_gradient(total: Tensor | None, of_logits: Tensor, rows: Tensor) -> Tensor:
    """A chunk's gradient of the weight added to that of others. [P, D], [n, P], [n, D] -> [P, D] float32."""
    of_chunk = weight_gradient(of_logits, rows)
    return of_chunk.float() if total is None else total.add_(of_chunk)


def _read(
    products: Tensor, finish: Finish, entropy: Entropy, targets: Tensor, of_logprobs: Tensor | None,
    of_entropies: Tensor | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Log-probs and entropies of parts of a chunk; given the log-probs' gradients, products [n, P] become theirs."""
    found, learns = [], of_logprobs is not None
    for part, ids, *gradients in _split(
        SOFTMAX_BYTES, 4 * products.shape[1], products, targets, of_logprobs, of_entropies
    ):
        leaf = part.detach().float().requires_grad_(learns)
        with torch.set_grad_enabled(learns):
            logits = finish(leaf)
        local, logprobs = vocab_logprobs(logits.detach(), ids)
        entropies = logprobs.new_empty(0) if entropy == "none" else vocab_entropy(local)
        if learns:
            of_logits = vocab_gradient(local, ids, entropies, *gradients)
            with torch.enable_grad():
                given = _Given.apply(logits, of_logits)
            part.copy_(*torch.autograd.grad(given, leaf))
        found.append((logprobs, entropies))
    return found


class _Given(torch.autograd.Function):
    """A number whose gradient is given: torch.autograd.grad with one imports sympy, as long as half of torch."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, gradient: Tensor) -> Tensor:
        """x [n, P], its gradient [n, P] -> []."""
        ctx.save_for_backward(gradient)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, _: Tensor) -> tuple[Tensor, None]:
        """[] -> [n, P]."""
        return ctx.saved_tensors[0], None


def vocab_logprobs(local_logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of this rank's ids, and of one id a row, by two small all-reduces. local_logits [N, P] float32,
    targets [N] int64 global ids -> [N, P], [N] float32, nats."""
    local = local_logits.log_softmax(-1)  # over this rank's slice; one fused pass
    if tensor_parallel_size() > 1:
        local += _slice_logprob(local_logits[:, 0] - local[:, 0])[:, None]
    index, here = _place(targets, local)
    chosen = local.gather(-1, index)[:, 0].masked_fill(~here, 0.0)  # -inf in padding
    return local, sum_over_tensor_parallel(chosen)


def vocab_entropy(local: Tensor) -> Tensor:
    """Entropy from this rank's log-probs, in which -inf is replaced. [N, P] float32 -> [N], nats."""
    local.clamp_min_(torch.finfo(local.dtype).min)  # of an id that cannot be, times its probability 0: 0
    return -sum_over_tensor_parallel((local.exp() * local).sum(-1))


def vocab_gradient(
    local: Tensor, targets: Tensor, entropies: Tensor, of_logprobs: Tensor, of_entropies: Tensor | None
) -> Tensor:
    """The gradient of this rank's logits, in the place of its log-probs `local`; nothing is sent.

    With probabilities p that of a log-prob is one-hot minus p, that of an entropy H is -p (log p + H). local [N, P],
    targets [N] int64, entropies [N], gradients of log-probs and of entropies [N], None where they have none -> [N, P].
    """
    factor = of_logprobs[:, None]
    if of_entropies is not None:
        factor = factor + of_entropies[:, None] * (local + entropies[:, None])
    index, here = _place(targets, local)
    return local.exp_().mul_(-factor).scatter_add_(-1, index, (of_logprobs * here)[:, None])


def _place(targets: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of ids [N] in this rank's slice [N, P], any where they are not in it. -> [N, 1] int64, [N] bool."""
    index = targets - tensor_parallel_rank() * local.shape[-1]
    here = (index >= 0) & (index < local.shape[-1])
    return index.clamp(0, local.shape[-1] - 1)[:, None], here


def _slice_logprob(log_normaliser: Tensor) -> Tensor:
    """log of the probability that lies in this rank's vocabulary slice, from its own log-sum-exp. [N] -> [N]."""
    highest = max_over_tensor_parallel(log_normaliser.clone())
    total = sum_over_tensor_parallel((log_normaliser - highest).exp())
    return log_normaliser - highest - total.log()
