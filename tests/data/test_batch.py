"""src/data/: masks, padding, what is dropped, and orders that depend on (seed, epoch) alone."""

import random

import pytest
import torch

from src.data.batch import make_batch, pack_shared
from src.data.encoding import Encoded, fit
from src.data.sampler import chunks, epoch_order, pick
from src.errors import UserError


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


def test_long_rows_are_dropped_up_to_one_in_a_hundred() -> None:
    short, long = Encoded([1] * 4, 1), Encoded([1] * 5, 1)
    rows = [(short,)] * 99 + [(short, long)]
    assert fit(rows, 4, "f.json")[0] == [(short,)] * 99
    assert fit(rows, 5, "f.json")[0] == rows
    message = r"f.json: 2 of 100 rows are longer than --max_seq_len 4 \(the longest has 5 tokens\)"
    with pytest.raises(UserError, match=message):
        fit([*rows[1:], (long,)], 4, "f.json")
    with pytest.raises(UserError, match="f.json: 1 of 100 rows are longer"):
        fit(rows, 4, "f.json", "error")
    with pytest.raises(UserError, match="f.json: 1 of 10 rows are longer"):
        fit(rows[-10:], 4, "f.json")


def test_truncation_by_hand() -> None:
    short, prompt, answer = Encoded([1, 2], 1), Encoded([1, 2, 3, 4, 5, 6], 4), Encoded([1, 2, 3, 4, 5, 6], 1)
    rows = [(short,)] * 200
    left = fit([*rows, (prompt,), (prompt,), (prompt,), (answer,)], 4, "f.json", "left")
    assert left[0] == [*rows, *[(Encoded([1, 4, 5, 6], 2),)] * 3]  # a cut prompt costs no answer
    assert left[1] == "f.json: 204 samples, 4 too long: 3 cut, 1 dropped"
    right = fit([*rows, (answer,), (prompt,)], 5, "f.json", "right")
    assert right[0] == [*rows, (Encoded([1, 2, 3, 4, 5], 1),), (Encoded([1, 2, 3, 4, 5], 4),)]
    assert fit([*rows, (prompt,)], 4, "f.json", "right")[0] == rows  # no answer is left of it
    with pytest.raises(UserError, match="3 of 203 rows are longer than --max_seq_len 5"):
        fit([*rows, *[(answer,)] * 3], 5, "f.json", "right")


def trl_pair(prompt: list[int], sides: list[list[int]], max_length: int, max_prompt_length: int) -> list[list[int]]:
    """What trl 0.7.10 makes of a pair (DPOTrainer.tokenize_row with truncation_mode keep_end), ids for ids."""
    longer = max(map(len, sides))
    if len(prompt) + longer > max_length:
        prompt = prompt[-max_prompt_length:]
    if len(prompt) + longer > max_length:
        sides = [side[: max_length - max_prompt_length] for side in sides]
    return [prompt + side for side in sides]


@pytest.mark.parametrize("max_seq_len", [8, 12, 16, 20, 64])
def test_scdpo_21_keep_end_is_trl_s_truncation(max_seq_len: int) -> None:
    generator = random.Random(max_seq_len)
    draw = lambda most: [generator.randrange(99) for _ in range(generator.randint(1, most))]  # noqa: E731
    for _ in range(200):
        prompt, sides = draw(20), [draw(20), draw(20)]
        pair = tuple(Encoded(prompt + side, len(prompt)) for side in sides)
        others = [(Encoded([1, 2], 1),) * 2] * 100  # beside them one short of response tokens may pass
        found = fit([pair, *others], max_seq_len, "f.json", "keep_end")[0][0]
        assert [side.tokens for side in found] == trl_pair(prompt, sides, max_seq_len, max_seq_len // 2)
        assert all(side.n_response == len(side.tokens) - found[0].response_start for side in found)


def test_scdpo_21_a_question_that_would_be_cut_is_refused_dropped_or_counted() -> None:
    short, long = Encoded([1, 2, 3], 1), Encoded([1, 7, 8, 9, 4, 5], 4)
    rows = [(short, short)] * 200 + [(long, long)]
    with pytest.raises(UserError, match="1 of 201 rows are longer than --max_seq_len 5"):
        fit(rows, 5, "f.json", "error")
    assert fit(rows, 5, "f.json")[1] == "f.json: 201 samples, 1 too long: 0 cut, 1 dropped"
    kept = fit(rows, 5, "f.json", "keep_end")
    assert kept[1] == "f.json: 201 samples, 1 too long: 1 cut, 0 dropped"
    assert kept[0][-1] == (Encoded([8, 9, 4, 5], 2),) * 2  # BOS and the question's first word are gone


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
