r"""One spelling for answers that mean the same: LaTeX without layout, units set aside, exact numbers as fractions.

Text macros are unwrapped: \text{ inches} becomes the plain words " inches". Models write anything, so every pattern
here is linear in the length of the answer or meets answers of bounded length only.
"""

import re
from fractions import Fraction
from typing import NamedTuple

MAX_DIGITS = 300  # longer numbers are compared as strings

UNICODE = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "×": "\\times ",
        "·": "\\cdot ",
        "⋅": "\\cdot ",
        "÷": "/",
        "⁄": "/",
        "π": "\\pi ",
        "∞": "\\infty ",
        "∪": "\\cup ",
        "∩": "\\cap ",
        "°": "^{\\circ}",
        "º": "^{\\circ}",
        "≤": "\\le ",
        "≥": "\\ge ",
        "≠": "\\ne ",
        "±": "\\pm ",
        "∈": "\\in ",
        "θ": "\\theta ",
        "∅": "\\emptyset ",
        "√": "\\sqrt ",
        "²": "^{2}",
        "³": "^{3}",
        "½": "\\frac{1}{2}",
        "¼": "\\frac{1}{4}",
        "¾": "\\frac{3}{4}",
        "⅓": "\\frac{1}{3}",
        "⅔": "\\frac{2}{3}",
        "€": "",
        "£": "",
        "“": "",
        "”": "",
        "’": "'",
        "\u00a0": " ",
        "\u200b": "",
        "\u200c": "",
        "\u200d": "",
        "\u2060": "",
        "\ufeff": "",
    }
)
TEXT_MACRO = re.compile(
    r"\\(?:text|mbox|mathrm|textbf|mathbf|textit|mathit|textrm|textsf|emph|operatorname\*?|rm|bf)\s*\{([^{}]*)\}"
)
END = r"(?![A-Za-z])"  # a macro name ends here
REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (rf"\\(?:left|right|bigl?|Bigl?|bigr|Bigr|bigg|Bigg){END}\.?", ""),
        (rf"\\(?:displaystyle|textstyle|limits|mathstrut|quad|qquad){END}", " "),
        (r"(?<!\\)\\!", ""),
        (r"(?<=\d)(?:\\[,;: ]|~|\{,\})(?=\d{3}(?!\d))", ","),
        (r"(?<!\\)\\[,;:\s]|~", " "),
        (r"\{,\}", ","),
        (rf"\\[dtc]frac{END}", r"\\frac"),
        (rf"\\(?:leq|leqslant|le){END}|<=", r"\\le "),
        (rf"\\(?:geq|geqslant|ge){END}|>=", r"\\ge "),
        (rf"\\lt{END}", "<"),
        (rf"\\gt{END}", ">"),
        (rf"\\(?:[lr]?vert){END}", "|"),
        (rf"\\langle{END}", "("),
        (rf"\\rangle{END}", ")"),
        (rf"\\lbrace{END}", r"\\{"),
        (rf"\\rbrace{END}", r"\\}"),
        (r"\\mathbb\s*\{?R\}?", r"(-\\infty,\\infty)"),
        (rf"\\varnothing{END}", r"\\emptyset "),
        (rf"\\(?:times|cdot|ast){END}|(?<!\*)\*(?!\*)", r"\\cdot "),
        (r"\*\*", "^"),
        (rf"\^\s*\{{?\s*\\(?:circ|degree){END}\s*\}}?|\\degree{END}", r"^{\\circ}"),
        (r"\\%|%|\bpercent\b", r"\\%"),
        (rf"(?<![\\A-Za-z])(?:infty|infinity){END}|\\infinity{END}", r"\\infty "),
        (rf"(?<![\\A-Za-z])(pi|sqrt){END}", r"\\\1 "),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r",\s+", ";"),  # 81, 256 is a list, 81,256 may be a number
        (rf"\\sqrt\s*(\w|\\pi{END})", r"\\sqrt{\1}"),
        (rf"\\frac\s*(\w|\\pi{END})\s*(\w|\\pi{END})", r"\\frac{\1}{\2}"),
        (rf"\\frac\s*(\w|\\pi{END})\s*\{{", r"\\frac{\1}{"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\w)", r"\1{\2}"),
        (r"([_^])\s*(\w)", r"\1{\2}"),
        (r"(?<=[A-Za-z])\s+(?=[A-Za-z])", "\x00"),  # the only space that carries meaning
        (r"\s+", ""),
        ("\x00", " "),
    )
)
SPANS = re.compile(
    r"(?<!\\)(\$\$?)((?:[^$\\]|\\.)*)(?<!\\)\1|\\\(((?:(?!\\\)).)*)\\\)|\\\[((?:(?!\\\]).)*)\\\]", re.DOTALL
)
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{(.*)\}", re.DOTALL)
THOUSANDS = re.compile(r"(?<![\d.,])([1-9]\d{0,2}(?:,\d{3})+)(?![\d,])")
SPACED_THOUSANDS = re.compile(r"-?[1-9]\d{0,2}(?: \d{3})+")
TRAILING = re.compile(r"(?:[\s.,;:]|(?<!\\)\\[,;:! ])+$")
MIXED = re.compile(
    r"(?<![\d.^_,])(\d{1,9})(?:\s*\\frac\s*\{(\d{1,9})\}\s*\{(\d{1,9})\}|\s+(\d{1,9})/(\d{1,9}))"
)
DECIMAL = r"(?:\d+\.?\d*|\.\d+)"
NUMBER = re.compile(rf"([+-]?)\(?({DECIMAL})\)?")
SLASHED = rf"([+-]?{DECIMAL})/({DECIMAL})"
STACKED = rf"\\frac\{{([+-]?{DECIMAL})\}}\{{([+-]?{DECIMAL})\}}"
FRACTION = re.compile(rf"([+-]?)\(?(?:{SLASHED}|{STACKED})\)?")
SCIENTIFIC = re.compile(r"([+-]?\d+(?:\.\d+)?)\\cdot10\^\{(-?\d{1,2})\}")
UNIT = re.compile(
    r"(?<=[\d})%ie])([ /]?[A-Za-z][A-Za-z.]*(?:/[A-Za-z]+)?(?: [A-Za-z.]+(?:/[A-Za-z]+)?)*)(\^\{[23]\})?$"
)
MAX_UNIT = 60  # characters
NOT_UNIT = re.compile(r"\b(?:[A-Za-z]|and|or|not|sin|cos|tan|cot|sec|csc|log|ln|mod|pi)\b")
SHORT_UNITS = frozenset("m g s h L l".split())


