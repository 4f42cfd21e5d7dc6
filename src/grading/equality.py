r"""When two final answers are equal: string, exact rational, structure, and last a comparer of expressions.

Policy: exact values; units, money, percent and degree signs and a variable name ("x=") are optional; no factor 100
without a written percent sign; bare lists are unordered, tuples ordered; brackets of intervals and bases of numerals
matter; a number is answered by a number, not by a sum left to compute; no decimals for exact fractions and surds.
"""

import re
from collections import Counter
from typing import NamedTuple

from src.grading.intervals import NAME, RELATION, as_unions, named_set
from src.grading.letters import leading_letters
from src.grading.normalize import (
    closing,
    formulas_only,
    join_thousands,
    normalize,
    rational,
    split_top,
    strip_braces,
)
from src.grading.polynomial import constant_value
from src.grading.values import Leaf, conclusion, number_of, same_value
from src.grading.words import MONEY, changed, currencies, in_one_unit

MAX_LENGTH = 4000  # longer answers are compared as strings
MAX_OPEN_PAIRS = 12  # elements of two lists that rules could not pair; more than that go to no leaf comparer
MAX_DEPTH = 6

IS = r"=|\\in(?![a-z]) ?"
ALL_OF = r",(?!\d{3}(?!\d))|(?<!\d),|;|(?<![A-Za-z\\])and(?![A-Za-z])"
LIST_OR_NUMBER = re.compile(r"[1-9]\d{0,2}(?:,[1-9]\d\d)+")  # 100,200; but 10,080 is a number
LIST_SEPARATOR = rf"{ALL_OF}|(?<![A-Za-z\\])or(?![A-Za-z])"
ENVIRONMENT = re.compile(
    r"\\begin\{([pbBvV]?)(small)?(matrix|array)\}(?:\{[lcr| ]+\})?(.*)\\end\{\1(?:small)?\3\}", re.DOTALL
)
WORDS = re.compile(r"\(?[A-Za-z][A-Za-z0-9 .,;'():-]*")
NAMED = re.compile(  # what a problem may ask for that has no name of its own: x+y, a/b, [ABC], f^{-1}(2)
    r"(?:(?:[A-Za-z](?:\^\{\d\})?(?:[+-]|\\cdot ?)?){2,9}|\\frac\{[A-Za-z]+\}\{[A-Za-z]+\}|[A-Za-z]/[A-Za-z]"
    r"|\[[A-Z]{3,6}\]|[A-Za-z]\^\{-1\}\([^()=]{1,40}\))(?<![+-])="
)
LEAD = re.compile(r"(?:[A-Za-z', ]* (?:is|are|equals|was|be):? ?|[A-Za-z][A-Za-z' ]+[A-Za-z]: ?)(?=[^ ])")


def equal(answer: str, label: str, leaf: Leaf) -> bool:
    """True if the answer says the same as the label. Calls leaf for pairs of expressions that no rule decides."""
    if answer.strip() == label.strip():
        return bool(label.strip())
    if max(len(answer), len(label)) > MAX_LENGTH:
        return False
    return not other_money(answer, label) and same(normalize(answer), normalize(label), leaf, 0)


def other_money(answer: str, label: str) -> bool:
    """Whether both name kinds of money, and none that is the same."""
    if not MONEY.search(label):
        return False
    money, wanted = (currencies(formulas_only(side)) for side in (answer, label))
    return bool(money and wanted) and money.isdisjoint(wanted)


