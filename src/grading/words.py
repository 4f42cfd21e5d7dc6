r"""The words around a number: those that are its digits, its unit, its money, and those that make it another number.

"negative 42", "2 million" and "twelve" say one number. "twice 42", "at most 42", "42 squared" and "42 is false" say
something else than 42, and whoever says them has not answered 42. A unit is optional: 5 answers "5 meters"; written on
both sides it must be the same one, to the same power.
"""

import re
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

from src.grading import tables
from src.grading.tables import PARTS, POWERS, SCALES, SHARES, SMALL, SPEEDS, UNITS

NUMBER = re.compile(  # in prose, as written: 27,000 or -3.5 or 1/2
    r"(?:(?<![\w)\].])-)?(?:[1-9]\d{0,2}(?: \d{3})+(?![\d/])|\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
    r"(?:[eE][+-]?\d+(?!\w)|/\d+(?:\.\d+)?)?|(?<![\w.])-?\.\d+"
)


def any_of(names: object) -> str:
    """An expression for any of these words, or of a text's words."""
    return "|".join(names.split() if isinstance(names, str) else names)


SCALE = any_of(SCALES)
WORD = f"(?:{any_of(SMALL)}|{SCALE})"
PART = r"\s+and\s+(?:a|one)\s+(half|quarter|third)"
SPELLED = re.compile(
    rf"(?<![A-Za-z\\-])(?:(?P<half>half )?(?:an? )?(?=(?:{SCALE})\b))?(?P<words>{WORD}(?:[\s-]+(?:and\s+)?{WORD})*)"
    rf"(?:{PART})?(?![A-Za-z]|-[A-Za-z])",
    re.IGNORECASE,
)
SCALED = re.compile(rf"(?<![\w.,])(\d+(?:,\d{{3}})*(?:\.\d+)?)[\s~-]*({SCALE})(?:s? of)?(?![A-Za-z])", re.IGNORECASE)
AND_A_PART = re.compile(rf"(?<![\w.,/])(\d{{1,9}}){PART}(?![A-Za-z])", re.IGNORECASE)
SHARE = re.compile(  # two thirds, one half, a quarter
    rf"\s*(?:(an?|{any_of(SMALL)})[\s-])?({any_of(SHARES)})s?[\s.]*", re.IGNORECASE
)
IN_BOTH = re.compile(r"(?<![\w.,-])(-?\d+(?:/\d+)?) *\(\1\)")  # 42 (forty-two)
NEGATIVE = re.compile(r"(?<![A-Za-z])(?:negative|minus)\s+(?=\\?\$?\s*[\d.])", re.IGNORECASE)
HINT = re.compile(  # one search tells most texts that there is nothing to do
    rf"(?<![A-Za-z])(?:{WORD}|(?:{any_of(SHARES)})s?|negative|minus)(?![A-Za-z])", re.IGNORECASE
)
CHANGED = re.compile(rf"(?<![A-Za-z'])(?:{any_of(tables.CHANGES)}|at (?:the )?(?:most|least|best|worst))(?![A-Za-z'])",
                     re.IGNORECASE)
CHANGED_BEFORE = re.compile(
    rf"(?<![A-Za-z'])(?:(?:{any_of(tables.CHANGES_BEFORE)}|{any_of(tables.CHANGES)}|at (?:most|least))"
    rf"(?: (?:to|be|a|an|the|only|of|from))?|(?:{any_of(tables.CHANGES_WITH_OF)})s? of)\W{{0,3}}$",
    re.IGNORECASE,
)
CHANGED_AFTER = re.compile(
    rf"\W{{0,3}}(?:[a-z]+ )?(?:is |was )?(?:{any_of(tables.CHANGES_AFTER)}|{any_of(tables.CHANGES)}|at (?:most|least))"
    r"(?![A-Za-z'])",
    re.IGNORECASE,
)
MONEY = re.compile("|".join(rf"(?P<{name}>{re.escape(sign)}|(?<![A-Za-z])(?:{words})(?![A-Za-z]))"
                            for name, (sign, words) in tables.MONEY.items()),
                   re.IGNORECASE)
