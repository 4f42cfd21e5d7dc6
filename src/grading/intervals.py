r"""Sets of reals in other words, as unions of intervals: 2 \le x < 5, x \ne 2, x < 1 or x > 3, \{x | x > 3\}."""

import re
from fractions import Fraction

from src.grading.normalize import rational, split_top

NAME = re.compile(
    r"\\?[A-Za-z]+(?:_\{[^{}]*\})?'?(?:\([^()]*\))?|\|[A-Z]+\||m?\\angle ?[A-Z]+|\([A-Za-z,;\\]+\)"
)
UP = ("<", "\\le")
RELATION = re.compile(r"\\le(?![a-z]) ?|\\ge(?![a-z]) ?|<|>")
OUTWARD = re.compile(r"([\[\]])([^()\[\],;]+[,;][^()\[\],;]+)([\[\]])")  # ]1,5[ is (1,5)
REALS = "(-\\infty,\\infty)"
EXCEPT = re.compile(re.escape(REALS) + r" ?(?:\\setminus|-) ?\\\{(.*)\\\}")
UNEQUAL = re.compile(rf"(?:{re.escape(REALS)}[,;|:] ?)?([A-Za-z]) ?\\ne ?")
BUILDER = re.compile(r"\\\{([A-Za-z])(?:\\in\(-\\infty,\\infty\)|\\in ?R)?(?:\||:)(.*)\\\}")

NAMED = {"all real": REALS, "all real number": REALS, "no solution": "\\emptyset", "no real solution": "\\emptyset"}
AND = r"(?<![A-Za-z\\])and(?![A-Za-z])"
OR = r"(?<![A-Za-z\\])or(?![A-Za-z])|\\lor(?![a-z])"


def named_set(text: str) -> str:
    """The set that a text says in words, else the text."""
    return NAMED.get(text.lower().removesuffix("s"), text) if text[:1] in "AaNn" else text


def as_union(text: str, other: str) -> str:
    r"""A set of reals that is described as a union of intervals, where the other answer is none that is described."""
    text = OUTWARD.sub(lambda match: f"{'[('[match[1] == ']']}{match[2]}{'])'[match[3] == '[']}", text)
    match = BUILDER.fullmatch(text)
    inside = match[2] if match else text
    if not RELATION.search(inside) and "\\ne" not in inside and "\\setminus" not in inside:
        return text
    if RELATION.search(other) or "\\ne" in other:
        return ascending(inside)
    if points := excluded(inside):
        ends = zip(["-\\infty", *points], [*points, "\\infty"], strict=True)
        return "\\cup".join(f"({left},{right})" for left, right in ends)
    parts = [as_intersection(part) for part in split_top(inside, OR)]
    return "\\cup".join(parts)


def ascending(text: str) -> str:
    r"""5>x\ge2 as 2\le x<5; as it is where it is more than one chain."""
    parts, signs = RELATION.split(text), [sign.strip() for sign in RELATION.findall(text)]
    if not signs or any(sign in UP for sign in signs) or re.search(rf",|;|{AND}|{OR}", text):
        return text
    turned = ["<" if sign == ">" else "\\le " for sign in reversed(signs)] + [""]
    return "".join(part + sign for part, sign in zip(reversed(parts), turned, strict=True))


def excluded(text: str) -> list[str]:
    r"""The numbers in ascending order that all reals but them are said by: of x \ne 2, 3 or of R \setminus \{2, 3\}."""
    if match := EXCEPT.fullmatch(text):
        inside = match[1]
    elif match := UNEQUAL.match(text):
        inside = re.sub(rf"(?:[,;]|and)? ?{match[1]} ?\\ne ?", ",", text[match.end() :])
    else:
        return []
    points: dict[Fraction, str] = {}
    for point in filter(None, split_top(inside, rf",|;|{AND}")):
        for sign in ("", "-") if "\\pm" in point else ("",):
            signed = point.replace("\\pm", sign).strip()
            value = rational(signed)
            if value is None:
                return [inside] if not points and "," not in inside else []
            points[value] = signed
    return [points[value] for value in sorted(points)]


def as_intersection(text: str) -> str:
    """2<x and x<5 as (2,5); anything else as as_interval() has it."""
    parts = split_top(text, rf"{AND}|\\land(?![a-z])")
    sides = [as_interval(part) for part in parts]
    above = [side for side in sides if side.endswith(",\\infty)")]
    below = [side for side in sides if side.startswith("(-\\infty,")]
    names = {re.sub(r"[^A-Za-z]", "", re.sub(r"\\[lg]e", "", part)) for part in parts}
    if len(sides) == 2 and len(above) == len(below) == len(names) == 1 and above != below:
        return above[0].removesuffix("\\infty)") + below[0].removeprefix("(-\\infty,")
    return as_interval(text)


def as_interval(text: str) -> str:
    r"""2\le x<5 as [2,5); as it is if it is no inequality of one name."""
    parts, signs = RELATION.split(text), [sign.strip() for sign in RELATION.findall(text)]
    if not signs:
        return text
    strict, low, high = ("<", "-\\infty", "\\infty") if signs[0] in UP else (">", "\\infty", "-\\infty")
    if len(parts) == 2 and NAME.fullmatch(parts[0]):
        parts, signs = [low, *parts], [strict, *signs]
    elif len(parts) == 2:
        parts, signs = [*parts, high], [*signs, strict]
    if len(parts) != 3 or not NAME.fullmatch(parts[1]) or (signs[0] in UP) != (signs[1] in UP):
        return text
    if strict == ">":
        parts, signs = parts[::-1], signs[::-1]
    opening, closed = ("(" if signs[0] in "<>" else "["), (")" if signs[1] in "<>" else "]")
    return f"{opening}{parts[0]},{parts[2]}{closed}"
