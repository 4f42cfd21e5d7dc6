r"""Sets of reals in other words as unions of intervals: 2 \le x < 5, |x| < 3, x \ne 2, x < 1 or x > 3, \{x|x > 3\}."""

import re
from fractions import Fraction
from typing import NamedTuple

from src.grading.normalize import rational, split_top

NAME = re.compile(
    r"\\?[A-Za-z]+(?:_\{[^{}]*\})?'?(?:(?:\^\{-1\})?\([^()]*\))?|\|[A-Z]+\||m?\\angle ?\{?[A-Z]+\}?|\([A-Za-z,;\\]+\)"
    r"|\\(?:vec|hat|bar|overline|overrightarrow)\{?[A-Za-z]+\}?"
)
UP = ("<", "\\le")
RELATION = re.compile(r"\\le(?![a-z]) ?|\\ge(?![a-z]) ?|<|>")
DESCRIBES = re.compile(rf"{RELATION.pattern}|\\ne(?![a-z])|\\setminus")
OUTWARD = re.compile(r"([\[\]])([^()\[\],;]+[,;][^()\[\],;]+)([\[\]])")  # ]1,5[ is (1,5)
REALS = "(-\\infty,\\infty)"
EXCEPT = re.compile(re.escape(REALS) + r" ?(?:\\setminus|-) ?\\\{(.*)\\\}")
UNEQUAL = re.compile(rf"(?:(?:[A-Za-z] ?\\in ?)?{re.escape(REALS)}[,;|:]? ?)?([A-Za-z]) ?\\ne ?")
BUILDER = re.compile(r"\\\{([A-Za-z])(?:\\in\(-\\infty,\\infty\)|\\in ?R)?(?:\||:)(.*)\\\}")
DISTANCE = re.compile(r"\|([A-Za-z])([+-][\d./]+)?\|")  # |x-2|
INTERVAL = re.compile(r"(?:[A-Za-z]\\in ?)?([\[(][^\[\](),;]+[,;][^\[\](),;]+[\])])")

NAMED = {
    "all real": REALS, "all real number": REALS, "set of all real number": REALS, "no solution": "\\emptyset",
    "no real solution": "\\emptyset", "empty set": "\\emptyset", "dne": "DNE", "d.n.e": "DNE", "does not exist": "DNE",
    "doesn't exist": "DNE", "limit does not exist": "DNE", "not defined": "undefined",
}
ALL_BUT = re.compile(r"all real(?: number)?s?(?: [a-z])?[, ]*(?:except|excluding|other than|but)(?: for)? ?(.+)",
                     re.IGNORECASE)
AND = r"(?<![A-Za-z\\])and(?![A-Za-z])|\\land(?![a-z])"
OR = r"(?<![A-Za-z\\])or(?![A-Za-z])|\\lor(?![a-z])"


class Described(NamedTuple):
    """A set of reals that a text describes, and the variable it does so by."""

    name: str  # "" if there is none
    union: str  # intervals, with \\cup between them


def named_set(text: str) -> str:
    """What a text that says a set, or that there is no value, in words means in one spelling; else the text."""
    if not text[:1].isalpha():
        return text
    if match := ALL_BUT.fullmatch(text):
        return f"{REALS}\\setminus\\{{{match[1]}\\}}"
    return NAMED.get(re.sub("^(?:the|there is|there are) ", "", text.lower()).removesuffix("s"), text)


def as_unions(answer: str, label: str) -> tuple[str, str]:
    r"""Both with sets of reals that they describe as unions of intervals; sets described by different names, and
    relations that describe none, stay as they are."""
    answer, label = (
        OUTWARD.sub(lambda match: f"{'[('[match[1] == ']']}{match[2]}{'])'[match[3] == '[']}", side)
        for side in (answer, label))
    mine, theirs = described(answer), described(label)
    names = {side.name for side in (mine, theirs) if side and side.name}
    if len(names) > 1 or RELATION.search(answer) and RELATION.search(label) and not (mine and theirs):
        return answer, label
    if "\\cup" in label and not mine:  # intervals as a list
        parts = [INTERVAL.fullmatch(part) for part in split_top(answer, rf",|;|{AND}|{OR}")]
        if all(parts):
            answer = "\\cup".join(part[1] for part in parts)
    return mine.union if mine else answer, theirs.union if theirs else label


def described(text: str) -> Described | None:
    """The set that an inequality, several of them or exceptions from all reals describe; None for anything else."""
    match = BUILDER.fullmatch(text)
    text = match[2] if match else text
    if not DESCRIBES.search(text) and not EXCEPT.fullmatch(text):
        return None
    parts = [intersection(part) for part in split_top(text, OR)]
    names = {part.name if part else None for part in parts}
    if None in names or len(names) > 1:
        return None
    return Described(names.pop(), "\\cup".join(part.union for part in parts))


