"""Encoded samples to token batches: the only code that drops, cuts, pads, packs and masks.

B batch, S sequence
"""

import math
import random
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from src.data.encoding import Encoded
from src.errors import UserError

Item = TypeVar("Item")
Truncation = Literal["error", "drop", "left", "right", "keep_end"]

MAX_DROPPED_SHARE = 0.01  # more answers than this lost to the length limit is a wrong flag, not noise


class Batch(NamedTuple):
    """Samples for one forward pass. tokens [B, S] int64; response_mask [B, S] bool, True on response tokens.

    Rows padded on the right, one sample each; or, packed, one row with samples of these `lengths` end to end, an entry
    (shared, rest, rest, ...) standing for samples whose common beginning lies there once.
    """

    tokens: Tensor
    response_mask: Tensor
    lengths: tuple[int | tuple[int, ...], ...] | None = None

    @property
    def n_samples(self) -> int:
        """Samples in the batch, whichever way they lie."""
        return len(self.tokens if self.lengths is None else self._runs())

    def _runs(self) -> list[int]:
        """Lengths of the row's parts, one a sample; a common beginning belongs to the first that has it."""
        forks = (sample if isinstance(sample, tuple) else (0, sample) for sample in self.lengths)
        return [length for shared, first, *others in forks for length in (shared + first, *others)]

    def sample_lengths(self) -> Tensor:
        """Tokens of each sample up to its last response token, those in common counted once. -> [n_samples] int64."""
        if self.lengths is not None:
            return torch.tensor(self._runs())
        return (torch.arange(1, self.tokens.shape[1] + 1) * self.response_mask).amax(1)

    def n_attended(self) -> float:
        """Twice the pairs of positions that causal attention compares: the sum of squared lengths."""
        squares = self.sample_lengths().double().square().sum().item()
        forks = (sample for sample in self.lengths or () if isinstance(sample, tuple))
        return squares + sum(2 * shared * sum(others) for shared, _, *others in forks)

    def response_counts(self) -> Tensor:
        """Response tokens of each sample. -> [n_samples] int64."""
        if self.lengths is None:
            return self.response_mask.sum(1)
        return torch.stack([sample.sum() for sample in self.response_mask[0].split(self._runs())])

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch(self.tokens.to(device), self.response_mask.to(device), self.lengths)


class JudgedBatch(NamedTuple):
    """A batch with what a verifier's score should be: targets [B, S] float32, nan where none is read."""

    batch: Batch
    targets: Tensor

    @property
    def tokens(self) -> Tensor:
        """The batch's tokens."""
        return self.batch.tokens

    def sample_lengths(self) -> Tensor:
        """The batch's sample_lengths()."""
        return self.batch.sample_lengths()

    def n_attended(self) -> float:
        """The batch's n_attended()."""
        return self.batch.n_attended()

    @property
    def n_judged(self) -> int:
        """Scores that are read."""
        return int((~self.targets.isnan()).sum())

    def to(self, device: torch.device) -> "JudgedBatch":
        """The same batch on a device."""
        return JudgedBatch(self.batch.to(device), self.targets.to(device))


class Fitted(NamedTuple):
    """The samples that fit the length limit, and a sentence on what became of the others."""

    rows: list[tuple[Encoded, ...]]
    report: str


def fit(
    rows: Sequence[tuple[Encoded, ...]], max_seq_len: int, source: str, truncation: Truncation = "drop"
) -> Fitted:
    """Samples none of whose sequences is longer than max_seq_len; longer ones are treated as `truncation` says.

    `left` cuts the prompt behind its first token and leaves the response whole (conversations, whose prompts are
    turns, are not cut), `right` cuts the end of the response; where that leaves no response, or none of a verifier's
    targets, the sample is dropped.
    `keep_end` is what the published preference runs did (_keep_end()).
    Raises UserError when more than 1% of the samples lose response tokens or are dropped - of fewer than 100, when one
    does - and for any long one under `error`.
    """
    kept, cut, lost = [], 0, 0
    for row in rows:
        if all(len(encoded.tokens) <= max_seq_len for encoded in row):
            kept.append(row)
            continue
        if truncation == "keep_end":
            shorter = _keep_end(row, max_seq_len)
        else:
            shorter = tuple(_cut(encoded, max_seq_len, truncation) for encoded in row)
        fits = all(
            encoded.n_response > 0 and len(encoded.tokens) <= max_seq_len and encoded.is_judged for encoded in shorter
        )
        cut += fits
        lost += not fits or any(
            short.n_response < whole.n_response for short, whole in zip(shorter, row, strict=True)
        )
        if fits:
            kept.append(shorter)
    long = len(rows) - len(kept) + cut
    if lost > MAX_DROPPED_SHARE * len(rows) or not kept or (long and truncation == "error"):
        longest = max(len(encoded.tokens) for row in rows for encoded in row)
        raise UserError(
            f"{source}: {lost or long} of {len(rows)} rows are longer than --max_seq_len {max_seq_len} "
            f"(the longest has {longest} tokens); raise it or shorten the data"
        )
    return Fitted(kept, f"{source}: {len(rows)} samples, {long} too long: {cut} cut, {long - cut} dropped")


