r"""One spelling for answers that mean the same: Unicode and LaTeX without layout, exact numbers as fractions.

Text macros are unwrapped: \text{ inches} becomes the plain words " inches". Models write anything, so every pattern
here is linear in the length of the answer or is applied to answers of bounded length only.
"""

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache, partial

from src.grading import tables
from src.grading.words import CHANGED, any_of, digits_for_words

MAX_DIGITS = 300  # longer numbers are compared as strings


def variants(tag: str, first: int, last: int) -> dict[str, str]:
    """Characters of a range that unicodedata calls another one's variant: {"²": "2"} for the tag <super>."""
    found = {}
    for code in range(first, last):
        kind, *parts = unicodedata.decomposition(chr(code)).split() or [""]
        if kind == tag:
            found[chr(code)] = "".join(chr(int(part, 16)) for part in parts)
    return found


RAISED = {char: base for char, base in variants("<super>", 0xB2, 0x2100).items()
          if (base.isascii() or base == "−") and char != "º"}
LOWERED = variants("<sub>", 0x2080, 0x209D)
FRACTIONS = variants("<fraction>", 0xBC, 0x215F)
WIDE = variants("<wide>", 0xFF01, 0xFF5F) | variants("<font>", 0x1D400, 0x1D800)
PLAIN = str.maketrans(
    dict.fromkeys(tables.WIDTHLESS + tables.CHEERS, "")
    | dict.fromkeys(tables.DASHES, "-")
    | dict.fromkeys(tables.SPACES, " ")
    | {char: base for char, base in WIDE.items() if base.isascii()}
)
SIGNS = str.maketrans(tables.SIGNS | {char: f"\\{name} " for char, name in tables.GREEK.items()})
UP, DOWN = str.maketrans(RAISED), str.maketrans(LOWERED)
OVERLINED = re.compile("((?:\\d\u0305)+)")
STACKED = re.compile(f"([{''.join(RAISED)}]+)⁄([{''.join(LOWERED)}]+)")
FRACTION_SIGN = re.compile(f"[{''.join(FRACTIONS)}]")
RAISED_SIGNS, LOWERED_SIGNS = (re.compile(f"[{re.escape(''.join(signs))}]+") for signs in (RAISED, LOWERED))
ROOT = re.compile(r"([√∛∜])\s*(\d+(?:\.\d+)?)")


def plain(text: str) -> str:
    """The text with one kind of minus, space, digit and letter each, whatever their width."""
    return text if text.isascii() else text.translate(PLAIN)


def latex(text: str) -> str:
    r"""The text in ASCII, as far as LaTeX can say it: x² as x^{2}, ½ as \frac{1}{2}, √12 as \sqrt{12}, α as \alpha."""
    if text.isascii():
        return text
    text = plain(unicodedata.normalize("NFC", text))
    text = OVERLINED.sub(lambda match: f"\\overline{{{match[0].replace(chr(0x305), '')}}}", text)
    text = STACKED.sub(lambda match: f"\\frac{{{match[1].translate(UP)}}}{{{match[2].translate(DOWN)}}}", text)
    text = FRACTION_SIGN.sub(lambda match: "\\frac{{{}}}{{{}}}".format(*FRACTIONS[match[0]].split("⁄")), text)
    text = RAISED_SIGNS.sub(lambda match: f"^{{{match[0].translate(UP)}}}", text)
    text = LOWERED_SIGNS.sub(lambda match: f"_{{{match[0].translate(DOWN)}}}", text)
    text = ROOT.sub(lambda match: f"{tables.SIGNS[match[1]].strip()}{{{match[2]}}}", text)
    return text.translate(SIGNS)


Rule = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]


def compiled(*rules: tuple[str, str]) -> tuple[Rule, ...]:
    """The rules (pattern, replacement), ready to apply; sub() would read a template again whether or not it matches."""
    return tuple((re.compile(pattern), partial(re.Match.expand, template=new) if "\\" in new else new)
                 for pattern, new in rules)


