"""Which samples go through the model together: a pure function of (seed, epoch), the same on every rank.

A step's samples are fixed first; only then are they ordered by length and dealt to forward passes and data-parallel
ranks. Losses are means over the whole step, so how they are dealt changes speed and not the update.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from src.data import collate
from src.data.collate import Batch
from src.data.encoding import Encoded

Sample = tuple[Encoded, ...]  # the sequences that stay together: one, or a chosen and a rejected one


class Step(NamedTuple):
    """One optimizer step: its epoch and number, both from 1 (numbers run on over epochs), and its forward passes."""

    epoch: int
    number: int
    batches: list[Batch]


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How rows become steps: max_batch_size rows in a forward pass of each of `ranks` data-parallel ranks."""

    max_batch_size: int
    accumulation_steps: int
    seed: int
    rank: int = 0
    ranks: int = 1

    @property
    def of_last_rank(self) -> "Batching":
        """As the last rank sees it, whose forward passes are the longest."""
        return replace(self, rank=self.ranks - 1)

    @property
    def rows_a_step(self) -> int:
        """Rows in one optimizer step, over all ranks."""
        return self.max_batch_size * self.accumulation_steps * self.ranks

    def steps_per_epoch(self, n_rows: int) -> int:
        """Optimizer steps in one epoch; the last may be smaller."""
        return -(-n_rows // self.rows_a_step)

    def count_steps(self, n_rows: int, epochs: int, max_steps: int) -> tuple[int, int]:
        """Optimizer steps in one epoch, and in all; max_steps -1: those of all epochs."""
        per_epoch = self.steps_per_epoch(n_rows)
        return per_epoch, min(epochs * per_epoch, max_steps if max_steps >= 0 else epochs * per_epoch)

    def steps(
        self,
        n_rows: int,
        encode: Callable[[int, int], Sample],
        lay_out: Callable[[list[Sample]], Batch],
        *,
        epochs: int,
        done: int = 0,
        stop: int | None = None,
    ) -> Iterator[Step]:
        """The steps of `epochs` epochs behind number `done` and up to `stop` (None: to the end).

        encode(epoch, row) gives a row's sample in an epoch, lay_out() a batch of such samples.
        """
        per_epoch = self.steps_per_epoch(n_rows)
        for epoch in range(done // per_epoch + 1, epochs + 1):
            order = collate.epoch_order(n_rows, self.seed, epoch)
            first = (epoch - 1) * per_epoch
            for number, rows in enumerate(collate.chunks(order, self.rows_a_step), first + 1):
                if stop is not None and number > stop:
                    return
                if number > done:
                    samples = sorted((encode(epoch, row) for row in rows), key=n_tokens)
                    batches = [lay_out(picked) for picked in self._deal(samples)]
                    yield Step(epoch, number, batches)

    def _deal(self, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
        """This rank's forward passes. Samples come by length, so the ranks' k-th passes are alike in size.

        Every rank makes as many passes as the busiest one, for they communicate in each: where it has no samples
        left it takes the shortest once more, with nothing in them supervised.
        """
        passes = list(collate.chunks(samples, self.max_batch_size))
        for turn in collate.chunks(passes, self.ranks):
            yield turn[self.rank] if self.rank < len(turn) else [unsupervised(passes[0][0])]


def n_tokens(sample: Sample) -> int:
    """Tokens of the longest sequence in a sample."""
    return max(len(encoded.tokens) for encoded in sample)


def unsupervised(sample: Sample) -> Sample:
    """The sample with no response token in it: its loss is 0."""
    return tuple(Encoded(encoded.tokens, len(encoded.tokens)) for encoded in sample)
