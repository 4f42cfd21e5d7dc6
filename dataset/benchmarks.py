"""Published benchmarks to prompts with labels and reference solutions."""

import math
import re

from dataset.raw import LeftOut, RawRow, Row
from src.data import rows
from src.errors import UserError
from src.grading.extract import last_box
from src.grading.letters import LETTERS
from src.grading.normalize import rational

CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")       # <<48/2=24>> in GSM8K: a hint for a tool we do not have


def gsm8k_row(raw: RawRow) -> Row:
    """A GSM8K row; the label is the number behind the last ####, which stays in the output, and the level the number of
    lines before it, which are the solution's steps."""
    solution = CALCULATOR_MARK.sub("", raw.text("answer"))
    steps, mark, label = solution.rpartition("####")
    label = label.strip().replace(",", "")
    if not mark or rational(label) is None:
        raise UserError(f"{raw.place}: expected 'answer' to end in a line '#### number', found {solution[-60:]!r}")
    n_steps = sum(bool(line.strip()) for line in steps.splitlines())
    return {"instruction": raw.text("question"), "output": [solution], "label": label, "level": n_steps}


def abel_row(raw: RawRow) -> Row:
    """GSM8K with the problems that Abel adds, as the weak-to-strong data hold them (Yang et al. 2024): {"id": "gsm8k_2"
    or "aug_5", "question", "answer"}, or with the answer as "solution"; the id says which part a row is of."""
    row = gsm8k_row(raw._replace(fields=raw.fields | {"answer": raw.text("solution", "answer")}))
    name = optional(raw, name="id").get("name", "")
    return row | ({"split": "augmented" if name.startswith("aug") else "original"} if name else {})


def math_row(raw: RawRow) -> Row:
    r"""A MATH row; the label is the content of the last \boxed."""
    solution = raw.text("solution")
    box = last_box(solution)
    if box is None or not box.text:
        raise UserError(rf"{raw.place}: expected a closed \boxed{{...}} in 'solution', found {solution[-60:]!r}")
    row: Row = {"instruction": raw.text("problem"), "output": [solution], "label": box.text}
    level = rows.level_number(raw.fields.get("level"), raw.place)
    if level is not None:
        row["level"] = level
    if "type" in raw.fields or "subject" in raw.fields:
        row["subject"] = raw.text("subject", "type")
    return row | optional(raw, id="unique_id")  # MATH-500 names its problems


def with_answer_said(row: Row) -> Row:
    """A MATH row whose solution ends with its label, where the task MATH-weak-to-strong looks for it (the data that
    Yang et al. 2024 publish)."""
    return row | {"output": [f"{solution} The answer is: {row['label']}" for solution in row["output"]]}


def svamp_row(raw: RawRow) -> Row:
    """A SVAMP row {"Body", "Question", "Answer", "Type"?, "ID"?}; the type of operation becomes the subject."""
    row: Row = {"instruction": joined(raw.text("Body"), raw.text("Question")), "label": number(raw, "Answer")}
    return row | optional(raw, id="ID", subject="Type")


def asdiv_row(raw: RawRow) -> Row:
    """An ASDiv problem (XML's names, or the same in small letters); "9 (apples)" gives the label 9."""
    answer = raw.text("Answer", "answer")
    label = re.sub(r"\s*\([^()]*\)", "", answer).strip()
    if not label:
        raise UserError(f"{raw.place}: expected an answer such as '9 (apples)', found {answer!r}")
    body, question = raw.text("Body", "body"), raw.text("Question", "question")
    row: Row = {"instruction": joined(body, question), "label": re.sub(r"\s*;\s*", ", ", label)}
    return row | optional(raw, id="ID", subject="Solution-Type") | optional(raw, subject="solution_type")


def mawps_row(raw: RawRow) -> Row:
    """A MAWPS row {"sQuestion", "lSolutions": [number], "iIndex"?}, or SVAMP's form {"Question", "Answer"}."""
    if "lSolutions" not in raw.fields:
        return {"instruction": raw.text("Question", "question"), "label": number(raw, "Answer")}
    solutions = raw.fields["lSolutions"]
    if not isinstance(solutions, list) or not solutions:
        raise UserError(f"{raw.place}: expected a list of numbers under 'lSolutions', found {solutions!r}")
    label = ", ".join(number(RawRow(raw.place, {"lSolutions": value}), "lSolutions") for value in solutions)
    return {"instruction": raw.text("sQuestion").strip(), "label": label} | optional(raw, id="iIndex")