def _cut(encoded: Encoded, max_seq_len: int, truncation: Truncation) -> Encoded:
    """A sequence cut to max_seq_len, or as it is where the policy cannot cut it."""
    excess = len(encoded.tokens) - max_seq_len
    if truncation == "left" and 0 < excess < encoded.response_start and not encoded.answer_mask:
        tokens = encoded.tokens[:1] + encoded.tokens[1 + excess :]
        return Encoded(tokens, encoded.response_start - excess, encoded.targets)
    if truncation == "right" and excess > 0:
        start = min(encoded.response_start, max_seq_len)
        mask = encoded.answer_mask and encoded.answer_mask[:max_seq_len]
        return Encoded(encoded.tokens[:max_seq_len], start, encoded.targets[: max_seq_len - start], mask)
    return encoded


def _keep_end(row: tuple[Encoded, ...], max_seq_len: int) -> tuple[Encoded, ...]:
    """A sample cut as trl 0.7.10 cuts a pair with max_prompt_length half of max_length: the prompt's last
    max_seq_len / 2 tokens stay - BOS and the question go first - and then, if need be, as many of each response."""
    half = max_seq_len // 2
    longest = max(encoded.n_response for encoded in row)
    cut = []
    for encoded in row:
        first = max(0, encoded.response_start - half)
        start = encoded.response_start - first
        kept = encoded.n_response if start + longest <= max_seq_len else max_seq_len - half
        cut.append(
            Encoded(encoded.tokens[first : encoded.response_start + kept], start, encoded.targets[:kept])
        )
    return tuple(cut)


def collate(rows: Sequence[Encoded]) -> Batch:
    """Pad rows on the right to the longest. Padding ids are 0 and mean nothing: masks come from lengths."""
    longest = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    response_mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = torch.tensor(row.tokens)
        response_mask[index, : len(row.tokens)] = torch.tensor(row.supervised)
    return Batch(tokens, response_mask)


def pack(rows: Sequence[Encoded]) -> Batch:
    """Lay samples end to end in one row [1, sum of lengths]: no padding, and attention stays within each."""
    return Batch(
        torch.tensor([[token for row in rows for token in row.tokens]]),
        torch.tensor([[supervised for row in rows for supervised in row.supervised]]),
        tuple(len(row.tokens) for row in rows),
    )


def pack_forked(groups: Sequence[tuple[Encoded, ...]]) -> Batch:
    """Lay groups of samples end to end in one row, the tokens that begin all samples of a group only once.

    The last of them before a response stays with each sample, for it predicts the response's first token.
    """
    tokens, supervised, lengths = [], [], []
    for group in groups:
        shared = _n_shared(group)
        rests = [encoded.tokens[shared:] for encoded in group]
        tokens += [*group[0].tokens[:shared], *(token for rest in rests for token in rest)]
        supervised += [False] * shared + [here for encoded in group for here in encoded.supervised[shared:]]
        lengths.append((shared, *map(len, rests)))
    return Batch(torch.tensor([tokens]), torch.tensor([supervised]), tuple(lengths))


def _n_shared(group: Sequence[Encoded]) -> int:
    """How many tokens all samples begin with, short of the last before any response."""
    most = min(encoded.response_start for encoded in group) - 1
    first, *others = (encoded.tokens for encoded in group)
    return next((n for n in range(most) if any(other[n] != first[n] for other in others)), max(most, 0))


def lay_out(samples: Sequence[Encoded], *, packing: bool) -> Batch:
    """Samples as a batch, packed or padded."""
    return pack(samples) if packing else collate(samples)


def lay_out_judged(samples: Sequence[Encoded], *, packing: bool) -> JudgedBatch:
    """Samples with their targets as a batch, packed or padded."""
    batch = lay_out(samples, packing=packing)
    targets = torch.full(batch.tokens.shape, math.nan)
    flat = [target for sample in samples for target in sample.targets]
    targets[batch.response_mask] = torch.tensor(flat, dtype=torch.float32)  # one target a response token
    return JudgedBatch(batch, targets)


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n rows in an epoch: a pure function of (seed, epoch)."""
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def pick(options: Sequence[Item], seed: int, epoch: int, row: int) -> Item:
    """One of a row's options for an epoch: a pure function of (seed, epoch, row)."""
    return options[0] if len(options) == 1 else random.Random(f"{seed}/{epoch}/{row}").choice(options)


def chunks(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive pieces of at most `size`."""
    return (list(items[start : start + size]) for start in range(0, len(items), size))