END = r"(?![A-Za-z])"  # a macro name ends here
INSIDE = r"(?:[^{}\\]|\\(?!(?:over|choose)(?![a-z]))|\{[^{}]*\}){1,200}"  # of braces, with one more pair of them
GROUP = r"(?:[^{}]|\{[^{}]*\})*"  # inside braces
TEXT_MACRO = re.compile(rf"\\(?:{any_of(tables.TEXT_MACROS)})\s*\{{({GROUP})\}}")
MACRO = re.compile(r"\\([A-Za-z]+)")
LAYOUT = compiled(  # only where there are macros, before they are renamed
    (r"\\\\\*?\s?\[\s?-?[\d.]+ ?(?:pt|em|ex|mm|cm|in|mu|px|bp|pc)\s?\]", r"\\\\\\\\"),  # height of a row
    (r"\\(left|right)\s?\.", ""),
    (r"matrix\*\}(?:\[[lcr]\])?", "matrix}"),
    (r"(?<=\d) ?,? ?\\! ?,? ?(?=\d{3}(?!\d))", ","),
    (r"(?<!\\)\\(?:!|(?=\d))", ""),
    (r"(?<=\d) ?\\[,;: ] ?(?=\d{3}(?!\d))", ","),
    (r"(?<!\\)\\[,;:\s]", " "),
    (r"\\mathbb\s*\{?R\}?", r"(-\\infty,\\infty)"),
    (r"\\not\s?=", r"\\ne "),
    (r"\\\{\s?\\\}", r"\\emptyset "),
    (rf"\^\s*(?:\{{\s*\\(?:circ|degree)\s*\}}|\\(?:circ|degree){END})", r"^{\\circ}"),
    (r"\\(?:text)?color\s*\{[A-Za-z]+\}", ""),
)
REWRITES = compiled(
    (r"(?<=\d)~(?=\d{3}(?!\d))", ","),
    (r"^~\s*(?=[\d\\.-])", r"\\approx "),
    (r"~", " "),
    (r"\{([,:])\}", r"\1"),
    (r"\{\}(?=\s?[_^])", ""),
    (r"(?<=\d)\^\s?(?:\{\s*o\s*\}|o(?![A-Za-z]))", r"^{\\circ}"),
    (r"(?<=\d)\^\s?\{\s*(st|nd|rd|th)\s*\}", r" \1"),
    (r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "),
    (r"\+/-", r"\\pm "),
    (r"^\{\s*\}$", r"\\emptyset "),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"!=", r"\\ne "),
    (r"(?<!\*)\*(?!\*)", r"\\cdot "),
    (r"\*\*", "^"),
    (r"\\%|%|\bpercent\b", r"\\%"),
    (r"(?<![\\A-Za-z])sqrt\s?(\d+)", r"\\sqrt{\1}"),
    (rf"(?<![\\A-Za-z])(?:infty|infinity|inf|oo){END}", r"\\infty "),
    (rf"(?<![\\A-Za-z])({any_of(tables.BARE_NAMES)}){END}", r"\\\1 "),
    (  # not "logs", "cost"
        rf"(?<![\\A-Za-z])({any_of(tables.FUNCTIONS)})(?=\s*[_^({{\\\d]|(?:\s+[a-z]|[a-ru-z]){END})",
        r"\\\1 ",
    ),
    (r",\s+", ";"),  # 81, 256 is a list, 81,256 may be a number
    (r"\^\s?(-?\d{2,}|-\d)(?![\d}])", r"^{\1}"),
)
ARGUMENTS = compiled(  # of macros and exponents: in braces
    (rf"\{{({INSIDE})\\over{END}({INSIDE})\}}", r"\\frac{\1}{\2}"),
    (rf"^({INSIDE})\\over{END}({INSIDE})$", r"\\frac{\1}{\2}"),
    (rf"\{{({INSIDE})\\choose{END}({INSIDE})\}}", r"\\binom{\1}{\2}"),
    (rf"\\sqrt\s*(\[\w\])?\s*(\w|\\pi{END})", r"\\sqrt\1{\2}"),
    (rf"\\(frac|binom)\s*(\w|\\pi{END})\s*(\w|\\pi{END})", r"\\\1{\2}{\3}"),
    (rf"\\(frac|binom)\s*(\w|\\pi{END})\s*\{{", r"\\\1{\2}{"),
    (r"(\\(?:frac|binom)\s*\{[^{}]*\})\s*(\w)", r"\1{\2}"),
    (r"([_^])\s*(\w|\\frac\{[^{}]*\}\{[^{}]*\})", r"\1{\2}"),
    (rf"\\({any_of(tables.FUNCTIONS)})\s*(\d+|[a-z]|\\[a-z]+)(?=\s*(?:/|\\cdot{END}))", r"\\\1(\2)"),
    (rf"\\((?:{any_of(tables.FUNCTIONS)}){END}(?:[_^]\{{[^{{}}]*\}})?)\s*\{{({GROUP})\}}", r"\\\1(\2)"),
)
SPACING = compiled(  # a space stays between letters, between digits, and in front of a unit; no other has a meaning
    (r"(?<=[A-Za-z])\s+(?=[A-Za-z])|(?<=\d)\s+(?=[\d.])", "\x00"),
    (rf"(?<=[\d}})%])\s+(?=[A-Za-z]{{2}}|[{tables.UNIT_LETTERS}]{END})", "\x00"),
    (r"\s+", ""),
    ("\x00", " "),
    (r"(?:^|(?<=[(\[,;=<>]))\+", ""),
)
BRACKET = re.compile(r"[(\[{}\])]")
OPENING = re.compile(r"(?<!\\)\$\$?|\\[(\[]")
DOLLARS = re.compile(r"(\$\$?)((?:[^$\\]|\\.)*)(?<!\\)\1", re.DOTALL)
CLOSING = {"\\(": "\\)", "\\[": "\\]"}
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{(.*)\}", re.DOTALL)
THOUSANDS = re.compile(r"(?<![\d.,])([1-9]\d{0,2}(?:,\d{3})+)(?![\d,])")
SPACED_THOUSANDS = re.compile(r"(?<![\d.,/}])[1-9]\d{0,2}(?: \d{3})+(?![\d/]|\s*\\frac)")
PLAIN_NUMBER = re.compile(r"-?\d+(?:,\d+)*(?:\.\d+)?", re.ASCII)
MIXED = re.compile(
    r"(?<![\d.^_,])(\d{1,9})(?:\s*\\frac\s*\{(\d{1,9})\}\s*\{(\d{1,9})\}|\s+(\d{1,9})/(\d{1,9}))"
)
DECIMAL = r"(?:\d+\.?\d*|\.\d+)"
NUMBER = re.compile(rf"(?![+-][+-])([+-]?)\(?([+-]?{DECIMAL}(?:[eE][+-]?\d{{1,3}})?)\)?")
PART = rf"[+-]?(?:{DECIMAL}|\([+-]?{DECIMAL}\))"
FRACTION = re.compile(
    rf"([+-]?)\(?(?:({PART})/({PART.removeprefix('[+-]?')})|\\frac\{{({PART})\}}\{{({PART})\}})\)?"
)
SCIENTIFIC = re.compile(r"([+-]?)(?:(\d+(?:\.\d+)?)(?:\\cdot|x))?10\^\{([+-]?\d{1,3})\}")
MONEY_SIGNS = re.compile(r"\\?\$|[€£¥₹]")
QUOTES = re.compile("\"|``|''|^[`']|[`']$|^[*_]+|[*_]+$")
WHOLE_PART = r"(?<![\d.])(\d{0,20})\.(\d{0,20})"
REPEATING = re.compile(  # 0.1\overline{6}, 0.1(6), 0.1\dot{6}, 0.\dot{1}4285\dot{7}
    WHOLE_PART + r"(?:\\(?:overline|bar) ?(?:\{(\d{1,20})\}|(\d))|\((\d{1,20})\)"
    r"|\\dot ?\{?(\d)\}?(?:(\d{0,18})\\dot ?\{?(\d)\}?)?)"
)
DOTS = re.compile(r"(?<![\d.])(\d{0,20})\.(\d{3,40})(?:\.\.\.|\\[lc]?dots(?![a-z]))")
PERIOD = re.compile(r"(\d*?)(\d{1,10}?)\2+(\d*)")


