"""Forward passes over given responses: log-probs, entropies, values, scores. Where each sits is decided here alone.

B batch, S sequence, D width, N response tokens of the batch, row by row, n of them in a chunk, P vocabulary rows on
this rank

The token at position t was predicted at position t - 1: its log-prob and the critic's value of the state it was chosen
in are read there. A response's score is read at its own last token (EOS where it has one), or is the mean over its
tokens.

Every function takes the fields of a data.batch.Batch: rows padded on the right, or, with `lengths`, one row of
samples laid end to end. What it returns is the same either way, and on each of the ranks that share a batch. The
fields lie in main memory and are sent to the device from here: which positions a mask picks must be known before, for
to ask a GPU is to wait for all that it does.

Logits are the largest tensors of a step: they are made of a chunk of the hidden states at a time, and of those of
response tokens alone. Of a vocabulary that lies on several ranks nothing is gathered.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from src import context_parallel, parallel
from src.models.attention import Segments
from src.models.decoder import Decoder
from src.models.linear import input_gradient, linear, rounded, weight_gradient

# Logits of this many bytes are made at once. Each chunk adds a gradient of the whole output layer: few are faster, but
# on a CPU 192 MiB were no faster than 96.
CHUNK_BYTES = {"cpu": 96 * 2**20, "cuda": 512 * 2**20}
# Float32 bytes of logits whose softmax is taken at once: few stay in a CPU's cache.
SOFTMAX_BYTES = {"cpu": 2 * 2**20, "cuda": 512 * 2**20}

Lengths = Segments | None
Entropy = Literal["none", "logged", "learned"]
Finish = Callable[[Tensor], Tensor]  # products of the output layer to logits, [n, P] float32 each


class Distribution(NamedTuple):
    """What tokens are drawn from: softmax(logits / temperature) over the ids below `size`, None for all, but for the
    banned ones. By default the model's own."""

    temperature: float = 1.0
    size: int | None = None
    banned: tuple[int, ...] = ()

    def logits(self, logits: Tensor, vocab_size: int) -> Tensor:
        """Its logits from the model's, of vocab_size ids on all ranks. [n, P] -> [n, P], this rank's."""
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if (self.size is None or self.size >= vocab_size) and not self.banned:
            return logits
        start = parallel.tensor_parallel_rank() * logits.shape[-1]
        ids = torch.arange(start, start + logits.shape[-1], device=logits.device)  # [P]
        never = ids >= (vocab_size if self.size is None else self.size)
        for index in self.banned:
            never |= ids == index
        # no -inf: the slice of a rank that holds padding alone must still have a normaliser
        return logits.masked_fill(never, -1e4)


PLAIN = Distribution()


def response_logprobs(
    model: Decoder, tokens: Tensor, response_mask: Tensor, lengths: Lengths = None, *,
    distribution: Distribution = PLAIN,
) -> Tensor:
    """Log-probability of every response token.

    tokens [B, S] int64, response_mask [B, S] bool, False where a sample starts -> [N] float32, nats.
    Differentiable. Training, scoring and evaluation all take their log-probs and cross-entropies from here.
    """
    return _logprobs(model, tokens, response_mask, lengths, distribution)[0]


def summed_logprobs(model: Decoder, tokens: Tensor, response_mask: Tensor, lengths: Lengths = None) -> Tensor:
    """The sum of response_logprobs(), whose gradient costs less: no logits are made again. -> [] float32, nats."""
    return _logprobs(model, tokens, response_mask, lengths, PLAIN, summed=True)[0].sum()