def same(answer: str, label: str, leaf: Leaf, depth: int) -> bool:
    """equal() for normalised texts; every step below either decides or passes the pair on."""
    if answer == label:
        return bool(label)
    if not answer or not label or depth > MAX_DEPTH:
        return False
    answer, label = named_set(answer), named_set(label)
    if answer == label:
        return True
    if re.fullmatch(r"\([A-J]\)", label):
        return leading_letters(answer) == label[1]
    lead = LEAD.match(answer)
    if lead and not changed(lead.group(), ""):  # "The probability is"
        answer = answer[lead.end() :]
    if is_words(label):
        answer = split_name(answer)[1].removeprefix("\\{").removesuffix("\\}")
        return is_words(answer) and words(answer) == words(label)
    answer, label = in_one_unit(answer), in_one_unit(label)
    if (named := NAMED.match(answer)) and rational(label) is not None:
        answer = answer[named.end() :]
    answer, label = as_tuple(answer, label), as_tuple(label, answer)
    answer, label, agree = without_names(exact_part(answer), exact_part(label))
    if not agree or not answer or not label:
        return False
    answer, label = as_unions(answer, label)
    ours, theirs = elements(answer), elements(label)
    if LIST_OR_NUMBER.fullmatch(answer) and len(theirs) > 1:
        ours = answer.split(",")
    if LIST_OR_NUMBER.fullmatch(label) and len(ours) > 1:
        theirs = label.split(",")
    if {len(ours), len(theirs)} in ({1, 2}, {1, 3}):  # one value in several spellings: "3/4 or 0.75"
        return all(same(mine, other, leaf, depth + 1) for mine in ours for other in theirs)
    if len(ours) > 1 or len(theirs) > 1:
        return len(ours) == len(theirs) and same_bag(ours, theirs, leaf, depth + 1)
    mine, other = structure(ours[0]), structure(theirs[0])
    if mine and other:
        if mine.kind != other.kind or len(mine.members) != len(other.members):
            return False
        if mine.kind == "union":
            return same_bag(mine.members, other.members, leaf, depth + 1)
        pairs = zip(mine.members, other.members, strict=True)
        return all(same(*pair, leaf, depth + 1) for pair in pairs)
    lonely = mine or other
    if lonely and not lonely.kind.startswith("matrix"):  # a matrix may have a name that the library knows
        return False
    return same_value(ours[0], theirs[0], leaf)


def is_words(text: str) -> bool:
    """A text answer: Saturday, (C), June 20 - and not a formula such as xy."""
    called = re.search(r"[A-Za-z](?<!and)\(.*[^)]", text)  # f(x)
    return not called and bool(WORDS.fullmatch(text)) and bool(re.search(r"[A-Z]|[a-z]{3}", text))


def words(text: str) -> list[str]:
    """The members of a text answer without case, punctuation, articles and "th" after a day; the order of a list does
    not count."""
    text = re.sub(r"\b(?:an?|the) (?=[a-z]{3})|(?<=\d)(?:st|nd|rd|th)\b", "", text.lower().replace(".", ""))
    members = re.split(r"[,;]|\band\b", text)
    return sorted(filter(None, (" ".join(re.findall(r"[a-z0-9']+", member)) for member in members)))


def without_names(answer: str, label: str) -> tuple[str, str, bool]:
    r"""Drop "x=" and "x \in" in front of both; False if both are named and the names differ. Where one side is an
    equation that is more than a named value, both stay equations."""
    (mine, value), (theirs, other) = split_name(answer), split_name(label)
    if bool(mine) != bool(theirs) and "=" in (other if mine else value):
        return answer, label, True
    return value, other, not (mine and theirs and mine != theirs)


def exact_part(text: str) -> str:
    r"""The exact side of "exact \approx 0.67" or of "0.67 \approx exact", the number of "x \approx 0.67"; "" if the
    two are far apart."""
    left, _, right = text.partition("\\approx")
    if "." in left and "." not in right and rational(left) is not None and constant_value(right) is not None:
        left, right = right, left
    near = rational(right.strip())
    if not left:  # a rounded number says that it is one
        return right.strip() if "." in right else text
    if near is None:
        return text
    if NAME.fullmatch(left):
        return right.strip()
    exact = constant_value(left)
    return left if exact is None or abs(exact - near) <= abs(exact) / 50 else ""


