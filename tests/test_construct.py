"""src/construct.py: right against wrong solutions of the same problem."""

import pytest

from src.construct import pairs_from_samples
from src.data.examples import Sample
from src.errors import UserError


def sample(problem: str, number: int, response: str, outcome: str | None) -> Sample:
    """A sample whose prompt is `q` and the problem's id."""
    prompt = f"q{problem}"
    return Sample(problem, number, prompt, response, outcome, {"prompt": prompt})


SAMPLES = [
    sample("0", 0, "r1", "right"),
    sample("0", 1, "w1", "wrong"),
    sample("0", 2, "w2", "unparsed"),
    sample("0", 3, "w1", "wrong"),  # the same text again
    sample("0", 4, "t", "timeout"),
    sample("0", 5, "e", "error"),
    sample("0", 6, "n", None),
    sample("0", 7, "", "unparsed"),
    sample("1", 0, "r1", "right"),  # nothing wrong
    sample("2", 0, "w1", "wrong"),  # nothing right
    sample("3", 0, "a", "right"),
    sample("3", 1, "b", "right"),
    sample("3", 2, "c", "right"),
    sample("3", 3, "d", "wrong"),
]


def test_pairs_by_hand() -> None:
    rows = pairs_from_samples(SAMPLES, pairs_a_problem=4, seed=1)
    found = {(row["instruction"], row["chosen"], row["rejected"]) for row in rows}
    assert len(rows) == 5 and found == {
        ("q0", "r1", "w1"),
        ("q0", "r1", "w2"),
        ("q3", "a", "d"),
        ("q3", "b", "d"),
        ("q3", "c", "d"),
    }


def test_limit_a_problem_and_seed() -> None:
    assert len(pairs_from_samples(SAMPLES, 1, seed=1)) == 2
    assert pairs_from_samples(SAMPLES, 4, seed=1) == pairs_from_samples(SAMPLES, 4, seed=1)
    assert len({str(pairs_from_samples(SAMPLES, 4, seed=seed)) for seed in range(10)}) > 1


def test_a_sample_without_its_prompt_gives_no_pair_with_an_empty_instruction() -> None:
    bare = Sample("0", 0, "", "r", "right", {"response": "r"})
    with pytest.raises(UserError, match="sample '0'/0 has no key 'prompt'; grade the file with"):
        pairs_from_samples([bare], 4, seed=1)