def logprobs_and_entropy(
    model: Decoder, tokens: Tensor, response_mask: Tensor, lengths: Lengths = None, *,
    distribution: Distribution = PLAIN, learn_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """response_logprobs() and the entropy of each predicting distribution. -> two [N] float32. The entropy has a
    gradient only with learn_entropy."""
    kind = "learned" if learn_entropy else "logged"
    return _logprobs(model, tokens, response_mask, lengths, distribution, entropy=kind)


def response_values(critic: Decoder, tokens: Tensor, response_mask: Tensor, lengths: Lengths = None) -> Tensor:
    """The critic's value of the state that each response token was chosen in. [B, S] -> [N] float32. Differentiable."""
    hidden, _, join = _predicting(critic, tokens, response_mask, lengths)
    return join(critic.scores(hidden))


def token_scores(verifier: Decoder, tokens: Tensor, response_mask: Tensor, lengths: Lengths = None) -> Tensor:
    """The verifier's score after each token, the token included. [B, S] -> [B, S] float32. Differentiable."""
    scores = verifier.scores(verifier(parallel.to_device(tokens), lengths=lengths))
    return context_parallel.uncut(scores, tokens.shape[1])


def response_scores(verifier: Decoder, tokens: Tensor, response_mask: Tensor, lengths: Lengths = None) -> Tensor:
    """The verifier's score of each whole response, read where its config says. -> [B] float32. Differentiable. `last`:
    at the response's last token. `mean`: the mean over its tokens."""
    scores = token_scores(verifier, tokens, response_mask, lengths)  # [B, S]
    if lengths is not None:
        scores, response_mask = (
            pad_sequence(row[0].split([length for _, length in lengths]), batch_first=True)
            for row in (scores, response_mask))
    if verifier.config.score == "mean":
        response_mask = parallel.to_device(response_mask)
        return (scores * response_mask).sum(1) / response_mask.sum(1).clamp_min(1)
    last = (torch.arange(scores.shape[1]) * response_mask).argmax(1)  # [B]
    return scores.gather(1, parallel.to_device(last)[:, None])[:, 0]


def _predicting(
    model: Decoder, tokens: Tensor, response_mask: Tensor, lengths: Lengths
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Hidden states at this rank's positions that predict response tokens, these, and what joins a number of each with
    those of the ranks that share the batch. [B, S], [B, S] -> [N here, D], [N here] int64, [N here] to [N]."""
    here, (rows, places) = context_parallel.part(tokens.shape[1]), response_mask.nonzero(as_tuple=True)
    mine = ((places > here.start) & (places <= here.stop)).nonzero()[:, 0]
    hidden = model(parallel.to_device(tokens), lengths=lengths).flatten(0, 1)  # [B * S here, D]
    predicting = (rows * len(here) + places - 1 - here.start)[mine]  # [N here], rows of `hidden`
    join = partial(context_parallel.join, places=mine, total=len(rows))
    return (hidden.index_select(0, parallel.to_device(predicting)),
            parallel.to_device(tokens[response_mask][mine]), join)


def _logprobs(
    model: Decoder, tokens: Tensor, response_mask: Tensor, lengths: Lengths, distribution: Distribution, *,
    entropy: Entropy = "none", summed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probs [N] and entropies [N] (empty unless asked for), differentiable, the entropies if `learned`. summed:
    promises that all log-probs will have the same gradient."""

    def finish(products: Tensor) -> Tensor:
        """The output layer's products as logits. [n, P] float32 -> [n, P]."""
        return distribution.logits(model.finish_logits(products), model.config.vocab_size)

    hidden, targets, join = _predicting(model, tokens, response_mask, lengths)
    hidden, weight = parallel.copy_to_tensor_parallel(hidden), model.output_weight
    # in float16 what is not yet scaled is too small: see Trainer
    known = (summed or not weight.requires_grad) and entropy != "learned" and hidden.dtype != torch.float16
    gradient = "never" if not torch.is_grad_enabled() else "now" if known else "later"
    logprobs, entropies = _OutputLogprobs.apply(hidden, weight, targets, finish, entropy, gradient)
    return join(logprobs), entropies if entropy == "none" else join(entropies)


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
            if gradient == "now":  # the logits have become their gradient
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
            del logits  # before there is another chunk
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
        leaf = part.detach().float().requires_grad_(learns)  # [n, P]
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
    if parallel.tensor_parallel_size() > 1:  # then the log of the probability that lies in the slice
        log_normaliser = local_logits[:, 0] - local[:, 0]  # [N], the slice's log-sum-exp
        highest = parallel.max_over_tensor_parallel(log_normaliser.clone())
        total = parallel.sum_over_tensor_parallel((log_normaliser - highest).exp())
        local += (log_normaliser - highest - total.log())[:, None]
    index, here = _place(targets, local)
    chosen = local.gather(-1, index)[:, 0].masked_fill(~here, 0.0)  # -inf in padding
    return local, parallel.sum_over_tensor_parallel(chosen)


def vocab_entropy(local: Tensor) -> Tensor:
    """Entropy from this rank's log-probs, in which -inf is replaced. [N, P] float32 -> [N], nats."""
    # an id that cannot be, of probability 0: the product is 0, and in a gradient, times a scaled loss's, no infinity
    local.clamp_min_(-1e30)
    return -parallel.sum_over_tensor_parallel((local.exp() * local).sum(-1))


def vocab_gradient(
    local: Tensor, targets: Tensor, entropies: Tensor, of_logprobs: Tensor, of_entropies: Tensor | None
) -> Tensor:
    """The gradient of this rank's logits, in the place of its log-probs `local`; nothing is sent.

    With probabilities p that of a log-prob is one-hot minus p, that of an entropy H is -p (log p + H). local [N, P],
    targets [N] int64, entropies [N], gradients of log-probs and of entropies [N], None where they have none -> [N, P].
    """
    factor = of_logprobs[:, None]  # [N, 1]
    if of_entropies is not None:
        factor = factor + of_entropies[:, None] * (local + entropies[:, None])
    index, here = _place(targets, local)
    return local.exp_().mul_(-factor).scatter_add_(-1, index, (of_logprobs * here)[:, None])


def _place(targets: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of ids [N] in this rank's slice [N, P], any where they are not in it. -> [N, 1] int64, [N] bool."""
    index = targets - parallel.tensor_parallel_rank() * local.shape[-1]
    here = (index >= 0) & (index < local.shape[-1])
    return index.clamp(0, local.shape[-1] - 1)[:, None], here
