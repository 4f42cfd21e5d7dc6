"""Training files -> parts, mixes and concatenations of them. Each command with its flags, then what it computes."""

import random
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from src import runlog
from src.command.config import Seed, Share, flag
from src.construct.samples import BuildConfig, OneFileConfig, Row, by_problem, read_graded, save
from src.data.encoding import STEP_END
from src.data.examples import StepLabels, read_instruction_rows, read_pairs, read_prompts, read_step_labels
from src.errors import UserError
from src.evaluation.prompting import select_prompts


@dataclass(frozen=True, kw_only=True)
class SelectConfig(OneFileConfig):
    """Rows"""

    train_file: str = flag(help='rows with "instruction"')
    split: str = flag("", """level=1-3, subject=Algebra|Geometry, or a name that stands under "split"; a comma
        means and""")
    samples_file: str = flag("", """graded samples.jsonl of these problems: keeps those that some samples, not
        all, solve, which group advantages learn from""")


def select(config: SelectConfig) -> None:
    """The rows of a data file whose problems a split names, or are of middling difficulty, with all their keys."""
    prompts = read_prompts(config.train_file, need_label=False)
    rows = read_instruction_rows(config.train_file)
    chosen = {prompt.id for prompt in select_prompts(prompts, config.split)}
    kept = [row for prompt, row in zip(prompts, rows, strict=True) if prompt.id in chosen]
    if config.samples_file:
        problems = by_problem(read_graded(config.samples_file)).values()
        middling = {problem.instruction for problem in problems
                    if problem.right and (problem.wrong or problem.unparsed)}
        kept = [row for row in kept if row["instruction"] in middling]
    why_none = "none is in the split, or some samples of it right and some wrong"
    save(kept, "rows", why_none, config.train_file, config.save_file, config.dry_run)


@dataclass(frozen=True, kw_only=True)
class SplitRowsConfig(BuildConfig):
    """Two parts"""

    train_file: str = flag(help='rows with "instruction"; all their keys are kept')
    first_file: str = flag(help="the json file for the first part")
    second_file: str = flag(help="the json file for the second part")
    test_file: str = flag("", "rows none of whose questions may be in train_file")
    share: Share = flag(0.5, "share of the questions in the first part")
    allow_overlap: bool = flag(False, """leave out what is in test_file, and count it, instead of ending with an
        error""")
    seed: Seed = flag(1, "seed of the choice")

    def __post_init__(self) -> None:
        """Raise UserError for an overlap with nothing."""
        super().__post_init__()
        if not self.test_file:
            self.refuse(("allow_overlap",), "there is no --test_file")


def split(config: SplitRowsConfig) -> None:
    """Instruction data in two parts without a question in common: one to teach the weak model, one for it to label.

    Questions that differ in case, width or blanks count as the same.
    """
    train_file, test_file = config.train_file, config.test_file
    rows = read_instruction_rows(train_file)
    shared = _questions(rows) & _questions(read_instruction_rows(test_file)) if test_file else set()
    if shared and not config.allow_overlap:
        raise UserError(f"{len(shared)} questions of {train_file} are in {test_file}, such as {min(shared)[:60]!r}; "
                        f"drop them with --allow_overlap")
    kept = [row for row in rows if normalized_question(row["instruction"]) not in shared]
    questions = sorted(_questions(kept))
    of_first = set(random.Random(config.seed).sample(questions, round(config.share * len(questions))))
    first, second = ([row for row in kept if (normalized_question(row["instruction"]) in of_first) is is_first]
                     for is_first in (True, False))
    if test_file:
        runlog.logger().info("%d of %d rows left out: in the test file", len(rows) - len(kept), len(rows))
    if not first or not second:  # before one of them is written
        raise UserError(f"--share {config.share} of {len(questions)} questions of {train_file} leaves one part none; "
                        "take another share")
    for part, file in ((first, config.first_file), (second, config.second_file)):
        save(part, "rows", "", train_file, file, config.dry_run)


def _questions(rows: Iterable[Row]) -> set[str]:
    return {normalized_question(row["instruction"]) for row in rows}


