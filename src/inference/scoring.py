"""What a model says of given responses: log-probs, values, scores. Where each number sits is decided here alone.

B batch, S sequence, D width, N response tokens of the batch, row by row. The token at position t was predicted at
position t - 1: its log-prob and the critic's value of the state it was chosen in are read there. A response's score is
read at its own last token (EOS where it has one), or is the mean over its tokens.
"""

import torch
from torch import Tensor

from src import parallel
from src.models.decoder import Decoder


def _predicting(hidden: Tensor, response_mask: Tensor) -> Tensor:
    """Hidden states at the positions that predict response tokens. [B, S, D], [B, S] -> [N, D]."""
    return hidden[:, :-1][response_mask[:, 1:]]


def response_logprobs(
    model: Decoder, tokens: Tensor, response_mask: Tensor, temperature: float = 1.0
) -> Tensor:
    """Log-probability of every response token at a sampling temperature.

    tokens [B, S] int64, response_mask [B, S] bool, False at position 0 -> [N] float32, nats. Differentiable.
    """
    return logprobs_and_entropy(model, tokens, response_mask, temperature, entropy=False)[0]


def logprobs_and_entropy(
    model: Decoder, tokens: Tensor, response_mask: Tensor, temperature: float, *, entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """response_logprobs() and the entropy of each predicting distribution (no gradient; empty unless asked)."""
    logits = model.logits(_predicting(model(tokens), response_mask)) / temperature  # [N, P]
    logprobs = parallel.vocab_logprobs(logits, tokens[response_mask])
    return logprobs, parallel.vocab_entropy(logits.detach()) if entropy else logprobs.new_empty(0)


def response_values(critic: Decoder, tokens: Tensor, response_mask: Tensor) -> Tensor:
    """The critic's value of the state in which each response token was chosen. -> [N] float32. Differentiable."""
    return critic.scores(_predicting(critic(tokens), response_mask))


def response_scores(verifier: Decoder, tokens: Tensor, response_mask: Tensor) -> Tensor:
    """The verifier's score of each whole response, read where its config says. -> [B] float32. Differentiable.

    `last`: at the response's last token. `mean`: the mean over its tokens.
    """
    hidden = verifier(tokens)
    if verifier.config.score == "mean":
        return (verifier.scores(hidden) * response_mask).sum(1) / response_mask.sum(1)
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    last = (positions * response_mask).argmax(1)
    return verifier.scores(hidden[torch.arange(len(tokens), device=tokens.device), last])