def formulas(text: str) -> list[tuple[int, int, str]]:
    r"""Where the formulas of a text that marks them by $, $$, \( or \[ start and end, and what they say."""
    found: list[tuple[int, int, str]] = []
    for mark in OPENING.finditer(text):
        start, opening = mark.start(), mark.group()
        if found and start < found[-1][1]:
            continue
        if opening in CLOSING:
            end = text.find(CLOSING[opening], mark.end())
            if end >= 0:
                found.append((start, end + 2, text[mark.end() : end]))
        elif match := DOLLARS.match(text, start):
            found.append((start, match.end(), match.group(2)))
    return found


def formulas_only(text: str) -> str:
    """The formulas of a text that marks them, as a comma list; words after a single one stay."""
    found = formulas(text)
    if not found:
        return text
    bounds = [0, *(place for start, end, _ in found for place in (start, end)), len(text)]
    rest = " ".join(text[start:end] for start, end in zip(bounds[::2], bounds[1::2], strict=True))
    if re.search(r"\d", rest) or CHANGED.search(rest):  # the dollars are money, or the prose matters too
        return text
    tail = text[found[0][1] :] if len(found) == 1 else ""
    return ",".join(said for _, _, said in found) + " " + tail


def single_backslashes(text: str) -> str:
    r"""Undo doubled escaping (\\frac for \frac), which models copy from badly escaped prompts."""
    if "\\begin" in text and "\\\\begin" not in text:
        return text  # here \\ ends a row
    return re.sub(r"\\\\(?=[A-Za-z%$,;!{}])", r"\\", text)


