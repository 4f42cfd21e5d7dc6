"""Forward passes over given responses: log-probs, entropies, values, scores. Where each sits is decided here alone.

B batch, S sequence, D width, N response tokens of the batch, row by row. The token at position t was predicted at
position t - 1: its log-prob and the critic's value of the state it was chosen in are read there. A response's score is
read at its own last token (EOS where it has one), or is the mean over its tokens.

Every function takes the fields of a data.batch.Batch: rows padded on the right, or, with `lengths`, one row of
samples laid end to end. What it returns is the same either way. The fields lie in main memory and are sent to the
device from here: which positions a mask picks must be known before, for to ask a GPU is to wait for all that it does.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from src import parallel
from src.models.attention import Segments
from src.models.decoder import Decoder
from src.models.linear import input_gradient, linear, rounded, weight_gradient
from src.models.vocab_softmax import vocab_entropy, vocab_logprobs

# Logits of this many float32 bytes exist at once; those of more positions are made again for the backward pass. Each
# chunk adds a gradient of the whole output layer, so few are faster; on a CPU 192 MiB were no faster than 96.
CHUNK_BYTES = {"cpu": 96 * 2**20, "cuda": 512 * 2**20}
# Float32 bytes of logits whose softmax is taken at once where its gradient replaces them: few stay in a CPU's cache.
SOFTMAX_BYTES = {"cpu": 2 * 2**20, "cuda": 512 * 2**20}

Lengths = Segments | None


def _predicting(model: Decoder, tokens: Tensor, response_mask: Tensor, lengths: Lengths) -> tuple[Tensor, Tensor]:
    """Hidden states at the positions that predict response tokens, and these. [B, S], [B, S] -> [N, D], [N] int64."""
    places = response_mask.flatten().nonzero()[:, 0]
    hidden = model(parallel.to_device(tokens), lengths=lengths).flatten(0, 1)
    return hidden.index_select(0, parallel.to_device(places - 1)), parallel.to_device(tokens.flatten()[places])


def response_logprobs(
    model: Decoder,
    tokens: Tensor,
    response_mask: Tensor,
    lengths: Lengths = None,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    n_ids: int | None = None,
) -> Tensor:
    """Log-probability of every response token at a sampling temperature, among the first n_ids ids (None: all).

    tokens [B, S] int64, response_mask [B, S] bool, False where a sample starts -> [N] float32, nats.
    Differentiable. Training, scoring and evaluation all take their log-probs and cross-entropies from here.
    chunk: positions whose logits exist at once; default: as many as CHUNK_BYTES holds.
    """
    return _logprobs(model, tokens, response_mask, lengths, temperature, n_ids, entropy="none", chunk=chunk)[0]


def summed_logprobs(model: Decoder, tokens: Tensor, response_mask: Tensor, lengths: Lengths = None) -> Tensor:
    """The sum of response_logprobs(), whose gradient costs less: it is made with the value. -> [] float32, nats.

    The derivative of a plain sum is known before the backward pass comes, so logits are neither kept for it nor made
    again. Where that pass scales the loss because its numbers are float16's, they are.
    """
    if not torch.is_grad_enabled() or model.dtype == torch.float16:
        return response_logprobs(model, tokens, response_mask, lengths).sum()
    hidden, targets = _predicting(model, tokens, response_mask, lengths)  # [N, D], [N]
    hidden = parallel.copy_to_tensor_parallel(hidden)
    return _SummedLogprobs.apply(hidden, model.output_weight, targets, model.finish_logits)


class _SummedLogprobs(torch.autograd.Function):
    """The sum of the targets' log-probs; each chunk of logits becomes its own gradient, in place."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        finish: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """hidden [N, D], weight [P, D], targets [N] int64 ids, finish: products [n, P] to logits -> [] float32."""
        learnt = ctx.needs_input_grad[1]
        computes = rounded(weight.detach(), hidden.dtype)
        of_hidden = torch.empty_like(hidden)
        of_weight = None
        size, few = (
            max(1, limits[hidden.device.type] // (n_bytes * len(weight)))
            for limits, n_bytes in ((CHUNK_BYTES, hidden.element_size()), (SOFTMAX_BYTES, 4))
        )
        logprobs = []
        for rows, ids, gradient in zip(hidden.split(size), targets.split(size), of_hidden.split(size), strict=True):
            logits = linear(rows, computes)  # [n, P]
            for part, wanted in zip(logits.split(few), ids.split(few), strict=True):
                leaf = part.detach().float().requires_grad_()
                with torch.enable_grad():
                    found = vocab_logprobs(finish(leaf), wanted)
                    part.copy_(*torch.autograd.grad(found.sum(), leaf))
                logprobs.append(found.detach())
            gradient.copy_(input_gradient(logits, computes))
            if learnt:
                of_chunk = weight_gradient(logits, rows)
                of_weight = of_chunk.float() if of_weight is None else of_weight.add_(of_chunk)
        ctx.save_for_backward(of_hidden, of_weight)
        return torch.cat(logprobs).sum()

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None]:
        """[] -> [N, D], [P, D]; what forward() made is scaled in place."""
        of_hidden, of_weight = ctx.saved_tensors
        return of_hidden.mul_(grad), None if of_weight is None else of_weight.mul_(grad), None, None