def split_name(text: str) -> tuple[str, str]:
    """("x", "5") for x=5, 5=x and x=2+3=5; ("", "5") for 2+3=5; ("", text) where a side is neither a name nor a number,
    or a list follows; ("", "") for a chain of numbers that are not equal."""
    sides = split_top(text, IS)
    if len(sides) == 1 or RELATION.search(text) or len(split_top(text, LIST_SEPARATOR)) > 1:
        named = len(sides) == 2 and not RELATION.search(text) and is_name(sides[0])
        return (sides[0], sides[1]) if named else ("", text)
    names = [side for side in sides if is_name(side)]
    rest = [side for side in sides if not is_name(side)] or sides[-1:]
    if len(sides) > 2 and not is_name(sides[0]) or len(sides) == 2 and not names:
        worked = all(number_of(side) is not None for side in sides)
        return ("", conclusion(sides) if worked else text)
    return names[0], conclusion(rest)


def is_name(text: str) -> bool:
    """x, f(x), AB, or a ratio of such."""
    return all(NAME.fullmatch(part) for part in text.split(":"))


def as_tuple(text: str, other: str) -> str:
    """x=3, y=-4 as (3,-4), in the order of the alphabet, and the point P(3,-4) as it, where the other answer is a
    tuple; else the text."""
    pair = structure(split_name(other)[1] or other)
    if pair is None or pair.kind != "()":
        return text
    if re.match(r"[A-Z]\(", text) and closing(text, 1) == len(text) - 1:
        return text[1:]
    named = dict(split_name(member) for member in split_top(text, ALL_OF))
    if len(named) != len(pair.members) or not all(re.fullmatch("[A-Za-z]", name) for name in named):
        return text
    return f"({','.join(join_thousands(named[name]) for name in sorted(named))})"


def elements(text: str) -> list[str]:
    r"""The members of a bare list, a set {...} or a pair a \pm b; [text] for anything else."""
    inside = text
    if text.startswith("\\{") and text.endswith("\\}") and closing(text, 1) == len(text) - 1:
        inside = text[2:-2]
    elif text.startswith("[") and closing(text, 0) == len(text) - 1 and len(split_top(text[1:-1], ",")) > 2:
        inside = text[1:-1]
    signed = []
    for member in filter(None, split_top(inside, LIST_SEPARATOR)):
        if member.count("\\pm") == 1:
            signed += [member.replace("\\pm", "+").removeprefix("+").strip(), member.replace("\\pm", "-")]
        else:
            signed.append(member)
    return signed or [text]


def same_bag(ours: list[str], theirs: list[str], leaf: Leaf, depth: int) -> bool:
    """Equal as unordered lists: first by spelling and exact value, then pair by pair."""
    left: Counter[str] = Counter()
    for texts, count in ((ours, 1), (theirs, -1)):
        for text in texts:
            value = rational(text)
            left[text if value is None else str(value)] += count
    missing = [text for text, count in left.items() for _ in range(-count)]
    extra = [text for text, count in left.items() for _ in range(count)]
    if len(missing) > MAX_OPEN_PAIRS:
        return False
    for label in missing:
        partner = next((text for text in extra if same(text, label, leaf, depth)), None)
        if partner is None:
            return False
        extra.remove(partner)
    return True


class Structure(NamedTuple):
    """A value of several parts."""

    kind: str  # "union", the brackets of a tuple or interval, or "matrix" with the lengths of its rows
    members: list[str]


def structure(text: str) -> Structure | None:
    """The parts of a union of intervals, a tuple, an interval or a matrix; None for a single value."""
    parts = split_top(text, r"\\cup(?![a-z])")
    if len(parts) > 1:
        return Structure("union", parts)
    if text[0] in "([" and closing(text, 0) == len(text) - 1:
        members = split_top(text[1:-1], LIST_SEPARATOR if ";" in text else ",")
        if len(members) > 1:
            return Structure(text[0] + text[-1], members)
        text = text[1:-1]
    match = ENVIRONMENT.fullmatch(text)
    if match is None or match.group(1) in ("v", "V"):  # bars make a determinant
        return None
    rows = [row.split("&") for row in re.split(r"\\\\|\\cr(?![a-z])", match.group(4)) if row.strip()]
    cells = [strip_braces(cell.strip()) for row in rows for cell in row]
    return Structure(f"matrix {[len(row) for row in rows]}", cells)