def improper(match: re.Match[str]) -> str:
    r"""A mixed number as one fraction: 3\frac{1}{2} -> \frac{7}{2}."""
    whole, over, under = (int(group) for group in match.groups() if group is not None)
    return rf"\frac{{{whole * under + over}}}{{{under}}}"


def repeating(match: re.Match[str]) -> str:
    r"""A repeating decimal as a fraction: 0.1\overline{6} -> \frac{15}{90}."""
    whole, start, *period = match.groups(default="")
    return exact_decimal(whole, start, "".join(period))


def continued(match: re.Match[str]) -> str:
    """A decimal that dots continue, as a fraction where its digits show the period at least twice; else as it is."""
    whole, digits = match.groups()
    found = PERIOD.fullmatch(digits)
    if found is None or not found[2].startswith(found[3]) or len(digits) - len(found[1]) < 3:
        return match.group()
    return exact_decimal(whole, found[1], found[2])


def exact_decimal(whole: str, start: str, period: str) -> str:
    """The fraction that a decimal with a period is."""
    under = (10 ** len(period) - 1) * 10 ** len(start)
    return rf"\frac{{{int(whole + start + period) - int('0' + whole + start)}}}{{{under}}}"


def bracketed_roots(text: str) -> str:
    r"""\sqrt(a(b+1)) as \sqrt{a(b+1)}."""
    for match in re.finditer(r"\\sqrt\s*\(", text):
        start = match.end() - 1
        end = closing(text, start)
        if end >= 0:  # one character for one: the places of the other roots stay
            text = f"{text[:start]}{{{text[start + 1 : end]}}}{text[end + 1 :]}"
    return text


def without_end(text: str) -> str:
    r"""The text without the stops, separators and spaces (\, too) at its end."""
    while True:
        kept = text.rstrip(" \t\r\n\f\v.,;:")
        if not kept.endswith(("\\!", "\\")) or kept.endswith("\\\\"):  # the rest of \, or of a space
            return kept
        text = kept[:-2] if kept.endswith("!") else kept[:-1]


@lru_cache(maxsize=4096)  # samples of one problem share its label, and many their answer
def normalize(text: str) -> str:
    """One spelling of an answer. Spaces stay where they part letters, digits, or a value and its unit."""
    if PLAIN_NUMBER.fullmatch(text):
        return text
    text = single_backslashes(latex(text).strip())
    text = MONEY_SIGNS.sub("", formulas_only(text))
    text = BOX.sub(r"\1", text)
    for _ in range(3):  # innermost first
        text = TEXT_MACRO.sub(r" \1 ", text)
    text = digits_for_words(text)
    text = without_end(DOTS.sub(continued, QUOTES.sub("", text.strip()))).lstrip("=: ")
    text = SPACED_THOUSANDS.sub(lambda match: match.group().replace(" ", ""), text)
    if "\\" in text:
        text = rewritten(text, LAYOUT)
        text = MACRO.sub(lambda match: tables.MACROS.get(match[1], match.group()), text)
    text = rewritten(text, REWRITES)
    if "\\" in text or "^" in text or "_" in text:
        text = bracketed_roots(rewritten(text, ARGUMENTS))
    if "." in text:
        text = REPEATING.sub(repeating, text)
    return strip_braces(rewritten(MIXED.sub(improper, text), SPACING))


def rewritten(text: str, rules: tuple[Rule, ...]) -> str:
    """The text after each of the rules in turn."""
    for pattern, new in rules:
        text = pattern.sub(new, text)
    return text


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
    for match in BRACKET.finditer(text, start):
        depth += 1 if match.group() in "([{" else -1
        if depth == 0:
            return match.start()
    return -1


def split_top(text: str, separator: str) -> list[str]:
    """Split at a separator (a regular expression) that stands outside all brackets."""
    if re.search(separator, text) is None:
        return [text.strip()]
    parts, start, depth = [], 0, 0
    for match in re.finditer(rf"{BRACKET.pattern}|{separator}", text):
        if BRACKET.fullmatch(match.group()):
            depth += 1 if match.group() in "([{" else -1
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
    if match := NUMBER.fullmatch(text):
        value = Fraction(match[2].rstrip("."))
        return -value if match[1] == "-" else value
    if match := FRACTION.fullmatch(text):
        sign, *parts = match.groups()
        over, under = (  # each perhaps in brackets: -(7)
            Fraction(part.lstrip("+-").strip("()").rstrip(".")) * (-1 if part.startswith("-") else 1)
            for part in parts
            if part is not None)
        return None if under == 0 else (-over if sign == "-" else over) / under
    match = SCIENTIFIC.fullmatch(text)
    return Fraction(match[1] + (match[2] or "1")) * Fraction(10) ** int(match[3]) if match else None