RAISED = re.compile(r"(?<=[A-Za-z]) (squared|cubed)(?![A-Za-z])")
UNIT_PART = r"[A-Za-z][A-Za-z.]*(?:\^\{-?[1-9]\})?"
UNIT = re.compile(rf"(?:(?<=[\d}})%])|(?<=\\pi)|(?<=[^a-z]i))( ?/?{UNIT_PART}(?:(?: |/|\\cdot ){UNIT_PART})*)$")
VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])")
UNIT_FRACTION = re.compile(r"\\frac\{([A-Za-z ]{1,20})\}\{([A-Za-z ]{1,20}(?:\^\{\d\})?)\}$")
DEGREES = re.compile(r"(?:\^\{\\circ\}| degrees?) ?(C|F|Celsius|Fahrenheit)$", re.IGNORECASE)
IN_PARTS = re.compile(r"(\d{1,9}) ?([A-Za-z]+)(?: and|,| ?;)? ?(\d{1,9}(?:\.\d{1,9})?) ?([A-Za-z]+)")
MAX_UNIT = 60  # characters


def digits_for_words(text: str) -> str:
    """The text with its numbers in digits: "two hundred and five" as 205, "2 million" as 2000000, "minus 3" as -3."""
    if HINT.search(text) is None:
        return text
    if share := SHARE.fullmatch(text):
        over, under = share.groups(default="a")
        return str(Fraction(SMALL.get(over.lower(), 1), SHARES[under.lower()]))
    text = scaled(text)
    alone = not re.search(r"\d", text)
    return IN_BOTH.sub(r"\1", NEGATIVE.sub("-", SPELLED.sub(lambda match: spelled(match, alone), text)))


def scaled(text: str) -> str:
    """The text with the words next to digits taken in: "-3" for "minus 3", 2000000 for "2 million"."""
    if HINT.search(text) is None:
        return text
    text = SCALED.sub(lambda match: str(Fraction(match[1].replace(",", "")) * SCALES[match[2].lower()]), text)
    text = AND_A_PART.sub(lambda match: str(int(match[1]) + PARTS[match[2].lower()]), text)
    return NEGATIVE.sub("-", text)


def spelled(match: re.Match[str], alone: bool) -> str:
    """Digits for a number in words; as it is where it is no one number, or a "one" that may be a pronoun."""
    words = [word for word in re.findall(r"[a-z]+", match["words"].lower()) if word != "and"]
    if words == ["one"] and not alone:
        return match.group()
    total, group, last = 0, 0, 10**15
    for before, word in zip(["", *words], words, strict=False):
        if word in SMALL:
            tens = before in SMALL and SMALL[before] >= 20 and 0 < SMALL[word] < 10
            if before in SMALL and not tens:  # "one two"
                return match.group()
            group += SMALL[word]
        elif SCALES[word] <= 100:
            group = (group or 1) * SCALES[word]
        elif SCALES[word] >= last:  # "thousand million"
            return match.group()
        else:
            total, group, last = total + (group or 1) * SCALES[word], 0, SCALES[word]
    value = Fraction(total + group, 2 if match["half"] else 1)
    return str(value + (PARTS[match[3].lower()] if match[3] else 0))


def altered(before: str, after: str) -> bool:
    """Whether the words right next to a number make it another one, or none."""
    return bool(CHANGED_BEFORE.search(before[-40:]) or CHANGED_AFTER.match(after))


def changed(before: str, after: str) -> bool:
    """altered(), or a word further off that does so."""
    return bool(CHANGED.search(f"{before} {after}")) or altered(before, after)


