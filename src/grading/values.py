"""When two single values are equal: clock times, numerals with a base, ratios, quantities, equations, and the rest by
the comparer of expressions."""

import re
from collections.abc import Callable
from fractions import Fraction

from src.grading.intervals import NAME
from src.grading.normalize import join_thousands, rational, split_top
from src.grading.polynomial import constant_value, multiple_of, same_polynomial
from src.grading.words import NUMBER, Quantity, changed, quantity, units_clash

MAX_LEAF_LENGTH = 300

Leaf = Callable[[str, str], bool]  # (answer, label), both normalised -> equal?

BASE = re.compile(  # 52_{8}, 52 (base 8)
    r"\(?([+-]?(?:\.?\d[0-9A-Za-z.]*|[A-Z][0-9A-Z.]*))\)?(?:_\{\(?(?:base ?)?| ?\(?(?:in )?base ?)(\w+)\)?\}?"
)
TRIG, ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])"), re.compile(r"(\d+(?:\.\d+)?)\^\{\\circ\}")
UNSPACED = re.compile(r"(?<=[\d}]) (?=[A-Za-z])")
TIME = re.compile(r"\d?\d:[0-5]\d")  # perhaps of the clock, which is no ratio
CLOCK = re.compile(r"(\d{1,2})(?::(\d\d))?(?::(\d\d))? ?([AaPp])\.?[Mm]\.?")
UNDONE = re.compile(
    r"\\(?:sum|int|prod|lim|binom|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|ln|log)(?![a-z])"
    r"|\^\{\^|\^\{[^{}]*\^|\^\{-?\d{4,}|\d{4,}!|\)!|!!"
)


def same_value(answer: str, label: str, leaf: Leaf) -> bool:
    """Single values: clock times, bases, ratios, quantities, equations, and the rest by the leaf comparer."""
    answer, label = in_radians(join_thousands(answer), join_thousands(label))
    if UNSPACED.sub("", answer) == UNSPACED.sub("", label):  # 2 s may be a product or seconds
        return True
    for form in (CLOCK, BASE):
        mine, other = form.fullmatch(answer), form.fullmatch(label)
        if mine or other:
            return bool(mine and other) and parts_of(mine) == parts_of(other)
    other = split_top(label, ":")
    mine = split_top(answer, ":| ?to ?(?=\\d)" if len(other) > 1 else ":")
    if len(mine) > 1 or len(other) > 1:
        if len(mine) == 1 and ("/" in answer or "\\frac" in answer):  # 3/4 as 3:4
            mine = [answer, "1"]
        pairs = list(zip(mine, other, strict=False))
        scaled = not TIME.fullmatch(label) and proportional(pairs)
        return len(mine) == len(other) and (scaled or all(same_value(*pair, leaf) for pair in pairs))
    theirs = quantity(label)
    number = rational(theirs.value)
    ours = quantity(answer, glued=number is not None)
    if units_clash(ours.unit, theirs.unit):
        return False
    if number is not None:
        return same_number(answer, ours, number, theirs, leaf)
    value = rational(ours.value)
    if value is not None and "." in ours.value:  # a decimal for an exact expression
        return False
    if ours.value == theirs.value:
        return ours.scale == theirs.scale or not ours.scale or not theirs.scale
    return same_expression(radians(ours), theirs.value, leaf)


def in_radians(answer: str, label: str) -> tuple[str, str]:
    r"""Both with their degrees in radians where both are such as \cos 58^\circ; one of them may lack the sign."""
    sides = answer, label
    if all(TRIG.search(side) and ANGLE.search(side) for side in sides):
        return ANGLE.sub(r"\\frac{\1\\pi}{180}", answer), ANGLE.sub(r"\\frac{\1\\pi}{180}", label)
    return sides


def proportional(pairs: list[tuple[str, str]]) -> bool:
    """Whether all pairs are numbers other than 0 with the same quotient: 6:8 is 3:4."""
    values = [(rational(first), rational(second)) for first, second in pairs]
    return all(map(all, values)) and len({first / second for first, second in values}) == 1


def parts_of(match: re.Match[str]) -> list[str]:
    """What a clock time or a numeral with its base is made of: hours, minutes and seconds without zeros in front."""
    return [part.lower().lstrip("0") for part in match.groups(default="")]


def same_number(answer: str, ours: Quantity, number: Fraction, theirs: Quantity, leaf: Leaf) -> bool:
    """An answer for a label with an exact rational value."""
    value = rational(ours.value)
    if value is None and theirs.scale == "degree" and "\\pi" in ours.value and not ours.scale:
        return call_leaf(ours.value, radians(theirs), leaf)
    if value is None:
        return only_number(answer) == number
    return near_value(value, ours, number, theirs)


