"""Published benchmarks to prompts with labels and reference solutions."""

import re

from dataset.raw import RawRow, Row
from src.errors import UserError
from src.evaluation.extract import last_box
from src.evaluation.normalize import rational

CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")       # <<48/2=24>> in GSM8K: a hint for a tool we do not have


def gsm8k_row(raw: RawRow) -> Row:
    """A GSM8K row; the label is the number behind the last ####, which stays in the output."""
    solution = CALCULATOR_MARK.sub("", raw.text("answer"))
    _, mark, label = solution.rpartition("####")
    label = label.strip().replace(",", "")
    if not mark or rational(label) is None:
        raise UserError(f"{raw.place}: expected 'answer' to end in a line '#### number', found {solution[-60:]!r}")
    return {"instruction": raw.text("question"), "output": [solution], "label": label}


def math_row(raw: RawRow) -> Row:
    r"""A MATH row; the label is the content of the last \boxed."""
    solution = raw.text("solution")
    box = last_box(solution)
    if box is None or not box.text:
        raise UserError(rf"{raw.place}: expected a closed \boxed{{...}} in 'solution', found {solution[-60:]!r}")
    row: Row = {"instruction": raw.text("problem"), "output": [solution], "label": box.text}
    level = level_number(raw) if "level" in raw.fields else None
    if level is not None:
        row["level"] = level
    if "type" in raw.fields or "subject" in raw.fields:
        row["subject"] = raw.text("subject", "type")
    return row | optional(raw, id="unique_id")  # MATH-500 names its problems


def with_answer_said(row: Row) -> Row:
    """A MATH row whose solution ends with its label, where the task MATH-weak-to-strong looks for it (the data that
    Yang et al. 2024 publish)."""
    return row | {"output": [f"{solution} The answer is: {row['label']}" for solution in row["output"]]}


def level_number(raw: RawRow) -> int | None:
    """4 for "Level 4" or 4; None for the few problems of the training set marked "Level ?"."""
    level = re.fullmatch(r"(?:Level )?(\d|\?)", str(raw.fields["level"]))
    if level is None:
        raise UserError(f"{raw.place}: expected a level such as 'Level 4', found {raw.fields['level']!r}")
    return None if level.group(1) == "?" else int(level.group(1))


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
    listed = " ".join(f"({part.group(1)}) {part.group(2).strip()}" for part in parts)
    row: Row = {"instruction": f"{raw.text('question').strip()}\nOptions: {listed}", "label": correct}
    rationale = raw.fields.get("rationale")
    return row | ({"output": [f"{rationale}\nThe answer is ({correct})."]} if rationale else {})


ANSWER_TYPES = {
    "numerical": "number",
    "expression": "expression",
    "equation": "equation",
    "interval": "interval",
    "tuple": "tuple",
}


def olympiad_row(raw: RawRow) -> Row:
    """An OlympiadBench row with a final answer; several answers become a list, `error` the tolerance."""
    answers = raw.fields.get("final_answer")
    if not isinstance(answers, list) or not answers or not all(isinstance(text, str) for text in answers):
        raise UserError(f"{raw.place}: expected a list of texts under 'final_answer', found {answers!r}; "
                        f"proofs have none and cannot be graded")
    row: Row = {"instruction": raw.text("question"), "label": ", ".join(text.strip("$ ") for text in answers)}
    if isinstance(raw.fields.get("solution"), list):
        row["output"] = raw.fields["solution"]
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
        return float(str(error))
    except ValueError:
        raise UserError(f"{raw.place}: expected a number under 'error', found {error!r}") from None


def joined(body: str, question: str) -> str:
    """A story and its question as one text."""
    body = body.strip()
    return f"{body}{'' if body[-1] in '.?!,' else '.'} {question.strip()}"


def number(raw: RawRow, name: str) -> str:
    """A field that holds a number or its text, as a label: 145 for 145.0. Raises UserError."""
    value = raw.fields.get(name)
    text = str(value).strip().replace(",", "")
    exact = None if isinstance(value, bool) else rational(text)
    if exact is None:
        raise UserError(f"{raw.place}: expected a number under {name!r}, found {value!r}")
    return str(exact.numerator) if exact.denominator == 1 else text


def optional(raw: RawRow, **names: str) -> Row:
    """Fields that are there, under our names and as text."""
    found = {ours: raw.fields.get(theirs) for ours, theirs in names.items()}
    return {ours: str(value) for ours, value in found.items() if value not in (None, "")}
