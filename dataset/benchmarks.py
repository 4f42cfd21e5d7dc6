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
    return row


def level_number(raw: RawRow) -> int | None:
    """4 for "Level 4" or 4; None for the few problems of the training set marked "Level ?"."""
    level = re.fullmatch(r"(?:Level )?(\d|\?)", str(raw.fields["level"]))
    if level is None:
        raise UserError(f"{raw.place}: expected a level such as 'Level 4', found {raw.fields['level']!r}")
    return None if level.group(1) == "?" else int(level.group(1))
