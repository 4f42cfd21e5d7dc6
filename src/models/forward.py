"""Forward passes over given responses: log-probs, entropies, values, scores. Where each sits is decided here alone.

B batch, S sequence, D width, N response tokens of the batch, row by row. The token at position t was predicted at
position t - 1: its log-prob and the critic's value of the state it was chosen in are read there. A response's score is
read at its own last token (EOS where it has one), or is the mean over its tokens.

Every function takes the fields of a data.batch.Batch: rows padded on the right, or, with `lengths`, one row of
samples laid end to end. What it returns is the same either way, and on each of the ranks that share a batch. The
fields lie in main memory and are sent to the device from here: which positions a mask picks must be known before, for
to ask a GPU is to wait for all that it does.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from src import context_parallel, parallel
from src.models.attention import Segments
from src.models.decoder import Decoder
from src.models.vocab_softmax import Entropy, output_logprobs

Lengths = Segments | None


class SampledIds(NamedTuple):
    """The ids that a sampler may choose: those below `size`, but for the banned ones."""

    size: int
    banned: tuple[int, ...] = ()


def _predicting(
    model: Decoder, tokens: Tensor, response_mask: Tensor, lengths: Lengths
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Hidden states at this rank's positions that predict response tokens, these, and what joins a number of each with
    those of the ranks that share the batch. [B, S], [B, S] -> [N here, D], [N here] int64, [N here] to [N]."""
    here, (rows, places) = context_parallel.part(tokens.shape[1]), response_mask.nonzero(as_tuple=True)
    mine = ((places > here.start) & (places <= here.stop)).nonzero()[:, 0]
    hidden = model(parallel.to_device(tokens), lengths=lengths).flatten(0, 1)
    predicting = (rows * len(here) + places - 1 - here.start)[mine]
    join = partial(context_parallel.join, places=mine, total=len(rows))
    return (hidden.index_select(0, parallel.to_device(predicting)),
            parallel.to_device(tokens[response_mask][mine]), join)


def response_logprobs(
    model: Decoder, tokens: Tensor, response_mask: Tensor, lengths: Lengths = None, *,
    temperature: float = 1.0, ids: SampledIds | None = None,
) -> Tensor:
    """Log-probability of every response token at a sampling temperature, among the ids that are sampled (None: all).

    tokens [B, S] int64, response_mask [B, S] bool, False where a sample starts -> [N] float32, nats.
    Differentiable. Training, scoring and evaluation all take their log-probs and cross-entropies from here.
    """
    return _logprobs(model, tokens, response_mask, lengths, temperature, ids)[0]


def summed_logprobs(model: Decoder, tokens: Tensor, response_mask: Tensor, lengths: Lengths = None) -> Tensor:
    """The sum of response_logprobs(), whose gradient costs less: no logits are made again. -> [] float32, nats."""
    return _logprobs(model, tokens, response_mask, lengths, summed=True)[0].sum()


def logprobs_and_entropy(
    model: Decoder, tokens: Tensor, response_mask: Tensor, lengths: Lengths = None, *,
    temperature: float = 1.0, ids: SampledIds | None = None, learn_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """response_logprobs() and the entropy of each predicting distribution. -> two [N] float32. The entropy has a
    gradient only with learn_entropy."""
    kind = "learned" if learn_entropy else "logged"
    return _logprobs(model, tokens, response_mask, lengths, temperature, ids, entropy=kind)


def _logprobs(
    model: Decoder, tokens: Tensor, response_mask: Tensor, lengths: Lengths, temperature: float = 1.0,
    ids: SampledIds | None = None, *, entropy: Entropy = "none", summed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probs [N] and entropies [N] (empty unless asked for). summed: see output_logprobs()."""

    def finish(products: Tensor) -> Tensor:
        """The output layer's products as logits. [n, P] float32 -> [n, P]."""
        logits = model.finish_logits(products)
        if temperature != 1.0:
            logits = logits / temperature
        everything = ids is None or ids.size >= model.config.vocab_size and not ids.banned
        return logits if everything else _of_sampled(logits, ids)

    hidden, targets, join = _predicting(model, tokens, response_mask, lengths)
    hidden = parallel.copy_to_tensor_parallel(hidden)
    logprobs, entropies = output_logprobs(hidden, model.output_weight, targets, finish, entropy, summed=summed)
    return join(logprobs), entropies if entropy == "none" else join(entropies)


def _of_sampled(logits: Tensor, ids: SampledIds) -> Tensor:
    """Take all probability from ids that no sampler yields, such as padding. [n, P] -> [n, P], this rank's.

    The value is finite: the slice of a rank that holds padding alone must still have a normaliser.
    """
    start = parallel.tensor_parallel_rank() * logits.shape[-1]
    here = torch.arange(start, start + logits.shape[-1], device=logits.device)
    never = here >= ids.size
    for index in ids.banned:
        never |= here == index
    return logits.masked_fill(never, -1e4)


def response_values(
    critic: Decoder, tokens: Tensor, response_mask: Tensor, lengths: Lengths = None
) -> Tensor:
    """The critic's value of the state that each response token was chosen in. [B, S] -> [N] float32. Differentiable."""
    hidden, _, join = _predicting(critic, tokens, response_mask, lengths)
    return join(critic.scores(hidden))


def token_scores(verifier: Decoder, tokens: Tensor, response_mask: Tensor, lengths: Lengths = None) -> Tensor:
    """The verifier's score after each token, the token included. [B, S] -> [B, S] float32. Differentiable."""
    scores = verifier.scores(verifier(parallel.to_device(tokens), lengths=lengths))
    return context_parallel.uncut(scores, tokens.shape[1])


def response_scores(
    verifier: Decoder, tokens: Tensor, response_mask: Tensor, lengths: Lengths = None
) -> Tensor:
    """The verifier's score of each whole response, read where its config says. -> [B] float32. Differentiable. `last`:
    at the response's last token. `mean`: the mean over its tokens."""
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