class Quantity(NamedTuple):
    """A value, the words after it, and the sign that scales it."""

    value: str
    unit: str  # "" or words, as written
    scale: str  # "", "percent" or "degree"


def currencies(text: str) -> set[str]:
    """The kinds of money that a text names, formulas without their dollars."""
    return {match.lastgroup or "" for match in MONEY.finditer(text)}


def quantity(text: str, glued: bool = False) -> Quantity:
    """Split a normalised answer into value, unit, and percent or degree sign; glued: 5m is 5 meters."""
    tail = max(0, len(text) - MAX_UNIT)
    text = text[:tail] + UNIT_FRACTION.sub(r" \1/\2", text[tail:])
    if temperature := DEGREES.search(text, tail):
        name = "celsius" if temperature[1][0] in "cC" else "fahrenheit"
        return Quantity(text[: temperature.start()], name, "")
    match = UNIT.search(text, tail)
    unit = match.group(1) if match and is_unit(match.group(1), glued) else ""
    if match and len(unit.strip(" /")) == 1 and VARIABLE.search(text[: match.start()]):  # x/m
        unit = ""
    if match and unit:
        text, unit = text[: match.start()], unit.strip(" ./")
    if text.endswith("\\%"):
        return Quantity(text[:-2], unit, "percent")
    if text.endswith("^{\\circ}") or unit.lower().startswith("degree"):
        return Quantity(text.removesuffix("^{\\circ}"), "", "degree")
    return Quantity(text, unit, "")


def in_one_unit(text: str) -> str:
    """3 hours and 20 minutes as 10/3 hour; as it is where the second unit is no part of the first."""
    match = IN_PARTS.fullmatch(text)
    names = (UNITS.get(match[2].lower(), ""), UNITS.get(match[4].lower(), "")) if match else ("", "")
    if names not in tables.PARTS_OF_UNITS:
        return text
    return f"{int(match[1]) + Fraction(match[3]) / tables.PARTS_OF_UNITS[names]} {names[0]}"


def is_unit(phrase: str, glued: bool) -> bool:
    """Whether the words after a value only name what it counts."""
    words = re.findall(r"[A-Za-z]+", phrase)
    first = words[0].lower()
    if changed("", RAISED.sub("", phrase) if first in UNITS else phrase):
        return False
    if any(word in tables.NO_UNITS or len(word) == 1 and word not in tables.UNIT_LETTERS for word in words):
        return False
    if len(first) == 1:
        return glued or phrase[0] in " /"
    return len(first) + (phrase[0] in " /") > 3 or first in (*UNITS, *SPEEDS, *POWERS)


def units_clash(mine: str, other: str) -> bool:
    """Whether the units of two phrases are known ones and differ, or both say a power and it differs."""
    first, second = powers(mine), powers(other)
    known = [{name: power for name, power in unit.items() if name not in ("unit", "?")} for unit in (first, second)]
    if all(known):
        return known[0] != known[1]
    ends = [max(unit.values(), default=1) for unit in (first, second)]
    return bool(first and second) and ends[0] != ends[1] and ("unit" in first + second or min(ends) > 1)


def powers(unit: str) -> Counter[str]:
    """The known units of a phrase with their powers: 2 for an area, -1 after "per"; "?" for all other words."""
    unit = re.sub(r"[A-Za-z]+", lambda match: SPEEDS.get(match.group().lower(), match.group()), unit)
    unit = RAISED.sub(lambda match: "^{2}" if match[1] == "squared" else "^{3}", unit)
    found: Counter[str] = Counter()
    sign, raised = 1, 1
    for name, power, slash in re.findall(r"([A-Za-z]+)\.?(?:\^\{(-?\d)\})?|(/)", unit):
        if slash or name == "per":
            sign = -1
        elif name.lower() in POWERS:
            raised = POWERS[name.lower()]
        else:
            found[UNITS.get(name.lower(), "?")] += sign * raised * int(power or 1)
            raised = 1
    return found
