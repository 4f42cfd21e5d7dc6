"""Data of a model's own making: second attempts at problems, and new problems whose answers it agrees on.

Each command with its flags, then what it computes.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from src import runlog
from src.command.config import Count, NonNegative, Seed, Share, flag
from src.construct.from_rows import normalized_question
from src.construct.samples import (
    SAMPLE_MORE,
    OneFileConfig,
    Row,
    SamplesConfig,
    check_prompts,
    has_verdict,
    read_graded,
    save,
)
from src.construct.weak_to_strong import votes
from src.data.examples import Sample, read_instruction_rows, read_samples
from src.errors import UserError
from src.grading.grader import Grader

REVISION = "{instruction}\n\n{attempt}\n\nVerdict: {verdict}.\n\n"  # what is asked for a second attempt
SEED_PROBLEM = "Problem: {instruction}\n\n"


@dataclass(frozen=True, kw_only=True)
class ReviseConfig(SamplesConfig):
    """Second attempts"""

    samples_file: str = flag(help="samples.jsonl with the first attempts and their outcomes")
    threshold: NonNegative = flag(0.0, """a verifier's verdict: right where a sample's score is at least this, as
        verifier_evaluate.py writes it; 0 = the grader's verdict, which a test must not see""")
    attempts_a_problem: Count = flag(4, "most first attempts at one problem; equal texts count once")
    keep_unsolved: bool = flag(False, """also attempts at problems that no sample solves: rows without 'output', to be
        attempted again""")
    seed: Seed = flag(1, "seed of the choice of attempts and solutions")


def revise(config: ReviseConfig) -> None:
    """Attempts with a verdict as problems, and right solutions as their outputs: data to train a reviser on, and what
    it is asked for a second attempt (solver_evaluate.py --label_file)."""
    rows = revisions(read_graded(config.samples_file), config.threshold, config.attempts_a_problem, config.seed)
    rows = [row for row in rows if config.keep_unsolved or row.get("output")]
    why_none = f"no problem has a right sample; {SAMPLE_MORE}"
    save(rows, "attempts", why_none, config.samples_file, config.save_file, config.dry_run)


def revisions(samples: Sequence[Sample], threshold: float, attempts_per_problem: int, seed: int) -> list[Row]:
    """Rows `{"id", "instruction", "label", "output"?}`. A right attempt is its own solution, so that it is kept; a
    wrong one has a right one of the same problem. Without a threshold samples need a verdict. Raises UserError for one
    without a score that is needed."""
    check_prompts(samples)
    generator, rows, attempts = random.Random(seed), [], defaultdict(dict)
    for sample in samples:
        if threshold or has_verdict(sample):
            attempts[sample.id].setdefault(sample.response.strip(), sample)
    for name, distinct in attempts.items():
        right = [text for text, sample in distinct.items() if sample.outcome == "right" and has_verdict(sample)]
        for text in generator.sample(list(distinct), min(attempts_per_problem, len(distinct))):
            sample, solution = distinct[text], text if text in right else generator.choice(right or [""])
            score = sample.values.get("score")
            if threshold and not isinstance(score, int | float):
                raise UserError(f"sample {name!r}/{sample.sample} has no score; score the file with "
                                "verifier_evaluate.py, or leave --threshold out")
            verdict = "right" if (score >= threshold if threshold else text in right) else "wrong"
            instruction = REVISION.format(instruction=sample.prompt, attempt=text, verdict=verdict)
            row = {"id": name if len(distinct) == 1 else f"{name}/{sample.sample}", "instruction": instruction,
                   "label": sample.values.get("label")}
            rows.append(row | sample.problem.answer_fields | ({"output": [solution]} if solution else {}))
    return rows


@dataclass(frozen=True, kw_only=True)
class InventConfig(OneFileConfig):
    """New problems from old ones"""

    train_file: str = flag(help='problems, rows with "instruction"')
    shots: Count = flag(2, "problems that are shown before each new one")
    rows_a_problem: Count = flag(4, "how often each problem is the one to write")
    seed: Seed = flag(1, "seed of the choice")


def invent(config: InventConfig) -> None:
    """Some problems, then another: data to train a questioner on, and what one, or a model that follows its prompt, is
    asked for new problems (solver_evaluate.py --task none --num_samples)."""
    texts = list(dict.fromkeys(str(row["instruction"]) for row in read_instruction_rows(config.train_file)))
    if len(texts) <= config.shots:
        raise UserError(f"{config.train_file} holds {len(texts)} problems; --shots {config.shots} needs more")
    generator, rows = random.Random(config.seed), []
    for text in texts * config.rows_a_problem:
        shown = generator.sample([other for other in texts if other != text], config.shots)
        prompt = "".join(SEED_PROBLEM.format(instruction=other) for other in shown) + "Problem:"
        rows.append({"instruction": prompt, "output": [f" {text}"]})
    save(rows, "rows", "", config.train_file, config.save_file, config.dry_run)


@dataclass(frozen=True, kw_only=True)
class ProblemsConfig(SamplesConfig):
    """New problems"""

    samples_file: str = flag(help="samples.jsonl of a questioner, as `invent` asks it")
    known_files: list[str] = flag(help="rows whose problems are not new, such as those to train and to test with")


def problems(config: ProblemsConfig) -> None:
    """The distinct problems that a questioner has finished, as prompts without labels."""
    known = {normalized_question(str(row["instruction"])) for file in config.known_files
             for row in read_instruction_rows(file)}
    samples = [sample for sample in read_samples(config.samples_file) if sample.finished]
    new = {normalized_question(s.response): s.response.strip() for s in samples if s.response.strip()}
    rows = [{"instruction": text} for name, text in new.items() if name not in known]
    runlog.logger().info("%d finished samples, %d of them distinct, %d new", len(samples), len(new), len(rows))
    save(rows, "problems", SAMPLE_MORE, config.samples_file, config.save_file, config.dry_run)


@dataclass(frozen=True, kw_only=True)
class AgreeConfig(SamplesConfig):
    """Answers by agreement"""

    samples_file: str = flag(help="samples.jsonl with several solutions of each problem; no label is read")
    task: str = flag(help="how answers are found and compared")
    share: Share = flag(0.5, "least share of a problem's samples that agree on its answer")
    solutions_a_problem: Count = flag(2, "most solutions of one problem; equal texts count once")


def agree(config: AgreeConfig) -> None:
    """Problems on whose answer most samples agree, with that answer as label and solutions that end in it."""
    with Grader(config.task) as grader:
        samples = [sample._replace(values=sample.values | {"answer": grader.answer(sample.response)})
                   for sample in read_samples(config.samples_file)]
        check_prompts(samples)
        found = votes(samples, grader.equal)
    fields = {sample.id: sample.problem.answer_fields for sample in samples}
    finished = {(sample.id, sample.response) for sample in samples if sample.finished}
    rows = [{"id": vote.id, "instruction": vote.prompt, "label": vote.answer, **fields[vote.id],
             "output": solutions[: config.solutions_a_problem]}
            for vote in found if vote.answer and vote.confidence >= config.share
            if (solutions := [text for text in dict.fromkeys(vote.positives) if (vote.id, text) in finished])]
    runlog.logger().info("%d of %d problems have an agreed answer", len(rows), len(found))
    why_none = f"on the answer of none do {config.share:.0%} agree"
    save(rows, "problems", why_none, config.samples_file, config.save_file, config.dry_run)
