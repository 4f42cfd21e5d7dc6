"""Published benchmarks that are alike but for the names of their columns, as one table."""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

from dataset.benchmarks import optional, with_choices
from dataset.raw import LeftOut, RawRow, Row
from src.data import rows
from src.errors import UserError
from src.grading.extract import last_box
from src.grading.letters import LETTERS


class Reader(NamedTuple):
    """The columns of a published file; of several names the first that a row has counts.

    choices: a column with a list of texts or {"text": [...], "label": [...]}; the answer is then a place from 0, one
    of those labels, or a letter. wrong: columns with the wrong choices, the answer being the right one. typed: the kind
    of answer by what stands in the column `kind` or, without one, by the answer's own words.
    """

    question: tuple[str, ...]
    answer: tuple[str, ...]
    choices: str = ""
    wrong: tuple[str, ...] = ()
    typed: Mapping[str, str] = {}
    kind: str = ""
    before: str = ""  # a text that the question is about
    names: Mapping[str, str] = {}  # ours -> theirs


WORDS = {  # of an answer, in small letters -> its kind
    "true": "true_false", "false": "true_false", "yes": "yes_no", "no": "yes_no", "valid": "valid_invalid",
    "invalid": "valid_invalid", **{f"({letter})": "choice" for letter in LETTERS.lower()},
}
OLYMPIC = {
    "mc": "choice", "tf": "true_false", "nv": "number", "set": "set", "in": "interval", "ex": "expression",
    "eq": "equation", "tup": "tuple",
}
CONTEST = Reader(("problem", "Problem", "question"), ("answer", "Answer"), names={"id": "id"})
READERS: dict[str, Reader] = {
    "aime24": CONTEST,  # HuggingFaceH4/aime_2024, and Maxwell-Jia/AIME_2024 with capitals
    "aime25": CONTEST,  # opencompass/AIME2025, math-ai/aime25
    "amc23": CONTEST,  # math-ai/amc23, AI-MO/aimo-validation-amc
    "hmmt": CONTEST._replace(names={"id": "problem_idx"}),  # MathArena/hmmt_feb_2025
    # math-ai/minervamath; minerva_math of Qwen2.5-Math's evaluation, whose solutions hold the answer in a box
    "minerva": Reader(("problem", "question"), ("answer", "solution"), names={"subject": "type"}),
    # Idavidrein/gpqa, gpqa_diamond.csv
    "gpqa": Reader(("Question",), ("Correct Answer",), wrong=tuple(f"Incorrect Answer {n}" for n in (1, 2, 3)),
                   names={"id": "Record ID", "subject": "High-level domain"}),
    "mmlu": Reader(("question",), ("answer",), "choices", names={"subject": "subject"}),  # cais/mmlu
    "arc": Reader(("question",), ("answerKey",), "choices", names={"id": "id"}),  # allenai/ai2_arc
    "commonsenseqa": Reader(("question",), ("answerKey",), "choices", names={"id": "id"}),  # tau/commonsense_qa
    "bbh": Reader(("input",), ("target",), typed=WORDS),  # lukaemon/bbh: targets (A), True, yes, valid, or a value
    # ruixiangcui/AGIEval, data/v1_1: options "(A)..." or null, then the answer stands under 'answer'
    "agieval": Reader(("question",), ("label", "answer"), "options", before="passage"),
    # GAIR/OlympicArena, whose validation split has answers
    "olympicarena": Reader(("problem",), ("answer",), typed=OLYMPIC, kind="answer_type",
                           names={"id": "id", "subject": "subject"}),
}


def table_row(reader: Reader, raw: RawRow) -> Row:
    """A row of ours by the columns that the reader names. Raises UserError for a row that does not fit."""
    question = raw.text(*reader.question).strip()
    if reader.before and reader.before in raw.fields and str(raw.fields[reader.before]).strip():
        question = f"{raw.text(reader.before).strip()}\n{question}"
    row: Row = optional(raw, **reader.names)
    if reader.wrong:
        return row | _shuffled(reader, raw, question)
    if reader.choices and raw.fields.get(reader.choices):
        return row | _chosen(reader, raw, question) | {"answer_type": "choice"}
    label = _answer(reader, raw)
    row |= {"instruction": question, "label": label}
    if reader.typed:
        found = raw.text(reader.kind) if reader.kind else label
        kind = reader.typed.get(found.strip().lower(), "")
        if reader.kind and not kind:
            raise LeftOut(f"with answers of kind {found}")
        row |= {"answer_type": kind} if kind else {}
    return row


def _answer(reader: Reader, raw: RawRow) -> str:
    """The answer as a text; of a solution what its last box holds."""
    name = next((name for name in reader.answer if raw.fields.get(name) not in (None, "", [])), None)
    if name is None:
        raise LeftOut("without a published answer")
    value = raw.fields[name]
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    text = rows.Row(raw.place, {name: value}).optional_text(name)
    if name == "solution":
        box = last_box(text or "")
        if box is None:
            raise UserError(rf"{raw.place}: expected a closed \boxed{{...}} in 'solution', found {str(text)[-60:]!r}")
        text = box.text
    return str(text).strip().strip("$")


def _chosen(reader: Reader, raw: RawRow, question: str) -> Row:
    """A multiple choice whose choices stand in one column."""
    found = raw.fields[reader.choices]
    texts = found.get("text") if isinstance(found, dict) else found
    names = found.get("label") if isinstance(found, dict) else None
    if not isinstance(texts, list) or not 2 <= len(texts) <= len(LETTERS) or not all(
            isinstance(text, str) for text in texts) or names is not None and (
            not isinstance(names, list) or len(names) != len(texts)):
        raise UserError(f"{raw.place}: expected 2 to {len(LETTERS)} texts under {reader.choices!r}, "
                        f"found {str(found)[:80]}")
    texts = [text.removeprefix(f"({LETTERS[n]})").strip() for n, text in enumerate(texts)]
    name = next((name for name in reader.answer if raw.fields.get(name) is not None), reader.answer[0])
    answer, places = raw.fields.get(name), names or LETTERS[: len(texts)]
    is_place = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts)
    if not is_place and (not isinstance(answer, str) or not answer or answer not in [*places]):
        raise UserError(f"{raw.place}: expected a place or one of {', '.join(places)} under {name!r}, found {answer!r}")
    return with_choices(question, texts, answer if is_place else [*places].index(answer))


def _shuffled(reader: Reader, raw: RawRow, question: str) -> Row:
    """A multiple choice of a right column and wrong ones, in an order that the texts alone decide."""
    right, wrong = raw.text(*reader.answer).strip(), [raw.text(name).strip() for name in reader.wrong]
    texts = sorted([right, *wrong], key=lambda text: hashlib.sha256(f"{question}\n{text}".encode()).digest())
    return with_choices(question, texts, texts.index(right))
