"""Encoded samples as the tensors of one forward pass, padded or packed: the only code that pads, packs and masks.

B batch, S sequence
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from src.data.encoding import Encoded


class Batch(NamedTuple):
    """Samples for one forward pass, in main memory. tokens [B, S] int64; response_mask [B, S] bool, True on
    response tokens.

    Rows padded on the right, one sample each; or, packed, one row with samples of these `lengths` end to end, an entry
    (shared, rest, rest, ...) standing for samples whose common beginning lies there once.
    targets [B, S] float32: what a verifier's score should be, nan where none is read.
    reference [n_samples] float32: summed log-probs of the responses under a frozen model, in nats.
    mismatched: as many samples of the same prompts with others' responses, for KTO.
    """

    tokens: Tensor
    response_mask: Tensor
    lengths: tuple[int | tuple[int, ...], ...] | None = None
    targets: Tensor | None = None
    reference: Tensor | None = None
    mismatched: "Batch | None" = None

    @property
    def inputs(self) -> tuple[Tensor, Tensor, tuple[int | tuple[int, ...], ...] | None]:
        """What the functions of models/forward.py take: tokens [B, S], response_mask [B, S], lengths."""
        return self.tokens, self.response_mask, self.lengths

    @property
    def n_samples(self) -> int:
        """Samples in the batch, padded or packed."""
        return len(self.tokens if self.lengths is None else self._runs())

    @property
    def n_targets(self) -> int:
        """Scores that are read."""
        return int((~self.targets.isnan()).sum())

    def response_counts(self) -> Tensor:
        """Response tokens of each sample. -> [n_samples] int64."""
        if self.lengths is None:
            return self.response_mask.sum(1)
        return torch.stack([sample.sum() for sample in self.response_mask[0].split(self._runs())])

    def sample_lengths(self) -> Tensor:
        """Tokens of each sample up to its last response token, those in common counted once. -> [n_samples] int64."""
        if self.lengths is not None:
            return torch.tensor(self._runs())
        return (torch.arange(1, self.tokens.shape[1] + 1) * self.response_mask).amax(1)

    def n_attended(self) -> float:
        """Twice the pairs of positions that causal attention compares: the sum of squared lengths."""
        squares = self.sample_lengths().double().square().sum().item()
        segments = (segment for segment in self.lengths or () if isinstance(segment, tuple))
        return squares + sum(2 * shared * sum(others) for shared, _, *others in segments)

    def _runs(self) -> list[int]:
        """Lengths of the row's parts, one a sample; a common beginning belongs to the first that has it."""
        segments = (segment if isinstance(segment, tuple) else (0, segment) for segment in self.lengths)
        return [length for shared, first, *others in segments for length in (shared + first, *others)]


def make_batch(samples: Sequence[Encoded], *, packing: bool = False, with_targets: bool = False) -> Batch:
    """Collate samples: padded on the right to the longest, or packed end to end in one row. Padding ids are 0 and mean
    nothing: masks come from lengths. Attention stays within each packed sample."""
    if packing:
        tokens = torch.tensor([[token for sample in samples for token in sample.tokens]])
        response_mask = torch.tensor([[is_learnt for sample in samples for is_learnt in sample.supervised]])
        batch = Batch(tokens, response_mask, tuple(len(sample.tokens) for sample in samples))
    else:
        tokens = pad_sequence([torch.tensor(sample.tokens) for sample in samples], batch_first=True)
        response_mask = pad_sequence([torch.tensor(sample.supervised) for sample in samples], batch_first=True)
        batch = Batch(tokens, response_mask)
    if not with_targets:
        return batch
    targets = torch.full(batch.tokens.shape, math.nan)
    flat = [target for sample in samples for target in sample.targets]
    targets[batch.response_mask] = torch.tensor(flat, dtype=torch.float32)  # one target a response token
    return batch._replace(targets=targets)


def pack_shared(groups: Sequence[tuple[Encoded, ...]]) -> Batch:
    """Pack groups of samples end to end in one row, the tokens that begin all samples of a group only once. The last of
    them before a response stays with each sample, for it predicts the response's first token."""
    tokens, supervised, lengths = [], [], []
    for group in groups:
        shared = 0
        if len(group) > 1:
            most = min(encoded.response_start for encoded in group) - 1
            first, *others = (encoded.tokens for encoded in group)
            shared = next((n for n in range(most) if any(other[n] != first[n] for other in others)), max(most, 0))
        rests = [encoded.tokens[shared:] for encoded in group]
        tokens += [*group[0].tokens[:shared], *(token for rest in rests for token in rest)]
        supervised += [False] * shared + [here for encoded in group for here in encoded.supervised[shared:]]
        lengths.append((shared, *map(len, rests)) if len(group) > 1 else len(rests[0]))
    return Batch(torch.tensor([tokens]), torch.tensor([supervised]), tuple(lengths))
