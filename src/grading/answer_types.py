"""Equality by the kind of answer: the named rules a task chooses from.

equality.py compares values of any shape exactly. Here stand the rules that need to know more: the letters of a
multiple choice, true or false, a number that may be off by a stated tolerance.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from src.grading import equality
from src.grading.equality import split_name
from src.grading.letters import leading_letters
from src.grading.normalize import join_thousands, normalize, rational
from src.grading.published_rules import minerva_string
from src.grading.tables import TRUTH
from src.grading.values import Leaf, near_value
from src.grading.words import Quantity, quantity, units_clash


class AnswerType(NamedTuple):
    """What a row of a typed benchmark says of its answer; tolerance is absolute, 0 = exact."""

    kind: str = ""  # a key of KINDS
    tolerance: float = 0.0


ANY = AnswerType()
Equality = Callable[[str, str, AnswerType, Leaf], bool]  # (answer, label, type, leaf comparer) -> equal?

SEVERAL = re.compile(r"\(?[A-Z]\)?(?:(?:\s*(?:,|;|and|&)\s*|\s*)\(?[A-Z]\)?)*")


def exact(answer: str, label: str, answer_type: AnswerType, leaf: Leaf) -> bool:
    """The same value, whatever its shape; see equality.py."""
    return equality.equal(answer, label, leaf)


def choice_letters(text: str) -> str:
    """The chosen letters in alphabetical order: "C" of "(C) 21", "AC" of "C and A"; "" if there is none."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}|[$*]", r"\1", text).strip(" .")
    if SEVERAL.fullmatch(text):
        return "".join(sorted(set(re.findall(r"[A-Z](?![a-z])", text))))
    return "".join(sorted(set(leading_letters(text).split(", "))))


def same_choice(answer: str, label: str, answer_type: AnswerType, leaf: Leaf) -> bool:
    """The same letters, whatever follows them and in whatever order."""
    letters = choice_letters(label)
    return bool(letters) and choice_letters(answer) == letters


def same_truth(answer: str, label: str, answer_type: AnswerType, leaf: Leaf) -> bool:
    """Both say true (yes, valid), or both say false (no, invalid)."""
    ours, theirs = truth(answer), truth(label)
    return ours is not None and ours == theirs


def truth(text: str) -> bool | None:
    """What the first word of "Yes, because ..." says; None if it says neither, or a later word says the other. Beside
    words a letter such as f says nothing."""
    words = re.findall(r"[a-z]+", normalize(text[: equality.MAX_LENGTH]).lower())
    words = [word for word in words if len(word) > 1] or words
    values = {TRUTH[word] for word in words if word in TRUTH}
    return values.pop() if len(values) == 1 and words[0] in TRUTH and "or" not in words else None


def plain_quantity(text: str, glued: bool = False) -> Quantity:
    """A value with its unit or sign, without "x=" and separators of thousands; glued: 5m is 5 meters."""
    _, value = split_name(normalize(text)) if len(text) <= equality.MAX_LENGTH else ("", "")
    return quantity(join_thousands(value), glued)


def near_number(answer: str, label: str, answer_type: AnswerType, leaf: Leaf) -> bool:
    """Two numbers no further apart than the tolerance, by the label's measure and not of another; what is no plain
    number is compared exactly."""
    ours, theirs = plain_quantity(answer, glued=True), plain_quantity(label)
    value, number = rational(ours.value), rational(theirs.value)
    if not answer_type.tolerance or value is None or number is None:
        return equality.equal(answer, label, leaf)
    if equality.other_money(answer, label) or units_clash(ours.unit, theirs.unit):
        return False
    return near_value(value, ours, number, theirs, answer_type.tolerance)


KINDS: dict[str, Equality] = {
    "": exact, "number": near_number, "expression": exact, "equation": exact, "interval": exact, "tuple": exact,
    "set": exact, "choice": same_choice, "true_false": same_truth, "yes_no": same_truth, "valid_invalid": same_truth,
}
EQUALITIES: dict[str, Equality] = {
    "exact@5": exact,
    "choice@5": same_choice,
    "typed@5": lambda answer, label, answer_type, leaf: KINDS[answer_type.kind](answer, label, answer_type, leaf),
    # an empty answer equals nothing
    "minerva-strings@1": lambda answer, label, *_: bool(answer) and minerva_string(answer) == minerva_string(label),
}
