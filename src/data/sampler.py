"""Which samples go through the model together: a pure function of (seed, epoch), the same on every rank."""

import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from src.data.batch import Batch
from src.data.encoded_rows import Sample
from src.data.encoding import Encoded

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
    rank: int = 0
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
    def of_last_rank(self) -> "BatchSampler":
        """As the last rank sees it, whose forward passes are the longest."""
        return replace(self, rank=self.ranks - 1)

    @property
    def rows_per_step(self) -> int:
        """Rows in one optimizer step, over all ranks."""
        return self.max_batch_size * self.accumulation_steps * self.ranks

    def steps_per_epoch(self, n_rows: int) -> int:
        """Optimizer steps in one epoch; the last may be smaller."""
        return -(-n_rows // self.rows_per_step)

    def total_steps(self, n_rows: int, epochs: int, max_steps: int) -> int:
        """Optimizer steps in all, at most max_steps; -1: those of all epochs."""
        total = epochs * self.steps_per_epoch(n_rows)
        return min(total, max_steps) if max_steps >= 0 else total


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
