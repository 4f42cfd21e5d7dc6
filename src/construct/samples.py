"""What every builder of training files starts and ends with: graded samples by problem in, a json array out."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from src import runlog
from src.command.config import Config, flag
from src.construct.continuation import split_into_steps, step_end_of
from src.data.examples import OUTCOMES, UNDECIDED, Sample, read_samples
from src.errors import UserError
from src.jsonfile import write_text
from src.text.blocks import ended_blocks, split_text

Row = dict[str, object]
ErrorPlace = Literal["solution", "executions"]
SAMPLE_MORE = "sample more a problem or at a higher temperature"
ONE_KIND = f"no problem has both a right and a wrong sample; {SAMPLE_MORE}"


@dataclass(frozen=True, kw_only=True)
class BuildConfig(Config):
    """The run"""

    dry_run: bool = flag(False, "count what would be sampled or written, and stop")


@dataclass(frozen=True, kw_only=True)
class OneFileConfig(BuildConfig):
    """The file to write"""

    save_file: str = flag(help="the json file to write")


@dataclass(frozen=True, kw_only=True)
class SamplesConfig(OneFileConfig):
    """Samples"""

    samples_file: str = flag(help="samples.jsonl with outcomes, as solver_evaluate.py leaves it")


@dataclass(frozen=True, kw_only=True)
class ErrorFlags(Config):
    """Solutions with errors"""

    error_phrases: list[str] = flag([], """leave out right solutions that hold one of these, in any case, such
        as: error apolog""")
    error_place: ErrorPlace = flag("solution", """where they are looked for: all of a solution, or only what
        its code printed, such as tracebacks""")

    def __post_init__(self) -> None:
        """Raise UserError for a place where nothing is looked for."""
        super().__post_init__()
        if not self.error_phrases:
            self.refuse(("error_place",), "there are no --error_phrases")


class GradedProblem(NamedTuple):
    """A problem's distinct responses by outcome, in the order of the file."""

    instruction: str
    right: list[Sample]
    wrong: list[Sample]
    unparsed: list[Sample]


def read_graded(samples_file: str) -> list[Sample]:
    """Read the samples of a graded file. Raises UserError for one without outcomes."""
    samples = read_samples(samples_file)
    if not any(sample.outcome for sample in samples):
        raise UserError(f"{samples_file} has no outcomes; grade it first with solver_evaluate.py --samples_file")
    return samples


def has_verdict(sample: Sample) -> bool:
    """Whether something can be learnt from a sample being right or not. A failure of the grader says nothing about it,
    and a right one that was cut off is no example: who learns it learns to end there."""
    return sample.outcome in OUTCOMES and sample.outcome not in UNDECIDED and (
        sample.outcome != "right" or sample.finished)


def check_prompts(samples: Sequence[Sample]) -> None:
    """Raise UserError for a sample without its prompt."""
    for sample in samples:
        if sample.values.get("prompt") is None:
            raise UserError(f"sample {sample.id!r}/{sample.sample} has no key 'prompt'; grade the file with "
                            "solver_evaluate.py --samples_file, which adds it")


def by_problem(samples: Sequence[Sample]) -> dict[str, GradedProblem]:
    """Group graded samples by problem id; equal texts of one problem count once, empty ones not at all.

    Samples without a verdict are left out. Raises UserError for one without its prompt.
    """
    problems: dict[str, GradedProblem] = {}
    seen: set[tuple[str, str]] = set()
    check_prompts(samples)
    for sample in samples:
        if not has_verdict(sample) or not sample.response.strip():
            continue
        if (sample.id, sample.response) not in seen:
            seen.add((sample.id, sample.response))
            problem = problems.setdefault(sample.id, GradedProblem(sample.prompt, [], [], []))
            getattr(problem, sample.outcome).append(sample)
    return problems


def read_without_errors(samples_file: str, errors: ErrorFlags) -> list[Sample]:
    """Read a graded file without the right samples that mention an error, and log how many those are."""
    samples = read_graded(samples_file)
    kept = without_phrases(samples, errors.error_phrases, errors.error_place)
    if errors.error_phrases:
        runlog.logger().info("%d right samples left out: they speak of an error", len(samples) - len(kept))
    return kept


def without_phrases(
    samples: Sequence[Sample], phrases: Sequence[str], place: ErrorPlace = "solution"
) -> list[Sample]:
    """Drop right samples whose response holds one of the phrases, in any case (Lu et al. 2024, released code).

    A solution that finds its own mistake on the way, or apologises for it, is no example to follow. With the place
    "executions" only what its code printed is searched, where tracebacks are: a text may well discuss the error of a
    measurement.
    """
    def searched(sample: Sample) -> str:
        """The text that phrases are looked for in, in one case."""
        if place == "solution":
            return sample.response.casefold()
        blocks = ended_blocks(split_text(sample.response))
        return "\n".join(block.content for block in blocks if block.kind == "execution").casefold()

    phrases = [phrase.casefold() for phrase in phrases]
    return [sample for sample in samples
            if sample.outcome != "right" or not any(phrase in searched(sample) for phrase in phrases)]


def without_similar(samples: Sequence[Sample], characters: int) -> list[Sample]:
    """Drop samples much like an earlier one of their problem and outcome: as many steps, and a length less than so
    many characters away (the released code of Step-Controlled DPO: 500). 0 keeps all."""
    kept: list[Sample] = []
    lengths_of: dict[tuple[str, str | None, int], list[int]] = {}
    for sample in samples:
        n_steps = len(split_into_steps(sample.response, step_end_of(sample.response)))
        lengths = lengths_of.setdefault((sample.id, sample.outcome, n_steps), [])
        if all(abs(len(sample.response) - length) >= characters for length in lengths):
            lengths.append(len(sample.response))
            kept.append(sample)
    return kept


def save(rows: Sequence[Row], what: str, why_none: str, source: str, save_file: str, dry_run: bool) -> None:
    """Write a json array, whole or not at all, and log what it holds. Raises UserError if there is nothing to write."""
    if not rows:
        raise UserError(f"{source} gives no {what}: {why_none}")
    if not dry_run:
        # default: parquet may hold dates
        write_text(save_file, json.dumps(rows, indent=1, ensure_ascii=False, default=str) + "\n")
    problems = len({row["instruction"] for row in rows})
    ending = "" if dry_run else f" to {save_file}"
    runlog.logger().info("%d %s from %d problems%s", len(rows), what, problems, ending)


def log_counts(counts: Counter[str]) -> None:
    """Log how many problems ended how."""
    runlog.logger().info("problems: %s", ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