class Quantity(NamedTuple):
    """A value, the words behind it, and the sign that scales it."""

    value: str
    unit: str  # "" or words, as written
    scale: str  # "", "percent" or "degree"


def formulas_only(text: str) -> str:
    r"""The formulas of a text that marks them by $, \( or \[, as a comma list; words behind a single one stay."""
    spans = list(SPANS.finditer(text))
    rest = SPANS.sub(" ", text)
    if not spans or re.search(r"\d", rest):  # digits outside: the dollars are money, or the prose matters too
        return text
    formulas = [span.group(2) or span.group(3) or span.group(4) or "" for span in spans]
    tail = text[spans[0].end() :] if len(spans) == 1 else ""
    return ",".join(formulas) + " " + tail


def unwrap_text(text: str) -> str:
    r"""Replace \text{...} and its kin by their content, innermost first."""
    for _ in range(3):
        text = TEXT_MACRO.sub(r" \1 ", text)
    return text


def single_backslashes(text: str) -> str:
    r"""Undo doubled escaping (\\frac for \frac), which models copy from badly escaped prompts."""
    if "\\begin" in text and "\\\\begin" not in text:
        return text  # here \\ ends a row
    return re.sub(r"\\\\(?=[A-Za-z%$])", r"\\", text)


def improper(match: re.Match[str]) -> str:
    r"""A mixed number as one fraction: 3\frac{1}{2} -> \frac{7}{2}."""
    whole, over, under = (int(group) for group in match.groups() if group is not None)
    return rf"\frac{{{whole * under + over}}}{{{under}}}"


def normalize(text: str) -> str:
    """One spelling of an answer. Between two letters one space is kept, all other space is gone."""
    text = single_backslashes(text.translate(UNICODE).strip())
    text = formulas_only(text).replace("\\$", "").replace("$", "")
    text = unwrap_text(BOX.sub(r"\1", text))
    text = TRAILING.sub("", text.strip()).lstrip("=: ")
    if SPACED_THOUSANDS.fullmatch(text):
        text = text.replace(" ", "")
    for pattern, new in REWRITES[:-3]:
        text = pattern.sub(new, text)
    text = MIXED.sub(improper, text)
    for pattern, new in REWRITES[-3:]:
        text = pattern.sub(new, text)
    return strip_braces(text)


def join_thousands(text: str) -> str:
    """Numbers without their thousands separators, for text that is no list."""
    return THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)


def strip_braces(text: str) -> str:
    """Drop brace groups that hold the whole answer."""
    while text.startswith("{") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at text[start], -1 if none; [a,b) counts as closed."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] in "([{") - (text[index] in ")]}")
        if depth == 0:
            return index
    return -1


def split_top(text: str, separator: str) -> list[str]:
    """Split at a separator (a regular expression) that stands outside all brackets."""
    parts, start, depth = [], 0, 0
    for match in re.finditer(rf"[(\[{{]|[)\]}}]|{separator}", text):
        if match.group() in ("(", "[", "{"):
            depth += 1
        elif match.group() in (")", "]", "}"):
            depth -= 1
        elif depth == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return [*parts, text[start:].strip()]


def rational(text: str) -> Fraction | None:
    """Exact value of a normalised integer, decimal, fraction or scientific number; None for anything else."""
    if not text or len(text) > MAX_DIGITS:
        return None
    if THOUSANDS.fullmatch(text.lstrip("+-")):
        text = text.replace(",", "")
    match = NUMBER.fullmatch(text)
    if match:
        return Fraction(match.group(1) + match.group(2).rstrip("."))
    match = FRACTION.fullmatch(text)
    if match:
        sign, *parts = match.groups()
        over, under = (Fraction(part.rstrip(".")) for part in parts if part is not None)
        return None if under == 0 else (-over if sign == "-" else over) / under
    match = SCIENTIFIC.fullmatch(text)
    return Fraction(match.group(1)) * Fraction(10) ** int(match.group(2)) if match else None


def quantity(text: str) -> Quantity:
    """Split a normalised answer into value, unit, and percent or degree sign."""
    match = UNIT.search(text, max(0, len(text) - MAX_UNIT))
    unit = match.group(1).strip(" ./") if match else ""
    if match and (unit in SHORT_UNITS or not NOT_UNIT.search(unit)):
        text = text[: match.start()]
    else:
        unit = ""
    if text.endswith("\\%"):
        return Quantity(text[:-2], unit, "percent")
    if match and unit and match.group(2):
        unit += match.group(2)
    if text.endswith("^{\\circ}") or unit.lower().startswith("degree"):
        return Quantity(text.removesuffix("^{\\circ}"), "", "degree")
    return Quantity(text, unit, "")