def excluded(text: str) -> tuple[str, list[str]]:
    r"""The variable and the numbers, ascending, of x \ne 2, 3 or of R \setminus \{2, 3\}; no numbers for others."""
    if match := EXCEPT.fullmatch(text):
        name, inside = "", re.sub(r"(?<![A-Za-z])[A-Za-z] ?= ?", "", match[1])
    elif match := UNEQUAL.match(text):
        name = match[1]
        inside = re.sub(rf"(?:[,;]|and)? ?{name} ?\\ne ?", ",", text[match.end() :])
    else:
        return "", []
    points: dict[Fraction, str] = {}
    for point in filter(None, split_top(inside, rf",|;|{AND}")):
        for sign in ("", "-") if "\\pm" in point else ("",):
            signed = point.replace("\\pm", sign).strip()
            value = rational(signed)
            if value is None:
                return name, [inside] if not points and "," not in inside else []
            points[value] = signed
    return name, [points[value] for value in sorted(points)]


def intersection(text: str) -> Described | None:
    r"""The set of 2<x and x<5, of x<5, x>2, of x \ge 2, x \ne 3, of one inequality, or of exceptions from all reals.
    Two half-lines behind a comma are meant as their union where they have no number in common."""
    name, points = excluded(text)
    if points:
        return Described(name, without(REALS, points))
    first, *more = split_top(text, rf"{AND}|,|;")
    found = interval(first)
    for part in more:
        name, points = excluded(part)
        other = interval(part)
        if found and points and name == found.name and "\\cup" not in found.union:
            found = Described(name, without(found.union, points))
        elif found and other and found.name == other.name:
            found = both(found, other, sure=re.search(AND, text) is not None)
        else:
            return None
    return found


def without(interval: str, points: list[str]) -> str:
    """An interval without some numbers in it, which ascend."""
    left, right = interval.split(",")
    lefts, rights = [left, *(f"({point}" for point in points)], [*(f"{point})" for point in points), right]
    return "\\cup".join(f"{low},{high}" for low, high in zip(lefts, rights, strict=True))


def both(first: Described, second: Described, sure: bool) -> Described | None:
    """What two half-lines of opposite directions have in common; if they have nothing and it is not sure that this is
    meant, their union. None for other intervals."""
    above, below = sorted((first.union, second.union), key=lambda union: not union.endswith(",\\infty)"))
    if not (above.endswith(",\\infty)") and below.startswith("(-\\infty,")):
        return None
    low, high = above.removesuffix(",\\infty)"), below.removeprefix("(-\\infty,")
    values = rational(low[1:]), rational(high[:-1])
    if sure or None not in values and values[0] < values[1]:
        return Described(first.name, f"{low},{high}")
    return None if None in values else Described(first.name, f"{below}\\cup{above}")


def interval(text: str) -> Described | None:
    r"""2\le x<5 as [2,5), |x|<3 as (-3,3), x=5 as the one number; None if it is no relation of one name."""
    parts, signs = RELATION.split(text), [sign.strip() for sign in RELATION.findall(text)]
    if not signs:
        name, _, value = text.partition("=")
        return Described(name, value) if value and NAME.fullmatch(name) else None
    if any((sign in UP) != (signs[0] in UP) for sign in signs):
        return None
    if signs[0] not in UP:
        parts, signs = parts[::-1], signs[::-1]
    opening, *_, closing = (("(", ")") if sign in "<>" else ("[", "]") for sign in (signs[0], signs[-1]))
    if len(parts) == 3 and NAME.fullmatch(parts[1]):
        return Described(parts[1], f"{opening[0]}{parts[0]},{parts[2]}{closing[1]}")
    if len(parts) != 2:
        return None
    low, high = parts
    if NAME.fullmatch(low):
        return Described(low, f"(-\\infty,{high}{closing[1]}")
    if NAME.fullmatch(high):
        return Described(high, f"{opening[0]}{low},\\infty)")
    within, radius = DISTANCE.fullmatch(low), rational(low) or rational(high)
    distance = within or DISTANCE.fullmatch(high)
    if not distance or not radius or radius < 0:
        return None
    centre = -(rational(distance[2] or "0") or Fraction(0))
    low, high = str(centre - radius), str(centre + radius)
    outside = f"(-\\infty,{low}{closing[1]}\\cup{opening[0]}{high},\\infty)"
    return Described(distance[1], f"{opening[0]}{low},{high}{closing[1]}" if within else outside)
