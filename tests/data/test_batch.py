"""src/data/: masks, padding, what is dropped, and orders that depend on (seed, epoch) alone."""

import torch

from src.data.batch import make_batch, pack_shared
from src.data.encoding import Encoded
from src.data.sampler import chunks, epoch_order, pick


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