def near_value(value: Fraction, ours: Quantity, number: Fraction, theirs: Quantity, tolerance: float = 0.0) -> bool:
    """Whether an answer's number is within the tolerance of the label's, by the label's measure: as it is or in
    percent."""
    def near(value: Fraction) -> bool:
        """Whether a number is within the tolerance of the label's."""
        return abs(value - number) <= tolerance

    if ours.scale == "percent" and not theirs.scale:  # the sign is optional where the label can be a percentage
        return near(value / 100) or near(value) and abs(number) >= 1 and "/" not in theirs.value
    return near(value) or theirs.scale == "percent" and not ours.scale and near(100 * value)


def radians(angle: Quantity) -> str:
    """The value, in radians if it is a number of degrees."""
    degrees = rational(angle.value) if angle.scale == "degree" else None
    if degrees is None:
        return angle.value
    return f"\\frac{{{degrees.numerator}\\pi}}{{{180 * degrees.denominator}}}"


def only_number(text: str) -> Fraction | None:
    """The one number of a prose answer such as "Hillary has 7 nickels" or "20 + 3 = 23 miles" (there the result);
    None for formulas, for several numbers, and where the words make it another one."""
    sides = [re.sub(r"(?<=\d)x(?=\d)", r"\\cdot", side) for side in text.split("=")]
    worked = [re.sub(r"(\d+(?:\.\d+)?)\\%", r"(\1/100)", side) for side in sides]
    worked = [re.sub(r"(?<![\\A-Za-z])/?[A-Za-z][A-Za-z.']*", "", side) for side in worked]
    if len(sides) > 1 and not conclusion(worked):
        return None
    text = re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2", sides[-1])
    found = NUMBER.findall(text)
    if len(found) != 1:
        return None
    before, _, after = text.partition(found[0])
    if after[:1].isalpha():  # 3xy is a product
        return None
    rest = re.sub(r"\([A-Za-z ]*\)|\\%|(?<=[A-Za-z])-(?=[A-Za-z])", " ", f"{before} {after}")
    rest += re.sub(r"[\d+/()=-]|\\cdot|\\frac|[{}%\\]", " ", "".join(sides[:-1]))
    if not re.fullmatch(r"[A-Za-z .,']*", rest) or re.search(r"\b[b-zB-Z]\b", rest) or changed(before, after):
        return None
    return rational(found[0])


def same_expression(answer: str, label: str, leaf: Leaf) -> bool:
    """Equations up to the sign of both sides, or up to any factor where the answer is solved for a name; other
    expressions go to the leaf comparer as they are."""
    sides, other_sides = split_top(answer, "="), split_top(label, "=")
    if len(other_sides) == 1 and len(sides) > 1:
        return False
    if len(sides) == len(other_sides) == 2:
        first, second = (f"{left}-({right})" for left, right in (sides, other_sides))
        if (multiple := multiple_of(first, second)) is not None:
            return abs(multiple) == 1 or multiple != 0 and any(map(NAME.fullmatch, sides))
        return call_leaf(first, second, leaf) or call_leaf(f"-({first})", second, leaf)
    if len(sides) != len(other_sides):
        return False
    return call_leaf(answer, label, leaf)


def call_leaf(answer: str, label: str, leaf: Leaf) -> bool:
    r"""Compare sums of simple terms term by term, others by the leaf comparer, unless the answer is too long or leaves
    to compute what the label does not: a tower may take for ever, and \cos 45^\circ may be what the problem says."""
    if max(len(answer), len(label)) > MAX_LEAF_LENGTH or re.search(r"\d_\{", answer + label):
        return False
    verdict = same_polynomial(answer, label)
    if verdict is None and UNDONE.search(answer) and not UNDONE.search(label):
        return False
    return leaf(answer, label) if verdict is None else verdict


def conclusion(sides: list[str]) -> str:
    """The last of several numbers that are said to be equal, the first where the last is left to compute; "" if it is
    not what the arithmetic before it comes to, or not what the numbers before it are where there is none."""
    values = [(side, number_of(side)) for side in sides]
    last, end = values[-1]
    known = [(side, value) for side, value in values[:-1] if value is not None]
    worked = [value for side, value in known if rational(join_thousands(side)) is None]
    digits = len(last.partition(".")[2]) if "." in last else 15
    if end is not None and any(abs(value - end) > 0.51 / 10**digits + abs(end) * 1e-12
                               for value in worked or [value for _, value in known]):
        return ""
    first = sides[0]
    return first if end is not None and rational(join_thousands(last)) is None and rational(first) is not None else last


def number_of(text: str) -> float | None:
    """The value of a number, perhaps with a unit or a percent sign, or of arithmetic with numbers; None for others."""
    found = quantity(text, glued=True)
    value = constant_value(join_thousands(found.value))
    return value / 100 if value is not None and found.scale == "percent" else value