def aqua_row(raw: RawRow) -> Row:
    """An AQuA row {"question", "options": ["A)21", ...], "correct", "rationale"?}; the options join the problem."""
    options, correct = raw.fields.get("options"), raw.text("correct").strip()
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise UserError(f"{raw.place}: expected a list of texts under 'options', found {options!r}")
    parts = [re.fullmatch(r"\(?([A-Z])\)?[).:]?\s*(.*)", option, re.DOTALL) for option in options]
    if not all(parts) or correct not in [part.group(1) for part in parts]:
        raise UserError(f"{raw.place}: expected options 'A) ...' with {correct!r} among them, found {options!r}")
    row = with_choices(raw.text("question").strip(), [part.group(2).strip() for part in parts],
                       [part.group(1) for part in parts].index(correct))
    if "rationale" in raw.fields:
        row["output"] = [f"{raw.text('rationale')}\nThe answer is ({correct})."]
    return row


def with_choices(question: str, texts: list[str], right: int) -> Row:
    """The question with its choices by letter, and the right letter as label; both apart for their log-likelihood."""
    listed = " ".join(f"({letter}) {text}" for letter, text in zip(LETTERS, texts, strict=False))
    return {"instruction": f"{question}\nOptions: {listed}", "label": LETTERS[right], "question": question,
            "choices": texts}


ANSWER_TYPES = {
    "numerical": "number",
    "expression": "expression",
    "equation": "equation",
    "interval": "interval",
    "tuple": "tuple",
}


def olympiad_row(raw: RawRow) -> Row:
    """An OlympiadBench row with a final answer; several answers become a list, `error` the tolerance."""
    if raw.fields.get("modality") == "Multimodal" or any(name.startswith("image") for name in raw.fields):
        raise LeftOut("with a picture")
    if "final_answer" not in raw.fields:
        raise LeftOut("without a final answer, which are proofs,")
    answers = texts(raw, "final_answer")
    row: Row = {"instruction": raw.text("question"), "label": ", ".join(text.strip("$ ") for text in answers)}
    if "solution" in raw.fields:
        row["output"] = texts(raw, "solution")
    kind = ANSWER_TYPES.get(str(raw.fields.get("answer_type")).lower(), "")
    if raw.fields.get("is_multiple_answer"):
        kind = "set"
    error = raw.fields.get("error")
    if error not in (None, ""):
        row["tolerance"] = tolerance(raw, error)
        kind = "number"
    return row | ({"answer_type": kind} if kind else {}) | optional(raw, id="id", subject="subfield")


def tolerance(raw: RawRow, error: object) -> float:
    """OlympiadBench's `error` as a number. Raises UserError."""
    try:
        found = float(str(error))
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise UserError(f"{raw.place}: expected a number under 'error', found {error!r}")
    return found


def texts(raw: RawRow, name: str) -> list[str]:
    """A field that is a list of texts, none of them empty. Raises UserError."""
    found = raw.fields.get(name)
    if not isinstance(found, list) or not found or not all(isinstance(x, str) and x.strip("$ \n") for x in found):
        raise UserError(f"{raw.place}: expected a list of texts under {name!r}, found {str(found)[:60]}")
    return found


def joined(body: str, question: str) -> str:
    """A story and its question as one text."""
    body = body.strip()
    return f"{body}{'' if body[-1] in '.?!,' else '.'} {question.strip()}"


def number(raw: RawRow, name: str) -> str:
    """A field that holds a number or its text, as a label: 145 for 145.0. Raises UserError."""
    value = raw.fields.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    text = rows.number_text(value, f"{raw.place}: {name!r}") if is_number else str(value).strip().replace(",", "")
    exact = None if isinstance(value, bool) else rational(text)
    if exact is None:
        raise UserError(f"{raw.place}: expected a number under {name!r}, found {value!r}")
    return str(exact.numerator) if exact.denominator == 1 else text


def optional(raw: RawRow, **names: str) -> Row:
    """Fields that are there, under our names and as text."""
    row = rows.Row(raw.place, raw.fields)
    return {ours: text for ours, theirs in names.items() if (text := row.optional_text(theirs))}
