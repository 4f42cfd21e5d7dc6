"""src/data/batch.py: masks, padding, orders by (seed, epoch) alone, every row once an epoch on any number of ranks."""

from collections.abc import Sequence

import pytest
import torch

from src.data.batch import (
    Batch,
    BatchSampler,
    Dataset,
    Sample,
    chunks,
    epoch_order,
    make_batch,
    pack_shared,
    pick,
    unsupervised,
)
from src.data.encoding import Encoded


def test_collate_pads_on_the_right_and_masks_by_length() -> None:
    # token 0 is a real token of the first row and padding of the second
    batch = make_batch([Encoded([1, 5, 0, 2], 2), Encoded([1, 2], 1)])
    assert batch.tokens.tolist() == [[1, 5, 0, 2], [1, 2, 0, 0]]
    assert batch.response_mask.tolist() == [[False, False, True, True], [False, True, False, False]]


def test_forks_by_hand() -> None:
    pair = Encoded([1, 5, 6, 9, 2], 3), Encoded([1, 5, 6, 2], 3)
    alone = Encoded([1, 2], 1), Encoded([1, 7, 2], 1), Encoded([1, 2], 1)
    no_pair = Encoded([1, 3, 4, 2], 3), Encoded([1, 4, 4, 2], 3)
    batch = pack_shared([pair, alone, no_pair])
    assert batch.lengths == ((2, 3, 2), (0, 2, 3, 2), (1, 3, 3))
    # 1 5 once; 6 twice, for it predicts 9 and 2
    assert batch.tokens.tolist() == [[1, 5, 6, 9, 2, 6, 2, 1, 2, 1, 7, 2, 1, 2, 1, 3, 4, 2, 4, 4, 2]]
    assert batch.tokens[batch.response_mask].tolist() == [9, 2, 2, 2, 7, 2, 2, 2, 2]
    assert batch.response_counts().tolist() == [2, 1, 1, 2, 1, 1, 1] and batch.n_samples == 7
    assert batch.sample_lengths().tolist() == [5, 2, 2, 3, 2, 4, 3]
    # 5^2 + 2^2 + 2 * 2 * 2; no beginning; 4^2 + 3^2 + 2 * 1 * 3
    assert batch.n_attended() == (25 + 4 + 8) + (4 + 9 + 4) + (16 + 9 + 6)
    assert make_batch([*pair], packing=True).n_attended() == 25 + 16


def test_order_is_a_pure_function_of_seed_and_epoch() -> None:
    order = epoch_order(50, 1, 1)
    assert sorted(order) == list(range(50))
    torch.manual_seed(9)
    assert order == epoch_order(50, 1, 1)
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in (1, 2) for epoch in (1, 2)}) == 4


def test_pick_is_a_pure_function_that_reaches_every_option() -> None:
    picks = [pick("abc", 1, epoch, row) for epoch in range(5) for row in range(5)]
    assert picks == [pick("abc", 1, epoch, row) for epoch in range(5) for row in range(5)]
    assert set(picks) == set("abc")
    assert pick("a", 1, 1, 1) == "a"


def test_chunks() -> None:
    assert list(chunks([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]]
    assert list(chunks([], 2)) == []


LENGTHS = [3, 9, 4, 4, 7, 2, 8, 5, 6, 2, 3]


def collate(samples: Sequence[Sample], packing: bool) -> Batch:
    return make_batch([encoded for (encoded,) in samples], packing=packing)


# each row's first token is its number
DATA = Dataset([(Encoded([row] * length, 1),) for row, length in enumerate(LENGTHS)], "", collate)


def rows_of(batch: Batch) -> list[int]:
    """The rows that carry loss in a packed batch."""
    kept = [int(part[0]) for part in batch.tokens[0].split(batch.sample_lengths().tolist())]
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
    assert [length for batch in step.batches for _, length in batch.lengths] == sorted(LENGTHS)


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
    # what is planned is the longest pass, whichever rank has it
    plan = BatchSampler(max_batch_size=2, accumulation_steps=2, seed=1, rank=-1, ranks=2)
    (step,) = plan.steps(DATA._replace(samples=DATA.samples[:5]), packing=True, epochs=1)
    by_length = sorted(LENGTHS[:5])
    assert [[length for _, length in batch.lengths] for batch in step.batches] == [by_length[2:4], by_length[4:]]
    assert rows_of(two[0].batches[0]) == []
    assert unsupervised((Encoded([1, 2, 3], 1),)) == (Encoded([1, 2, 3], 3),)
