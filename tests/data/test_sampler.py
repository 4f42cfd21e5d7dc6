"""src/data/sampler.py: every row once an epoch, whatever the number of ranks, and steps that can start anywhere."""

from collections.abc import Sequence

import pytest

from src.data.batch import Batch, make_batch
from src.data.encoding import Encoded
from src.data.sampler import BatchSampler, Dataset, Sample, unsupervised

LENGTHS = [3, 9, 4, 4, 7, 2, 8, 5, 6, 2, 3]


def collate(samples: Sequence[Sample], packing: bool) -> Batch:
    return make_batch([encoded for (encoded,) in samples], packing=packing)


# each row's first token is its number
DATA = Dataset([(Encoded([row] * length, 1),) for row, length in enumerate(LENGTHS)], "", collate)


def rows_of(batch: Batch) -> list[int]:
    """The rows that carry loss in a packed batch."""
    kept = [int(part[0]) for part in batch.tokens[0].split(batch.lengths)]
    return [row for row, count in zip(kept, batch.response_counts(), strict=True) if count]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_every_steps_rows(ranks: int) -> None:
    batching = [
        BatchSampler(max_batch_size=2, accumulation_steps=12 // ranks // 2, seed=3, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    alone = BatchSampler(max_batch_size=12, accumulation_steps=1, seed=3)
    steps = [list(each.steps(DATA, packing=True, epochs=2)) for each in batching]
    whole = list(alone.steps(DATA, packing=True, epochs=2))
    for expected, *found in zip(whole, *steps, strict=True):
        assert len({len(step.batches) for step in found}) == 1  # all ranks make equally many passes
        rows = [row for step in found for batch in step.batches for row in rows_of(batch)]
        assert sorted(rows) == sorted(rows_of(expected.batches[0])) == list(range(len(LENGTHS)))


def test_a_steps_rows_come_by_length() -> None:
    batching = BatchSampler(max_batch_size=2, accumulation_steps=6, seed=1)
    (step,) = batching.steps(DATA, packing=True, epochs=1)
    assert [length for batch in step.batches for length in batch.lengths] == sorted(LENGTHS)


def test_steps_may_start_anywhere() -> None:
    batching = BatchSampler(max_batch_size=2, accumulation_steps=2, seed=1)
    steps = list(batching.steps(DATA, packing=True, epochs=3))
    assert [step.number for step in steps] == list(range(1, 10))
    for done in range(10):
        rest = list(batching.steps(DATA, packing=True, epochs=3, done=done))
        assert [(step.epoch, step.number) for step in rest] == [
            (step.epoch, step.number) for step in steps[done:]
        ]
        assert [list(map(rows_of, step.batches)) for step in rest] == [
            list(map(rows_of, step.batches)) for step in steps[done:]
        ]


def test_an_idle_rank_repeats_a_sample_without_loss() -> None:
    one, two = (
        list(
            BatchSampler(max_batch_size=6, accumulation_steps=1, seed=1, rank=rank, ranks=2).steps(
                DATA._replace(samples=DATA.samples[:5]), packing=True, epochs=1
            )
        )
        for rank in range(2)
    )
    assert sorted(rows_of(one[0].batches[0])) == [0, 1, 2, 3, 4]
    assert rows_of(two[0].batches[0]) == []
    assert unsupervised((Encoded([1, 2, 3], 1),)) == (Encoded([1, 2, 3], 3),)