def logprobs_and_entropy(
    model: Decoder,
    tokens: Tensor,
    response_mask: Tensor,
    lengths: Lengths = None,
    *,
    temperature: float = 1.0,
    n_ids: int | None = None,
    learn_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """response_logprobs() and the entropy of each predicting distribution. -> two [N] float32.

    The entropy has a gradient only with learn_entropy: its backward pass keeps another [n, V].
    """
    kind = "learned" if learn_entropy else "logged"
    return _logprobs(model, tokens, response_mask, lengths, temperature, n_ids, entropy=kind)


def _logprobs(
    model: Decoder,
    tokens: Tensor,
    response_mask: Tensor,
    lengths: Lengths,
    temperature: float,
    n_ids: int | None,
    *,
    entropy: Literal["none", "logged", "learned"],
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs [N] and entropies [N] (empty unless asked for), a chunk at a time: [B, S, V] never exists."""

    def part_of(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """[n, D], [n] int64 -> log-probs and entropies, [n] float32 each."""
        logits = model.logits(hidden)  # [n, P]
        if temperature != 1.0:
            logits = logits / temperature
        if n_ids is not None and n_ids < model.config.vocab_size:
            logits = _without_padding(logits, n_ids)
        logprobs = vocab_logprobs(logits, targets)
        if entropy == "none":
            return logprobs, logprobs.new_empty(0)
        return logprobs, vocab_entropy(logits if entropy == "learned" else logits.detach())

    hidden, targets = _predicting(model, tokens, response_mask, lengths)  # [N, D], [N]
    per_position = 4 * model.config.vocab_size // parallel.tensor_parallel_size()
    size = chunk or max(1, CHUNK_BYTES[hidden.device.type] // per_position)
    parts = list(zip(hidden.split(size), targets.split(size), strict=True))
    if len(parts) == 1:
        return part_of(*parts[0])
    done = [checkpoint(part_of, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    logprobs, entropies = zip(*done, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _without_padding(logits: Tensor, n_ids: int) -> Tensor:
    """Take all probability from ids that no text has and no sampler yields. [n, P] -> [n, P], this rank's.

    The value is finite: the slice of a rank that holds padding alone must still have a normaliser.
    """
    start = parallel.tensor_parallel_rank() * logits.shape[-1]
    ids = torch.arange(start, start + logits.shape[-1], device=logits.device)
    return logits.masked_fill(ids >= n_ids, -1e4)


def response_values(
    critic: Decoder, tokens: Tensor, response_mask: Tensor, lengths: Lengths = None
) -> Tensor:
    """The critic's value of the state that each response token was chosen in. [B, S] -> [N] float32. Differentiable."""
    return critic.scores(_predicting(critic, tokens, response_mask, lengths)[0])


def token_scores(verifier: Decoder, tokens: Tensor, response_mask: Tensor, lengths: Lengths = None) -> Tensor:
    """The verifier's score after each token, the token included. [B, S] -> [B, S] float32. Differentiable."""
    return verifier.scores(verifier(parallel.to_device(tokens), lengths=lengths))


def response_scores(
    verifier: Decoder, tokens: Tensor, response_mask: Tensor, lengths: Lengths = None
) -> Tensor:
    """The verifier's score of each whole response, read where its config says. -> [B] float32. Differentiable.

    `last`: at the response's last token. `mean`: the mean over its tokens.
    """
    scores = token_scores(verifier, tokens, response_mask, lengths)
    if lengths is not None:
        scores, response_mask = (
            pad_sequence(row[0].split(lengths), batch_first=True) for row in (scores, response_mask)
        )
    if verifier.config.score == "mean":
        response_mask = parallel.to_device(response_mask)
        return (scores * response_mask).sum(1) / response_mask.sum(1).clamp_min(1)
    last = (torch.arange(scores.shape[1]) * response_mask).argmax(1)
    return scores.gather(1, parallel.to_device(last)[:, None])[:, 0]
