"""Graded samples -> pairs, outcomes and demonstrations. Each command with its flags, then what it computes."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from src.command.config import AtLeastOne, Count, CountOrZero, NonNegative, Seed, flag
from src.construct.samples import (
    ONE_KIND,
    SAMPLE_MORE,
    ErrorFlags,
    Row,
    SamplesConfig,
    by_problem,
    read_graded,
    read_without_errors,
    save,
    without_similar,
)
from src.data.examples import Sample
from src.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PairsConfig(SamplesConfig, ErrorFlags):
    """Pairs"""

    pairs_a_problem: Count = flag(4, "most pairs from one problem")
    similar_characters: CountOrZero = flag(0, """leave out a solution of as many steps as an earlier one of its
        problem and outcome whose length is less than so many characters away; 0 = keep all""")
    seed: Seed = flag(1, "seed of the matching and of the order of rows")


def pairs(config: PairsConfig) -> None:
    """A right against a wrong solution of the same problem, for verifier_train.py."""
    samples = without_similar(read_without_errors(config.samples_file, config), config.similar_characters)
    rows = pairs_from_samples(samples, config.pairs_a_problem, config.seed)
    save(rows, "pairs", ONE_KIND, config.samples_file, config.save_file, config.dry_run)


def pairs_from_samples(samples: Sequence[Sample], pairs_per_problem: int, seed: int) -> list[Row]:
    """Pair right with wrong solutions of the same problem: rows `{"instruction", "chosen", "rejected"}`, shuffled.

    The i-th of the shuffled right ones is paired with the i-th of the wrong ones, the shorter list repeating. Wrong
    answers come before missing ones (unparsed), which any verifier recognises. Raises UserError for a sample without
    its prompt.
    """
    generator = random.Random(seed)
    rows: list[Row] = []
    for problem in by_problem(samples).values():
        for solutions in (problem.right, problem.wrong, problem.unparsed):
            generator.shuffle(solutions)
        right, wrong = problem.right, problem.wrong + problem.unparsed
        if right and wrong:
            rows += [{"instruction": problem.instruction, "chosen": right[i % len(right)].response,
                      "rejected": wrong[i % len(wrong)].response}
                     for i in range(min(pairs_per_problem, max(len(right), len(wrong))))]
    generator.shuffle(rows)
    return rows


@dataclass(frozen=True, kw_only=True)
class OutcomeConfig(SamplesConfig):
    """Outcomes"""

    max_ratio: AtLeastOne = flag(3.0, """within a problem, at most so many times as many of one kind as of the
        other""")
    rows_a_problem: Count = flag(32, "most rows from one problem")
    seed: Seed = flag(1, "seed of the choice and of the order of rows")


def outcome(config: OutcomeConfig) -> None:
    """Solutions with the word whether they are right, for verifier_train.py --objective outcome."""
    samples = read_graded(config.samples_file)
    rows = outcome_rows(samples, config.max_ratio, config.rows_a_problem, config.seed)
    save(rows, "solutions", ONE_KIND, config.samples_file, config.save_file, config.dry_run)


def outcome_rows(samples: Sequence[Sample], max_ratio: float, rows_per_problem: int, seed: int) -> list[Row]:
    """Make rows `{"instruction", "output", "correct"}` of an outcome verifier (Sun et al. 2024, section 4.1).

    A problem has at most max_ratio times as many of one kind as of the other, so one without both kinds gives none:
    from it a verifier would learn the problem, not the solution.
    """
    generator = random.Random(seed)
    rows: list[Row] = []
    for problem in by_problem(samples).values():
        right, wrong = problem.right, problem.wrong + problem.unparsed
        n_fewer = min(len(right), len(wrong))
        for solutions in (right, wrong):
            generator.shuffle(solutions)
            del solutions[int(max_ratio * n_fewer) :]
        # right and wrong alternate, so that the limit below cuts both alike; the rest of the longer list follows
        n_turns = min(len(right), len(wrong))
        turns = [sample for pair in zip(right, wrong, strict=False) for sample in pair]
        rows += [
            {"instruction": problem.instruction, "output": sample.response, "correct": sample.outcome == "right"}
            for sample in (turns + right[n_turns:] + wrong[n_turns:])[:rows_per_problem]]
    generator.shuffle(rows)
    return rows


@dataclass(frozen=True, kw_only=True)
class RejectConfig(SamplesConfig):
    """Demonstrations"""

    solutions_a_problem: Count = flag(10, "most solutions of one problem; equal texts count once")
    seed: Seed = flag(1, "seed of the choice")


def reject(config: RejectConfig) -> None:
    """Right samples as instruction data for solver_train.py (rejection sampling, ReST-EM)."""
    samples = read_graded(config.samples_file)
    rows = right_solutions(samples, config.solutions_a_problem, config.seed)
    why_none = f"no sample is right; {SAMPLE_MORE}"
    save(rows, "problems with solutions", why_none, config.samples_file, config.save_file, config.dry_run)


def right_solutions(samples: Sequence[Sample], solutions_per_problem: int, seed: int) -> list[Row]:
    """Choose right samples of each problem as its outputs (the E-step of ReST-EM, Singh et al. 2023, section 4)."""
    generator = random.Random(seed)
    rows: list[Row] = []
    for problem in by_problem(samples).values():
        chosen = generator.sample(problem.right, min(solutions_per_problem, len(problem.right)))
        if chosen:
            rows.append({"instruction": problem.instruction, "output": [sample.response for sample in chosen]})
    return rows


@dataclass(frozen=True, kw_only=True)
class PreferConfig(SamplesConfig):
    """Preferences"""

    samples_file: str = flag(help="""scored samples.jsonl with outcomes, as verifier_evaluate.py leaves it with
        a verifier whose scores are probabilities (outcome or process)""")
    margin: NonNegative = flag(1.0, "score (0 to 1) plus 1 for a right answer must differ by more than this")
    pairs_a_problem: Count = flag(3, "most pairs from one problem")
    seed: Seed = flag(1, "seed of the choice and of the order of rows")


def prefer(config: PreferConfig) -> None:
    """Pairs that differ in the verifier's score and the answer together, for preference training."""
    samples = read_graded(config.samples_file)
    rows = preferred_pairs(samples, config.margin, config.pairs_a_problem, config.seed)
    why_none = f"no two samples of a problem differ by more than {config.margin}; {SAMPLE_MORE}"
    save(rows, "pairs", why_none, config.samples_file, config.save_file, config.dry_run)


def preferred_pairs(samples: Sequence[Sample], margin: float, pairs_per_problem: int, seed: int) -> list[Row]:
    """Pair samples whose rewards, scores plus 1 where right, differ by more than `margin` (Sun et al. 2024,
    Easy-to-Hard, iterative DPO: margin 1, at most 3 a problem). Raises UserError for a score that is no probability."""
    generator = random.Random(seed)
    rows: list[Row] = []
    for problem in by_problem(samples).values():
        rewarded = []
        for sample in (*problem.right, *problem.wrong, *problem.unparsed):
            score = sample.values.get("score")
            if not isinstance(score, int | float) or not 0 <= score <= 1:
                raise UserError(f"sample {sample.id!r}/{sample.sample} has the score {score!r}; expected a "
                                "probability: score the samples with verifier_evaluate.py and an outcome or process "
                                "verifier")
            rewarded.append((score + (sample.outcome == "right"), sample))
        apart = [(one, other) for reward, one in rewarded for lower, other in rewarded if reward - lower > margin]
        for chosen, rejected in generator.sample(apart, min(pairs_per_problem, len(apart))):
            rows.append({"instruction": problem.instruction, "chosen": chosen.response, "rejected": rejected.response})
    generator.shuffle(rows)
    return rows
