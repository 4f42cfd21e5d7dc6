"""Supervision from a weak model (Yang et al. 2024, Weak-to-Strong Reasoning): agreement, votes, contrast.

Nothing here reads a gold answer: only `answer`, what was found in a response, and never `label` or `outcome`.
"""

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from src.data.examples import Sample, Vote
from src.errors import UserError
from src.evaluation.metrics import Equal, answer_classes, weighted_vote
from src.grading.answer_types import AnswerType
from src.jsonfile import read_json

Row = dict[str, object]


class Agreement(NamedTuple):
    """Rows of the weak model, of the strong one, both in turns, and what became of every problem."""

    weak: list[Row]
    icl: list[Row]
    hybrid: list[Row]
    counts: Counter[str]


class Contrast(NamedTuple):
    """Pairs, and what became of every problem."""

    pairs: list[Row]
    counts: Counter[str]


def normalized_question(text: str) -> str:
    """A question as it counts for being the same: letters in one case and one width, words apart by one space."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def split_problems(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows `{"instruction", ...}` in two parts that have no question in common, both in the order of the file.

    The first part has `share` of the questions; which ones follows from the seed.
    """
    questions = sorted({normalized_question(str(row["instruction"])) for row in rows})
    first = set(random.Random(seed).sample(questions, round(share * len(questions))))
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        sides[normalized_question(str(row["instruction"])) not in first].append(row)
    return sides


def overlap(rows: Iterable[Row], test: Iterable[Row]) -> set[str]:
    """The normalised questions that both have."""
    first, second = ({normalized_question(str(row["instruction"])) for row in side} for side in (rows, test))
    return first & second


def one_each(samples: Sequence[Sample], source: str) -> dict[str, Sample]:
    """The samples by problem, one of each. Raises UserError for a second one."""
    found: dict[str, Sample] = {}
    for sample in samples:
        if sample.id in found:
            raise UserError(
                f"{source} has several samples of problem {sample.id!r}; expected one, of greedy decoding"
            )
        found[sample.id] = sample
    return found


def instruction_row(sample: Sample) -> Row:
    """A response as something to be imitated, without the blanks around it that a few-shot prompt's form brings."""
    return {"id": sample.id, "instruction": sample.prompt, "output": sample.response.strip()}


def demonstrations(samples: dict[str, Sample], shots: int, seed: int) -> list[Row]:
    """Responses that hold an answer, right or wrong, drawn by the seed, to show the strong model (section 3.1)."""
    answered = [sample for sample in samples.values() if answer_of(sample)]
    if len(answered) < shots:
        raise UserError(f"{len(answered)} responses hold an answer, fewer than --shots {shots}; lower it")
    return [instruction_row(sample) for sample in random.Random(seed).sample(answered, shots)]


def shown_problems(file: str) -> list[str]:
    """The problems of a file of demonstrations. Raises UserError for one that does not name them."""
    rows = read_json(Path(file)).get("demonstrations")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "id" in row for row in rows):
        raise UserError(
            f"{file}: expected an id in each row of 'demonstrations', as data_build.py demonstrations leaves it"
        )
    return [str(row["id"]) for row in rows]


def agreement(
    weak: dict[str, Sample],
    icl: dict[str, Sample],
    equal: Equal,
    shown: Collection[str] = (),
    *,
    fill_up_to: int = -1,
    seed: int = 1,
) -> Agreement:
    """Problems to which both models give an answer and the same one (section 3.1): rows of either, and in turns.

    shown: problems that the strong model saw with their weak solution, which are left out. fill_up_to: where fewer are
    kept, problems of two different answers, drawn by the seed, until there are so many, in the order of the file; the
    paper's sets for MATH are filled so. Raises UserError unless both have the same problems.
    """
    if weak.keys() != icl.keys():
        other = sorted(weak.keys() ^ icl.keys())[0]
        raise UserError(
            f"problem {other!r} was answered by one of the two models only; sample both to the end"
        )
    counts: Counter[str] = Counter()
    kept: dict[str, tuple[Row, Row]] = {}
    apart: dict[str, tuple[Row, Row]] = {}
    for name, first in weak.items():
        second = icl[name]
        if first.prompt != second.prompt:
            raise UserError(
                f"problem {name!r} is {first.prompt[:40]!r} to one model and another to the other"
            )
        answers = answer_of(first), answer_of(second)
        if name in shown:
            counts["shown as demonstrations"] += 1
        elif None in answers:
            counts["without an answer"] += 1
        elif not typed(equal, first)(*answers):
            counts["of different answers"] += 1
            apart[name] = instruction_row(first), instruction_row(second)
        else:
            counts["kept"] += 1
            kept[name] = instruction_row(first), instruction_row(second)
    drawn = random.Random(seed).sample(sorted(apart), min(max(0, fill_up_to - len(kept)), len(apart)))
    if drawn:
        counts["kept although of different answers"] = len(drawn)
        kept |= {name: apart[name] for name in drawn}
    pairs = [kept[name] for name in weak if name in kept]
    rows = [[pair[side] for pair in pairs] for side in (0, 1)]
    return Agreement(*rows, [row for pair in pairs for row in pair], counts)


