"""Graded samples by problem: what every builder of training files starts from."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from src.construct.continuation import step_end_of, whole_steps
from src.data.examples import Sample
from src.errors import UserError
from src.text.blocks import ended_blocks, split_text

ErrorPlace = Literal["solution", "executions"]


class Problem(NamedTuple):
    """A problem's distinct responses by outcome, in the order of the file. A timeout or an error is no verdict."""

    instruction: str
    right: list[Sample]
    wrong: list[Sample]
    unparsed: list[Sample]


def without_phrases(
    samples: Sequence[Sample], phrases: Sequence[str], place: ErrorPlace = "solution"
) -> list[Sample]:
    """The samples but for right ones whose response holds one of the phrases, in any case: who finds a mistake of his
    own on the way, or apologises for it, is no example to follow (Lu et al. 2024, the released code's third kind).

    place "executions" looks at nothing but what the solution's code printed, where tracebacks stand: a text may speak
    of the error of a measurement.
    """
    small = [phrase.casefold() for phrase in phrases]

    def faulty(sample: Sample) -> bool:
        text = sample.response if place == "solution" else printed(sample.response)
        return any(phrase in text.casefold() for phrase in small)

    return [sample for sample in samples if sample.outcome != "right" or not faulty(sample)]


def printed(solution: str) -> str:
    """What the code of a solution printed, block by block; of a solution without code nothing."""
    blocks = ended_blocks(split_text(solution))
    return "\n".join(block.content for block in blocks if block.kind == "execution")


def without_similar(samples: Sequence[Sample], characters: int) -> list[Sample]:
    """The samples without those much like an earlier one of the same problem and outcome: as many steps, and a length
    less than so many characters away (the released code of Step-Controlled DPO: 500). 0 keeps all."""
    kept: list[Sample] = []
    shapes: dict[tuple[str, str | None, int], list[int]] = {}
    for sample in samples:
        n_steps = len(whole_steps(sample.response, step_end_of(sample.response)))
        lengths = shapes.setdefault((sample.id, sample.outcome, n_steps), [])
        if all(abs(len(sample.response) - length) >= characters for length in lengths):
            lengths.append(len(sample.response))
            kept.append(sample)
    return kept


def by_problem(samples: Sequence[Sample]) -> dict[str, Problem]:
    """The problems of graded samples by id; equal texts of one count once, empty ones not at all.

    Samples without a verdict on their text (timeout, error) are left out. Raises UserError for a sample without its
    prompt.
    """
    problems: dict[str, Problem] = {}
    seen: set[tuple[str, str]] = set()
    for sample in samples:
        if sample.values.get("prompt") is None:
            raise UserError(
                f"sample {sample.id!r}/{sample.sample} has no key 'prompt'; "
                f"grade the file with solver_evaluate.py --samples_file, which adds it"
            )
        if sample.outcome not in ("right", "wrong", "unparsed") or not sample.response.strip():
            continue
        if (sample.id, sample.response) not in seen:
            seen.add((sample.id, sample.response))
            problem = problems.setdefault(sample.id, Problem(sample.prompt, [], [], []))
            getattr(problem, sample.outcome).append(sample)
    return problems
