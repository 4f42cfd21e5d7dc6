"""src/construct/pairs.py: right against wrong solutions of the same problem."""

import pytest

from src.construct.from_rows import mixed_pairs
from src.construct.from_samples import pairs_from_samples, preferred_pairs
from src.construct.samples import without_phrases
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
    sample("2", 0, "w1", "wrong"),  # nothing right that came to its end
    sample("2", 1, "r1 and", "right")._replace(values={"prompt": "q2", "finish": "length"}),
    sample("3", 0, "a", "right"),
    sample("3", 1, "b", "right"),
    sample("3", 2, "c", "right"),
    sample("3", 3, "d", "wrong"),
]


def test_pairs_by_hand() -> None:
    rows = pairs_from_samples(SAMPLES, pairs_per_problem=4, seed=1)
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


def scored(number: int, response: str, outcome: str, score: float) -> Sample:
    return Sample("0", number, "q", response, outcome, {"prompt": "q", "score": score})


def test_preferred_pairs_differ_in_score_and_answer_together() -> None:
    samples = [
        scored(0, "right, believed", "right", 0.9),  # worth 1.9
        scored(1, "right, doubted", "right", 0.2),  # 1.2
        scored(2, "wrong, believed", "wrong", 0.8),  # 0.8
        scored(3, "wrong, doubted", "wrong", 0.1),  # 0.1
    ]
    assert {(row["chosen"], row["rejected"]) for row in preferred_pairs(samples, 1.0, 9, seed=1)} == {
        ("right, believed", "wrong, believed"),
        ("right, believed", "wrong, doubted"),
        ("right, doubted", "wrong, doubted"),
    }
    assert len(preferred_pairs(samples, 1.0, 2, seed=1)) == 2
    assert len(preferred_pairs(samples, 0.0, 9, seed=1)) == 6


def test_score_that_is_no_probability_is_refused() -> None:
    with pytest.raises(UserError, match=r"sample '0'/0 has the score 2.5; expected a probability"):
        preferred_pairs([scored(0, "r", "right", 2.5)], 1.0, 3, seed=1)


def test_scdpo_11_right_solutions_that_speak_of_an_error_are_set_apart() -> None:
    samples = [
        sample("0", 0, "2, sorry, I APOLOGIZE: 3", "right"),
        sample("0", 1, "an error of 2 gives 3", "right"),
        sample("0", 2, "3", "right"),
        sample("0", 3, "an error of 2 gives 4", "wrong"),  # wrong ones may say what they like
        Sample("1", 0, "What is the error?", "3", "right", {"prompt": "What is the error?"}),  # and so may questions
    ]
    kept = without_phrases(samples, ["error", "apolog"])
    assert [(x.id, x.sample) for x in kept] == [("0", 2), ("0", 3), ("1", 0)]
    assert without_phrases(samples, []) == samples
    assert len(without_phrases(samples, ["traceback (most recent"])) == 5


def test_scdpo_11_tracebacks_alone_can_be_looked_for() -> None:
    def coded(printed: str) -> str:
        code, execution = "<|code|>print(1/x)<|endofblock|>", f"<|execution|>{printed}<|endofblock|>"
        return f"<|text|>The error of x is 2.<|endofblock|>{code}{execution}<|endofmessage|>"

    samples = [
        sample("0", 0, coded("0.5\n"), "right"),
        sample("0", 1, coded("Traceback ...\nZeroDivisionError: division by zero\n"), "right"),
        sample("0", 2, coded("NameError: x\n"), "wrong"),
        sample("0", 3, "an error of 2 gives 3", "right"),  # no code, nothing printed
    ]
    kept = without_phrases(samples, ["error"], "executions")
    assert [x.sample for x in kept] == [0, 2, 3]
    assert [x.sample for x in without_phrases(samples, ["error"], "solution")] == [2]


def test_scdpo_22_the_control_has_as_many_pairs_as_the_mix() -> None:
    ordinary = [{"instruction": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(30)]
    branched = [{**row, "prefix": "x"} for row in ordinary[:10]]
    mix, control = mixed_pairs(ordinary, branched, 0.5, seed=3)
    assert len(mix) == len(control) == 20 and all(row in mix for row in branched)
    plain = [row for row in mix if "prefix" not in row]
    assert len(plain) == 10 and all(row in control for row in plain)
    assert len({row["instruction"] for row in control}) == 20 and not any("prefix" in row for row in control)
    assert (mix, control) == mixed_pairs(ordinary, branched, 0.5, seed=3)
    assert mix != mixed_pairs(ordinary, branched, 0.5, seed=4)[0]
    for share in (0.8, 1.0, 0.0):
        with pytest.raises(UserError, match="10 step-controlled pairs and a --share"):
            mixed_pairs(ordinary, branched, share, seed=3)
    assert mixed_pairs(ordinary, branched, 0.5, seed=3, needs_control=False)[0] == mix
    with pytest.raises(UserError, match="make 40 rows, .* needs 40 ordinary pairs; found 30"):
        mixed_pairs(ordinary, branched, 0.75, seed=3)
    mix, _ = mixed_pairs(ordinary, branched, 0.75, seed=3, needs_control=False)
    assert len(mix) == 40 and all(row in mix for row in [*ordinary, *branched])
