"""Minerva's normal form of a final answer, and the extraction of weak-to-strong-reasoning that is built on it.

Both are here to reproduce published numbers, not to grade with: "1,2" becomes "12" and "10%" becomes "10".
Lewkowycz et al. 2022, "Solving Quantitative Reasoning Problems with Language Models", appendix D.1;
GAIR-NLP/weak-to-strong-reasoning at 596a0b6, src/eval/evaluation.py.
"""

import re

SPACES_AND_ARTICLES = (("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""))
TEXT_COMMANDS = (("mbox", "text"), (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}"))
UNIT_WORDS = (
    "square ways integers dollars mph inches ft hours km units \\ldots sue points feet minutes digits cents degrees "
    "cm gm pounds meters meals edges students childrentickets multiples"
).split()
DROPPED = [
    *UNIT_WORDS,
    *("\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}"),
    *("\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots"),
]


def minerva_string(answer: str) -> str:
    """The answer behind its last equals sign without units, spaces, wrappers and separators of thousands."""
    text = answer.split("=")[-1]
    for old, new in (*SPACES_AND_ARTICLES, *TEXT_COMMANDS):
        text = text.replace(old, new)
    for dropped in DROPPED:
        text = text.replace(dropped, "")
    text = re.sub(r"^.*?\$(.+?)\$.*$", r"\1", text)
    for command in ("text", "textbf", "overline", "boxed"):
        text = re.sub(rf"\\{command}\{{(.*?)\}}", r"\1", text)
    text = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", text)
    text = re.sub(r"sqrt([^{])", r"sqrt{\1}", text).replace("$", "")
    if text.replace(",", "").isdigit():
        text = text.replace(",", "")
    return re.sub(r"\.00?$", "", text.removesuffix("%"))


def weak_to_strong_answer(response: str, key: str) -> str:
    """What that repository extracts: the rest of the last line behind the key, else the first number behind "The answer
    is "; normalised, "" if there is none."""
    text = response.split("Question")[0].strip().strip(".")
    found = re.findall(rf"{re.escape(key)} (.*)$", text)
    if found:
        return minerva_string(found[-1].strip())
    number = re.search(r"The answer is \D*?(-?\d+(?:\.\d+)?)", text)
    return minerva_string(number.group(1)) if number else ""
