r"""Unicode's spelling of mathematics in ASCII and LaTeX: x² as x^{2}, ½ as \frac{1}{2}, √12 as \sqrt{12}, α as \alpha.

What a character is made of (a superscript two, a wide digit) is known to unicodedata; only signs need a table.
"""

import re
import unicodedata

SIGNS = {
    "×": "\\times ",
    "·": "\\cdot ",
    "⋅": "\\cdot ",
    "∙": "\\cdot ",
    "•": "\\cdot ",
    "÷": "/",
    "∕": "/",
    "∞": "\\infty ",
    "∪": "\\cup ",
    "∩": "\\cap ",
    "∖": "\\setminus ",
    "°": "^{\\circ}",
    "º": "^{\\circ}",
    "℃": "^{\\circ}C",
    "℉": "^{\\circ}F",
    "≤": "\\le ",
    "≦": "\\le ",
    "⩽": "\\le ",
    "≥": "\\ge ",
    "≧": "\\ge ",
    "⩾": "\\ge ",
    "≠": "\\ne ",
    "≈": "\\approx ",
    "≅": "\\approx ",
    "≃": "\\approx ",
    "±": "\\pm ",
    "∓": "\\mp ",
    "∈": "\\in ",
    "∣": "|",
    "∅": "\\emptyset ",
    "∠": "\\angle ",
    "ℝ": "\\mathbb{R}",
    "√": "\\sqrt ",
    "∛": "\\sqrt[3]",
    "∜": "\\sqrt[4]",
    "′": "'",
    "″": "",
    "“": "",
    "”": "",
    "’": "'",
    "‘": "'",
    "…": "...",
    "¢": " cents",
    "ϕ": "\\phi ",
}
WIDTHLESS = "\u00ad\u200b\u200c\u200d\u2060\ufeff\ufe0e\ufe0f"
DASHES = "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"  # not the long ones, which part clauses
ROOT = re.compile(r"([√∛∜])\s*(\d+(?:\.\d+)?)")
ROOTS = {"√": "\\sqrt", "∛": "\\sqrt[3]", "∜": "\\sqrt[4]"}
OVERLINED = re.compile("((?:\\d\u0305)+)")


def made_of(tag: str, first: int, last: int) -> dict[str, str]:
    """Characters of a range that unicodedata calls another one's variant: {"²": "2"} for the tag <super>."""
    found = {}
    for code in range(first, last):
        kind, *parts = unicodedata.decomposition(chr(code)).split() or [""]
        if kind == tag:
            found[chr(code)] = "".join(chr(int(part, 16)) for part in parts)
    return found


RAISED = {
    char: base for char, base in made_of("<super>", 0xB2, 0x2100).items() if base.isascii() or base == "−"
}
RAISED.pop("º", None)
LOWERED = made_of("<sub>", 0x2080, 0x209D)
FRACTIONS = made_of("<fraction>", 0xBC, 0x215F)
WIDE = made_of("<wide>", 0xFF01, 0xFF5F) | made_of("<font>", 0x1D400, 0x1D800)
GREEK = {
    chr(code): "\\" + name.rpartition(" ")[2].lower().replace("lamda", "lambda") + " "
    for code in range(0x3B1, 0x3CA)
    if (name := unicodedata.name(chr(code))).startswith("GREEK SMALL LETTER ") and "FINAL" not in name
} | {
    char: f"\\{name} "
    for char, name in zip(
        "ΓΔΘΛΞΠΣΦΨΩ", "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega".split(), strict=True
    )
}
PLAIN = str.maketrans(
    dict.fromkeys(WIDTHLESS, "")
    | dict.fromkeys(DASHES, "-")
    | {char: base for char, base in WIDE.items() if base.isascii()}
    | {chr(code): " " for code in (0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000)}
)
MARKS = str.maketrans(SIGNS | GREEK | {"⁄": "/", "−": "-"})
SHIFTED = tuple(
    (re.compile(f"[{''.join(map(re.escape, table))}]+"), str.maketrans(table), sign)
    for table, sign in ((RAISED, "^"), (LOWERED, "_"))
)
STACKED = re.compile(f"([{''.join(RAISED)}]+)⁄([{''.join(LOWERED)}]+)")
BUILT_FRACTION = re.compile(f"[{''.join(FRACTIONS)}]")


def plain(text: str) -> str:
    """The text with one kind of minus, space, digit and letter each, whatever their width."""
    return text if text.isascii() else text.translate(PLAIN)


def latex(text: str) -> str:
    """The text in ASCII, as far as its characters have a spelling in LaTeX."""
    text = plain(unicodedata.normalize("NFC", text))
    if text.isascii():
        return text
    text = OVERLINED.sub(lambda match: f"\\overline{{{match.group().replace(chr(0x305), '')}}}", text)
    (raised, up, _), (lowered, down, _) = SHIFTED
    text = STACKED.sub(
        lambda m: f"\\frac{{{m.group(1).translate(up)}}}{{{m.group(2).translate(down)}}}", text
    )
    text = BUILT_FRACTION.sub(lambda m: "\\frac{{{}}}{{{}}}".format(*FRACTIONS[m.group()].split("⁄")), text)
    for pattern, table, sign in SHIFTED:
        text = pattern.sub(lambda m, table=table, sign=sign: f"{sign}{{{m.group().translate(table)}}}", text)
    text = ROOT.sub(lambda match: f"{ROOTS[match.group(1)]}{{{match.group(2)}}}", text)
    return text.translate(MARKS)