def typed(equal: Equal, sample: Sample) -> Equal:
    """`equal` with the kind of answer that the sample's problem has, where it names one."""
    kind, tolerance = (sample.values.get(key) for key in ("answer_type", "tolerance"))
    if not kind and not tolerance:
        return equal
    return partial(equal, answer_type=AnswerType(str(kind or ""), float(tolerance or 0.0)))


class Kept(NamedTuple):
    """What a filter kept of the problems, and how many of either are right: the report of a stage."""

    problems: int
    kept: int
    right: int
    right_of_kept: int

    def words(self) -> str:
        """The report as a sentence."""
        return (
            f"{self.kept} of {self.problems} problems kept; right: {self.right_of_kept / self.kept:.1%} of the kept, "
            f"{self.right / self.problems:.1%} of all"
        )


def kept_right(rows: Iterable[Row], samples: dict[str, Sample]) -> Kept:
    """How pure the rows of a stage are by the outcomes of the samples they were made of: the one place that reads gold.

    Raises UserError for a row whose response is not the sample's, and for samples without outcomes.
    """
    names = set()
    for row in rows:
        name = str(row.get("id"))
        if name not in samples or instruction_row(samples[name])["output"] != row.get("output"):
            raise UserError(
                f"the row of problem {name!r} is not made of these samples; give those that it is made of"
            )
        names.add(name)
    right = {name for name, sample in samples.items() if sample.outcome == "right"}
    if not any(sample.outcome for sample in samples.values()) or not names:
        raise UserError(
            "the samples have no outcomes to report; grade them with labels by solver_evaluate.py"
        )
    return Kept(len(samples), len(names), len(right), len(right & names))


def answer_of(sample: Sample) -> str | None:
    """What was found in a response; None for nothing, and for an empty answer."""
    answer = sample.values.get("answer")
    return answer if isinstance(answer, str) and answer else None


def votes(samples: Sequence[Sample], equal: Equal) -> list[Vote]:
    """The majority among the samples of each problem; of answers with as many votes the one seen first wins.

    Raises UserError where problems have unequal numbers of samples, for their confidences would mean different things.
    """
    problems: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.sample):
        problems.setdefault(sample.id, []).append(sample)
    order = dict.fromkeys(sample.id for sample in samples)
    most = max(map(len, problems.values()))
    found = []
    for name in order:
        group = problems[name]
        if len(group) != most:
            raise UserError(f"problem {name!r} has {len(group)} samples, others {most}; sample it to the end")
        found.append(_vote(group, equal))
    return found


def _vote(group: Sequence[Sample], equal: Equal) -> Vote:
    classes = answer_classes([answer_of(sample) for sample in group], typed(equal, group[0]))
    top = weighted_vote(classes, [1] * len(classes))
    sides: tuple[list[str], list[str]] = ([], [])
    for sample, place in zip(group, classes, strict=True):
        sides[top is None or place != top].append(sample.response)
    answer = None if top is None else answer_of(group[top])
    return Vote(group[0].id, group[0].prompt, answer, len(sides[0]) / len(group), *sides)


def contrast(
    found: Sequence[Vote],
    weak: dict[str, Sample],
    equal: Equal,
    *,
    min_confidence: float,
    flip_confidence: float,
    pairs_a_problem: int,
    seed: int,
) -> Contrast:
    """Pairs with the weak model's response on one side and the strong one's samples on the other (section 3.2).

    Where the weak answer is the majority's, it is chosen over samples with another answer; where it is not, and the
    confidence reaches flip_confidence, samples of the majority are chosen over it. Raises UserError for a problem that
    the weak model has not answered.
    """
    generator = random.Random(seed)
    counts: Counter[str] = Counter()
    pairs: list[Row] = []
    for vote in found:
        if vote.id not in weak or weak[vote.id].prompt != vote.prompt:
            raise UserError(
                f"problem {vote.id!r} of the votes has no sample of the weak model, or is another problem"
            )
        sample = weak[vote.id]
        answer = answer_of(sample)
        agrees = answer is not None and vote.answer is not None and typed(equal, sample)(answer, vote.answer)
        others = [text for text in dict.fromkeys(vote.negatives if agrees else vote.positives) if text.strip()]
        if vote.answer is None or vote.confidence < min_confidence:
            counts["of low confidence"] += 1
        elif not agrees and vote.confidence < flip_confidence:
            counts["not sure enough against the weak answer"] += 1
        elif not sample.response.strip() or not others:
            counts["with nothing to contrast"] += 1
        else:
            drawn = generator.sample(others, min(pairs_a_problem, len(others)))
            counts["weak chosen" if agrees else "weak rejected"] += 1
            pairs += [_pair(vote, sample.response, other, agrees) for other in drawn]
    return Contrast(pairs, counts)


def _pair(vote: Vote, weak: str, strong: str, weak_chosen: bool) -> Row:
    chosen, rejected = (weak, strong) if weak_chosen else (strong, weak)
    return {
        "id": vote.id,
        "instruction": vote.prompt,
        "chosen": chosen,
        "rejected": rejected,
        "weak": "chosen" if weak_chosen else "rejected",
    }
