"""src/data/encoded_rows.py: what a file gives back is what was put in; what is dropped, and what is cut."""

import math
import random
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from src.data.encoded_rows import Sample, fit, in_temporary_file
from src.data.encoding import Encoded
from src.errors import UserError


def fitted(samples: Sequence[Sample], *arguments: object) -> tuple[list[Sample], str]:
    rows = (SimpleNamespace(where=f"row {number}", sample=sample) for number, sample in enumerate(samples, 1))
    samples, report = fit(rows, lambda row: [row.sample], *arguments)
    return list(samples), report


def test_samples_come_back_as_they_were() -> None:
    chat = Encoded([0, 5, 2**31 - 1, 0], 1, answer_mask=[False, True, False, True])
    judged = Encoded([1, 2, 3, 4], 1, (math.nan, 1 / 3, math.inf))
    samples = [(chat,), (judged, Encoded([1, 2], 1)), (Encoded([7], 1, (), None), chat, judged)]

    def fill(add: object) -> str:
        for sample in samples:
            add(sample)
        return "said"

    found, said = in_temporary_file(fill)
    # nan is no value of itself; types count too
    assert repr(list(found)) == repr(samples) and (len(found), said) == (3, "said")
    assert repr([found[-1], *found[:2]]) == repr([samples[-1], *samples[:2]])
    with pytest.raises(IndexError):
        found[3]


def test_long_rows_are_dropped_up_to_one_in_a_hundred() -> None:
    short, long = Encoded([1] * 4, 1), Encoded([1] * 5, 1)
    rows = [(short,)] * 99 + [(short, long)]
    assert fitted(rows, 4, "f.json")[0] == [(short,)] * 99
    assert fitted(rows, 5, "f.json")[0] == rows
    message = r"f.json: 2 of 100 rows are longer than --max_seq_len 4 \(the longest has 5 tokens: row 99\)"
    with pytest.raises(UserError, match=message):
        fitted([*rows[1:], (long,)], 4, "f.json")
    with pytest.raises(UserError, match="f.json: 1 of 100 rows are longer"):
        fitted(rows, 4, "f.json", "error")
    with pytest.raises(UserError, match="f.json: 1 of 10 rows are longer"):
        fitted(rows[-10:], 4, "f.json")


def test_a_row_that_cannot_be_encoded_is_named() -> None:
    def encode(row: SimpleNamespace) -> list[Sample]:
        if row.where == "f.json, row 2":
            raise UserError("the template has no form for it")
        return [(Encoded([1, 2], 1),)]

    rows = [SimpleNamespace(where=f"f.json, row {number}") for number in (1, 2)]
    with pytest.raises(UserError, match="^f.json, row 2: the template has no form for it$"):
        fit(rows, encode, 4, "f.json")


def test_truncation_by_hand() -> None:
    short, prompt, answer = Encoded([1, 2], 1), Encoded([1, 2, 3, 4, 5, 6], 4), Encoded([1, 2, 3, 4, 5, 6], 1)
    rows = [(short,)] * 200
    left = fitted([*rows, (prompt,), (prompt,), (prompt,), (answer,)], 4, "f.json", "left")
    assert left[0] == [*rows, *[(Encoded([1, 4, 5, 6], 2),)] * 3]  # a cut prompt costs no answer
    assert left[1] == "f.json: 204 samples, 4 too long: 3 cut, 1 dropped"
    right = fitted([*rows, (answer,), (prompt,)], 5, "f.json", "right")
    assert right[0] == [*rows, (Encoded([1, 2, 3, 4, 5], 1),), (Encoded([1, 2, 3, 4, 5], 4),)]
    assert fitted([*rows, (prompt,)], 4, "f.json", "right")[0] == rows  # no answer is left of it
    with pytest.raises(UserError, match="3 of 203 rows are longer than --max_seq_len 5"):
        fitted([*rows, *[(answer,)] * 3], 5, "f.json", "right")


def test_sides_of_a_pair_lose_the_same_of_their_prompt() -> None:
    """They are compared: with another prompt each, what tells them apart would be the prompt."""
    pair = Encoded([0, 1, 2, 3, 4, 5, 6, 7], 5), Encoded([0, 1, 2, 3, 4, 8], 5)
    others = [(Encoded([1, 2], 1),) * 2] * 100
    found, report = fitted([pair, *others], 6, "f.json", "left")
    assert found[0] == (Encoded([0, 3, 4, 5, 6, 7], 3), Encoded([0, 3, 4, 8], 3)) and "1 cut, 0 dropped" in report


@pytest.mark.parametrize(("truncation", "max_seq_len"), [("right", 7), ("keep_end", 6)])
def test_what_is_not_learnt_of_a_response_is_not_learnt_of_its_beginning(truncation: str, max_seq_len: int) -> None:
    """What code printed, tokens 5 and 6."""
    mask = [False] * 3 + [True, True, False, False, True, True]
    others = [(Encoded([1, 2], 1, (1.0,)),)] * 200
    cut = fitted([(Encoded([*range(9)], 3, (1.0,) * 4, mask),), *others], max_seq_len, "f.json", truncation)[0][0][0]
    assert cut == Encoded([*range(max_seq_len)], 3, (1.0, 1.0), mask[:max_seq_len])


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
        found = fitted([pair, *others], max_seq_len, "f.json", "keep_end")[0][0]
        assert [side.tokens for side in found] == trl_pair(prompt, sides, max_seq_len, max_seq_len // 2)
        assert all(side.n_response == len(side.tokens) - found[0].response_start for side in found)


def test_scdpo_21_a_question_that_would_be_cut_is_refused_dropped_or_counted() -> None:
    short, long = Encoded([1, 2, 3], 1), Encoded([1, 7, 8, 9, 4, 5], 4)
    rows = [(short, short)] * 200 + [(long, long)]
    with pytest.raises(UserError, match="1 of 201 rows are longer than --max_seq_len 5"):
        fitted(rows, 5, "f.json", "error")
    assert fitted(rows, 5, "f.json")[1] == "f.json: 201 samples, 1 too long: 0 cut, 1 dropped"
    kept = fitted(rows, 5, "f.json", "keep_end")
    assert kept[1] == "f.json: 201 samples, 1 too long: 1 cut, 0 dropped"
    assert kept[0][-1] == (Encoded([8, 9, 4, 5], 2),) * 2  # BOS and the question's first word are gone
