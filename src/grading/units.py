r"""The unit behind a value: words, km/h, m/s^{2}, square feet; and when two units, or two currencies, are not the same.

A unit is optional: 5 answers "5 meters". Written on both sides it must be the same one, to the same power.
"""

import re
from collections import Counter
from typing import NamedTuple

from src.grading.number_words import changed

UNITS = {
    name: names.split()[0]
    for names in (
        "meter m meters metre metres",
        "centimeter cm centimeters centimetre centimetres",
        "millimeter mm millimeters",
        "kilometer km kilometers kilometre kilometres",
        "inch in inches",
        "foot ft feet",
        "yard yd yards",
        "mile mi miles",
        "dollar dollars usd",
        "cent cents",
        "euro euros eur",
        "second s sec seconds",
        "minute min minutes mins",
        "hour h hr hrs hours",
        "day days",
        "week weeks",
        "month months",
        "year years",
        "gram g gm grams",
        "kilogram kg kilograms",
        "milligram mg",
        "pound lb lbs pounds",
        "ounce oz ounces",
        "liter l liters litre litres",
        "milliliter ml milliliters",
        "newton n",
        "joule j joules",
        "watt w watts",
        "volt v volts",
        "am",
        "pm",
        "unit units",
    )
    for name in names.split()
}
SPEEDS = {"mph": "mile/hour", "kph": "km/hour", "kmh": "km/hour", "fps": "foot/second"}
LETTERS = "mgshLlNJWV"  # units of one letter, which need a space in front: 5m is a product
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
RAISED = re.compile(r"(?<=[A-Za-z]) (squared|cubed)(?![A-Za-z])")
FUNCTIONS = "and or not sin cos tan cot sec csc log ln mod pi".split()
PART = r"[A-Za-z][A-Za-z.]*(?:\^\{-?[1-9]\})?"
UNIT = re.compile(rf"(?:(?<=[\d}})%])|(?<=\\pi)|(?<=[^a-z]i))( ?/?{PART}(?:(?: |/|\\cdot ){PART})*)$")
FRACTION = re.compile(r"\\frac\{([A-Za-z ]{1,20})\}\{([A-Za-z ]{1,20}(?:\^\{\d\})?)\}$")
MAX_UNIT = 60  # characters
MONEY = re.compile(
    r"(?P<dollar>\$|(?<![A-Za-z])(?:dollars?|USD)(?![A-Za-z]))|(?P<cent>¢|(?<![A-Za-z])cents?(?![A-Za-z]))"
    r"|(?P<euro>€|(?<![A-Za-z])(?:euros?|EUR)(?![A-Za-z]))|(?P<pound>£|(?<![A-Za-z])GBP(?![A-Za-z]))"
    r"|(?P<yen>¥|(?<![A-Za-z])(?:yen|yuan|JPY|CNY)(?![A-Za-z]))|(?P<rupee>₹|(?<![A-Za-z])(?:rupees?|INR)(?![A-Za-z]))",
    re.IGNORECASE,
)


class Quantity(NamedTuple):
    """A value, the words behind it, and the sign that scales it."""

    value: str
    unit: str  # "" or words, as written
    scale: str  # "", "percent" or "degree"


def currencies(text: str) -> set[str]:
    """The kinds of money that a text names, formulas without their dollars."""
    return {match.lastgroup or "" for match in MONEY.finditer(text)}


def quantity(text: str, glued: bool = False) -> Quantity:
    """Split a normalised answer into value, unit, and percent or degree sign; glued: 5m is 5 meters."""
    tail = max(0, len(text) - MAX_UNIT)
    text = text[:tail] + FRACTION.sub(r" \1/\2", text[tail:])
    match = UNIT.search(text, tail)
    unit = match.group(1) if match and is_unit(match.group(1), glued) else ""
    if match and unit:
        text, unit = text[: match.start()], unit.strip(" ./")
    if text.endswith("\\%"):
        return Quantity(text[:-2], unit, "percent")
    if text.endswith("^{\\circ}") or unit.lower().startswith("degree"):
        return Quantity(text.removesuffix("^{\\circ}"), "", "degree")
    return Quantity(text, unit, "")


def is_unit(phrase: str, glued: bool) -> bool:
    """Whether the words behind a value only name what it counts."""
    words = re.findall(r"[A-Za-z]+", phrase)
    if words[0].lower() in UNITS:
        phrase = RAISED.sub("", phrase)
    if changed("", phrase) or any(word in FUNCTIONS for word in words):
        return False
    if any(len(word) == 1 and word not in LETTERS for word in words):
        return False
    if len(words[0]) == 1:
        return glued or phrase[0] in " /"
    return len(words[0]) + (phrase[0] in " /") > 3 or words[0].lower() in UNITS | SPEEDS


def units_clash(mine: str, other: str) -> bool:
    """Whether the units of two phrases are known ones and differ, or both say a power and it differs."""
    first, second = powers(mine), powers(other)
    known = [
        {name: power for name, power in unit.items() if name not in ("unit", "?")} for unit in (first, second)
    ]
    if all(known):
        return known[0] != known[1]
    ends = [max(unit.values(), default=1) for unit in (first, second)]
    return bool(first and second) and ends[0] != ends[1] and ("unit" in first + second or min(ends) > 1)


def powers(unit: str) -> Counter[str]:
    """The known units of a phrase with their powers: 2 for an area, -1 behind "per"; "?" for all other words."""
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