def normalized_question(text: str) -> str:
    """Normalise a question for comparison: one case, one width of letters, one space between words."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


@dataclass(frozen=True, kw_only=True)
class MixConfig(OneFileConfig):
    """Pairs"""

    pairs_file: str = flag(help="ordinary pairs, as `pairs` leaves them")
    branch_file: str = flag(help="step-controlled pairs, as `branch` leaves them; all are taken")
    control_file: str = flag("", """json file for as many ordinary pairs, those of the mix among them""")
    share: Share = flag(0.5, "share of ordinary pairs in the mix")
    seed: Seed = flag(1, "seed of the choice and of the order of rows")


def mix(config: MixConfig) -> None:
    """Ordinary and step-controlled pairs in one file, and a file of as many ordinary ones to compare with."""
    for file in (config.pairs_file, config.branch_file):
        list(read_pairs(file))  # names the row that is no pair
    ordinary, branched = read_instruction_rows(config.pairs_file), read_instruction_rows(config.branch_file)
    mixed, control = mixed_pairs(ordinary, branched, config.share, config.seed, needs_control=bool(config.control_file))
    save(mixed, "pairs", "", config.pairs_file, config.save_file, config.dry_run)
    if config.control_file:
        save(control, "pairs", "", config.pairs_file, config.control_file, config.dry_run)


def mixed_pairs(
    ordinary: Sequence[Row], branched: Sequence[Row], share: float, seed: int, *, needs_control: bool = True
) -> tuple[list[Row], list[Row]]:
    """Mix all step-controlled pairs with ordinary ones, `share` of the mix, and choose a control of equal size.

    The control has ordinary pairs alone, those of the mix among them (Lu et al. 2024, section 4.1, "data-equal"); one
    that nobody needs may be smaller. Raises UserError when there are too few.
    """
    total = round(len(branched) / (1 - share)) if share < 1 else 0
    needed = total if needs_control else total - len(branched)
    if not len(branched) < total or len(ordinary) < needed:
        raise UserError(f"{len(branched)} step-controlled pairs and a --share {share} of ordinary ones make {total} "
                        f"rows, which with the control of --control_file, if any, needs {needed} ordinary pairs; found "
                        f"{len(ordinary)}: sample more, or take another share")
    generator = random.Random(seed)
    control = generator.sample(list(ordinary), min(total, len(ordinary)))
    mixed = [*control[: total - len(branched)], *branched]
    generator.shuffle(mixed)
    generator.shuffle(control)
    return mixed, control


@dataclass(frozen=True, kw_only=True)
class JoinConfig(OneFileConfig):
    """Solutions"""

    train_file: str = flag(help="labelled steps, as `process` leaves them, or outcomes, as `outcome` does")
    save_file: str = flag(help="the json file to write, with rows of the same kind")
    share: Share = flag(0.5, """share of the rows that get another problem's solution in front; the others stay
        as they are""")
    wrong_share: Share = flag(0.3, """share of wrong ones among the solutions in front; what comes after them
        counts as wrong""")
    seed: Seed = flag(1, "seed of the choice")


def join(config: JoinConfig) -> None:
    """Labelled solutions, some after that of another problem, so that a verifier learns from longer ones.

    A verifier of problems harder than those that it learns from needs this: their solutions have more steps.
    """
    source = config.train_file
    rows = concatenated(list(read_step_labels(source)), config.share, config.wrong_share, config.seed, source)
    written = [row.values if was.get("steps") is not None else
               {"instruction": row.instruction, "output": STEP_END.join(row.steps), "correct": row.labels[-1] == 1.0}
               for row, was in zip(rows, read_instruction_rows(source), strict=True)]
    save(written, "judged solutions", "", source, config.save_file, config.dry_run)


def concatenated(
    rows: Sequence[StepLabels], share: float, wrong_share: float, seed: int, source: str
) -> list[StepLabels]:
    """Put another problem's solution in front of a share of the rows; a row never follows its own problem.

    A verifier that has seen short solutions alone takes "late" for "wrong", and after another solution every step
    comes late. Of the solutions in front wrong_share are wrong, and then all that follows is wrong, too: without
    these a verifier learns to forgive mistakes far back. Raises UserError where the file `source` has no solution of a
    kind that is needed.
    """
    generator = random.Random(seed)
    # A solution that is wrong somewhere but right at its end is neither: it got there by luck.
    right = [row for row in rows if not _has_mistake(row) and row.labels[-1] is not None]
    wrong = [row for row in rows if _has_mistake(row) and (row.labels[-1] or 0) < 0.5]
    for kind, solutions, is_needed in (("right", right, wrong_share < 1), ("wrong", wrong, wrong_share > 0)):
        if is_needed and not solutions:
            raise UserError(f"{source} has no {kind} solution to put in front of others; set --wrong_share "
                            f"{int(kind == 'right')}, or judge more")
    result = []
    for row in rows:
        front = generator.choice(wrong if generator.random() < wrong_share else right)
        stays = generator.random() >= share or front.instruction == row.instruction
        result.append(row if stays else concatenate(front, row))
    return result


def concatenate(front: StepLabels, row: StepLabels) -> StepLabels:
    """Make one solution of two: both problems as one instruction, then the steps of both. The final answer of the one
    in front is left out, unless it is the only step or the first mistake."""
    n_front = len(front.steps)
    if n_front > 1 and not (_has_mistake(front) and not _has_mistake(front, n_front - 1)):
        n_front -= 1
    labels = [0.0] * len(row.labels) if _has_mistake(front) else row.labels
    return StepLabels(f"{front.instruction} {row.instruction}", [*front.steps[:n_front], *row.steps],
                      [*front.labels[:n_front], *labels])


def _has_mistake(row: StepLabels, n_steps: int | None = None) -> bool:
    """Whether one of the first steps, or of all, is known to be wrong: its label is below one half."""
    return any(label is not None and label < 0.5 for label in row.labels[:n_steps])
