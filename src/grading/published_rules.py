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
    """The answer after its last equals sign without units, spaces, wrappers and separators of thousands."""
    text = answer.split("=")[-1]
    for old, new in (*SPACES_AND_ARTICLES, *TEXT_COMMANDS):
        text = text.replace(old, new)
    for dropped in DROPPED:
        text = text.replace(dropped, "")
    text = inside_dollars(text)
    for command in ("text", "textbf", "overline", "boxed"):
        text = unwrapped(text, f"\\{command}{{")
    text = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", text)
    text = re.sub(r"sqrt([^{])", r"sqrt{\1}", text).replace("$", "")
    if text.replace(",", "").isdigit():
        text = text.replace(",", "")
    return re.sub(r"\.00?$", "", text.removesuffix("%"))


# What the repository says by regular expressions whose time grows with the square of a text, in one pass each:


def inside_dollars(text: str) -> str:
    r"""re.sub(r"^.*?\$(.+?)\$.*$", r"\1", text): what stands between the first two dollars of a single line."""
    line = text.removesuffix("\n")
    start = line.find("$")
    end = line.find("$", start + 2)
    return text if "\n" in line or start < 0 or end < 0 else line[start + 1 : end] + text[len(line) :]


def unwrapped(text: str, opening: str) -> str:
    r"""re.sub(opening + r"(.*?)\}", r"\1", text), opening as it is: the braces of a macro go, within a line."""
    lines = []
    if opening not in text:
        return text
    for line in text.split("\n"):
        kept, rest = line[: line.rfind("}") + 1], line[line.rfind("}") + 1 :]
        lines.append(re.sub(re.escape(opening) + r"(.*?)\}", r"\1", kept) + rest)
    return "\n".join(lines)


def weak_to_strong_answer(response: str, key: str) -> str:
    """What that repository extracts: the rest of the last line after the key, else the first number after "The answer
    is "; normalised, "" if there is none."""
    text = response.partition("Question")[0].strip().strip(".")
    _, found, rest = text.removesuffix("\n").rpartition("\n")[2].partition(f"{key} ")
    if found:
        return minerva_string(rest.strip())
    _, found, rest = text.partition("The answer is ")
    number = re.search(r"-?\d+(?:\.\d+)?", rest)
    return minerva_string(number.group()) if number else ""
