"""Which samples go through the model together, and as which tensors: the only code that pads, packs and masks.

The rows of a step are a pure function of (seed, epoch), the same on every rank. B batch, S sequence
"""

import math
import os.path
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from src.data.encoded_rows import Sample
from src.data.encoding import Encoded


class Batch(NamedTuple):
    """Samples for one forward pass, in main memory. tokens [B, S] int64; response_mask [B, S] bool, True on
    response tokens.

    Rows padded on the right, one sample each; or, packed, one row with samples of these `lengths` end to end: an entry
    (shared, rest, rest, ...) is of samples whose common beginning lies there once, (0, length) of one alone.
    targets [B, S] float32: what a verifier's score should be, nan where none is read.
    reference [n_samples] float32: summed log-probs of the responses under a frozen model, in nats.
    mismatched: as many samples of the same prompts with others' responses, for KTO.
    """

    tokens: Tensor
    response_mask: Tensor
    lengths: tuple[tuple[int, ...], ...] | None = None
    targets: Tensor | None = None
    reference: Tensor | None = None
    mismatched: "Batch | None" = None

    @property
    def inputs(self) -> tuple[Tensor, Tensor, tuple[tuple[int, ...], ...] | None]:
        """What the functions of models/forward.py take: tokens [B, S], response_mask [B, S], lengths."""
        return self.tokens, self.response_mask, self.lengths

    @property
    def n_samples(self) -> int:
        """Samples in the batch, padded or packed."""
        return len(self.tokens if self.lengths is None else self._runs())

    @property
    def n_learnt(self) -> int:
        """Samples with a response token; what a rank runs along with, to keep others company, has none."""
        return int((self.response_counts() > 0).sum())

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
        return squares + sum(2 * shared * sum(others) for shared, _, *others in self.lengths or ())

    def _runs(self) -> list[int]:
        """Lengths of the row's parts, one a sample; a common beginning belongs to the first that has it."""
        return [length for shared, first, *others in self.lengths for length in (shared + first, *others)]


def make_batch(samples: Sequence[Encoded], *, packing: bool = False, with_targets: bool = False) -> Batch:
    """Collate samples: padded on the right to the longest, or packed end to end in one row. Padding ids are 0 and mean
    nothing: masks come from lengths. Attention stays within each packed sample."""
    if packing:
        tokens = torch.tensor([[token for sample in samples for token in sample.tokens]])
        response_mask = torch.tensor([[is_learnt for sample in samples for is_learnt in sample.supervised]])
        batch = Batch(tokens, response_mask, tuple((0, len(sample.tokens)) for sample in samples))
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
            most = max(0, min(encoded.response_start for encoded in group) - 1)
            shared = len(os.path.commonprefix([encoded.tokens[:most] for encoded in group]))
        rests = [encoded.tokens[shared:] for encoded in group]
        tokens += [*group[0].tokens[:shared], *(token for rest in rests for token in rest)]
        supervised += [False] * shared + [here for encoded in group for here in encoded.supervised[shared:]]
        lengths.append((shared, *map(len, rests)))
    return Batch(torch.tensor([tokens]), torch.tensor([supervised]), tuple(lengths))


Item = TypeVar("Item")


class Dataset(NamedTuple):
    """Encoded samples, a sentence on those that were too long, and how an objective makes a batch of some.

    one_of_each: a sample's sequences are alternatives, of which each epoch shows one.
    """

    samples: Sequence[Sample]
    report: str
    collate: Callable[[Sequence[Sample], bool], Batch]  # samples, and whether they are packed
    one_of_each: bool = False


class Step(NamedTuple):
    """One optimizer step: its epoch and number, both from 1 (numbers run on over epochs), and its forward passes."""

    epoch: int
    number: int
    batches: list[Batch]


@dataclass(frozen=True, kw_only=True)
class BatchSampler:
    """How rows become steps: max_batch_size rows in a forward pass of each of `ranks` data-parallel ranks."""

    max_batch_size: int
    accumulation_steps: int
    seed: int
    rank: int = 0  # -1: a rank that has the longest pass of every turn, for plans
    ranks: int = 1

    def steps(
        self, data: Dataset, *, packing: bool, epochs: int, done: int = 0, stop: int | None = None
    ) -> Iterator[Step]:
        """Yield the steps of `epochs` epochs after number `done` and up to `stop` (None: to the end)."""
        per_epoch = self.steps_per_epoch(len(data.samples))
        for epoch in range(done // per_epoch + 1, epochs + 1):
            order = epoch_order(len(data.samples), self.seed, epoch)
            first = (epoch - 1) * per_epoch
            # A step's rows are fixed before they are dealt, so that an epoch is the same on any number of ranks
            for number, rows in enumerate(chunks(order, self.rows_per_step), first + 1):
                if stop is not None and number > stop:
                    return
                if number > done:
                    samples = [data.samples[row] for row in rows]
                    if data.one_of_each:
                        samples = [(pick(data.samples[row], self.seed, epoch, row),) for row in rows]
                    yield Step(epoch, number, [data.collate(part, packing) for part in self._deal(samples)])

    def _deal(self, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
        """Yield this rank's forward passes of one step, by length, so that the ranks' k-th passes are alike in size.

        Losses are means over the whole step, so how its samples are dealt changes speed and not the update. Every rank
        makes as many passes as the busiest one, for they communicate in each: where it has no samples left it takes the
        shortest once more, with nothing in them supervised.
        """
        by_length = sorted(samples, key=lambda sample: max(len(encoded.tokens) for encoded in sample))
        passes = list(chunks(by_length, self.max_batch_size))
        for turn in chunks(passes, self.ranks):
            yield turn[self.rank] if self.rank < len(turn) else [unsupervised(passes[0][0])]

    @property
    def rows_per_step(self) -> int:
        """Rows in one optimizer step, over all ranks."""
        return self.max_batch_size * self.accumulation_steps * self.ranks

    def steps_per_epoch(self, n_rows: int) -> int:
        """Optimizer steps in one epoch; the last may be smaller."""
        return -(-n_rows // self.rows_per_step)


def unsupervised(sample: Sample) -> Sample:
    """The sample with no response token in it: its loss is 0."""
    return tuple(Encoded(encoded.tokens, len(encoded.tokens)) for encoded in sample)


def epoch_order(n: int, seed: int, epoch: int) -> Sequence[int]:
    """The order of n rows in an epoch, in 8 bytes a row: a pure function of (seed, epoch)."""
    # A generator of its own, seeded by a text: torch's state, other draws and where a run resumed play no part
    order = array("q", range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def pick(options: Sequence[Item], seed: int, epoch: int, row: int) -> Item:
    """One of a row's options for an epoch: a pure function of (seed, epoch, row)."""
    return options[0] if len(options) == 1 else random.Random(f"{seed}/{epoch}/{row}").choice(options)


def chunks(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive pieces of at most `size`."""
    return (list(items[start : start + size]) for start in range(0, len(items), size))
